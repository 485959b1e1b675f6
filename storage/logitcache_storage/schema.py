"""The metadata of a cache: frozen records, parsed and validated field by field.

Every record is plain JSON on the store (`storage/SPEC.md` lists each field). `parse(cls, data)` refuses
unknown, missing and mistyped fields by name, so that a damaged or foreign file never becomes a half-right record.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import google_crc32c

from logitcache_storage.errors import CorruptionError, InputError, MismatchError

FORMAT_VERSION = 1
MAX_METADATA_BYTES = 1 << 28
MAX_DEPTH = 32
"""Of free-form values within a record."""
BLOCK_BYTES = 1 << 18
"""Every object carries one CRC-32C per block of this many bytes, so that a range read is verified too."""
INDEX_BYTES = 32
"""Of one sample in the index of a part of the samples table."""
MAX_SHARD_ROWS = (1 << 31) - 1
"""Rows of a shard are counted in int32."""
PRECISIONS = ("u8", "u10", "fp16", "fp32")
CONTAINERS = ("zarr", "arrow")
ID_LAYOUTS = ("plain", "ascending", "split")
MAX_SPLIT_VOCAB = 1 << 24
"""The id layout `split` has 24 bits for an id."""

_CHECKSUM = re.compile(rb'\{"crc32c": "([0-9a-f]{8})"')
_ATTEMPT = re.compile("[0-9a-f]{16}")

Record = TypeVar("Record")


@dataclass(frozen=True)
class TeacherIdentity:
    """Which model was asked, and in which arithmetic. `id` and `revision` inform; the fingerprints decide."""

    id: str
    revision: str
    weights: str
    config: str
    dtype: str
    engine: str


@dataclass(frozen=True)
class TokenizerIdentity:
    """Fingerprints of the parts of a tokenizer that give ids their meaning."""

    vocabulary: str
    special_tokens: str
    chat_template: str


@dataclass(frozen=True)
class CorpusIdentity:
    """What was read and how records became samples. `settings` holds every option that changes the outcome."""

    fingerprint: str
    num_records: int
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        _require(self.num_records >= 0, "corpus.num_records", ">= 0", self.num_records)


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is a cache of; written once, and equal for every run that continues it."""

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    corpus: CorpusIdentity
    vocab_size: int
    k: int
    kept_mass: float
    precision: str
    container: str
    shard_rows: int
    role: str = "teacher"
    id_layout: str = "plain"
    """How ids and codes are laid out (`id_layouts`); early writers knew only this one, and did not name it."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _require(self.format_version == FORMAT_VERSION, "format_version", str(FORMAT_VERSION), self.format_version)
        _require(self.vocab_size >= 1, "vocab_size", ">= 1", self.vocab_size)
        _require(
            1 <= self.k <= self.vocab_size,
            "k",
            f"between 1 and the vocabulary size {self.vocab_size}",
            self.k,
        )
        _require(0.0 < self.kept_mass <= 1.0, "kept_mass", "in (0, 1]", self.kept_mass)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        _require(self.container in CONTAINERS, "container", f"one of {', '.join(CONTAINERS)}", self.container)
        _require(self.id_layout in ID_LAYOUTS, "id_layout", f"one of {', '.join(ID_LAYOUTS)}", self.id_layout)
        fits = self.id_layout != "split" or self.vocab_size <= MAX_SPLIT_VOCAB
        _require(fits, "vocab_size", f"<= {MAX_SPLIT_VOCAB} with id_layout 'split'", self.vocab_size)
        _require(self.shard_rows >= 1, "shard_rows", ">= 1", self.shard_rows)

    def differences(self, other: CacheIdentity) -> list[str]:
        """Fields that differ from `other`, as "field: mine, theirs".

        Where the teacher was found is no difference, nor is the id layout: a cache goes on with the one it has.
        """
        mine, theirs = _flatten(to_json(self)), _flatten(to_json(other))
        informative = {"teacher.id", "teacher.revision", "id_layout"}
        return [
            f"{name}: {mine.get(name)!r}, {theirs.get(name)!r}"
            for name in sorted(mine.keys() | theirs.keys())
            if name not in informative and mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class ObjectRecord:
    """One object on the store: path below the cache, size, and a CRC-32C for each block of `BLOCK_BYTES`."""

    path: str
    size: int
    block_crc32c: tuple[int, ...]

    def __post_init__(self) -> None:
        parse_object_path(self.path)
        _require(self.size >= 0, f"{self.path}: size", ">= 0", self.size)
        blocks = -(-self.size // BLOCK_BYTES)
        _require(
            len(self.block_crc32c) == blocks,
            f"{self.path}: block_crc32c",
            f"{blocks} checksums",
            len(self.block_crc32c),
        )


@dataclass(frozen=True)
class PlanPart:
    """A parquet file with the samples `[first_sample, first_sample + num_samples)` of the plan."""

    first_sample: int
    num_samples: int
    object: ObjectRecord
    index: ObjectRecord | None = None
    """Where its samples stand, how long they are and their keys (`sample_index`); early writers made none."""

    def __post_init__(self) -> None:
        if self.index is not None:
            expected = INDEX_BYTES * self.num_samples
            _require(self.index.size == expected, f"{self.index.path}: size", str(expected), self.index.size)


@dataclass(frozen=True)
class PlanRecord:
    """The plan: which samples there are, and in which shard and row each one's targets stand."""

    num_samples: int
    num_tokens: int
    num_rows: int
    shard_num_rows: tuple[int, ...]
    report: dict[str, Any]
    parts: tuple[PlanPart, ...]
    vocabulary: ObjectRecord

    def __post_init__(self) -> None:
        for shard, num_rows in enumerate(self.shard_num_rows):
            inside = 0 <= num_rows <= MAX_SHARD_ROWS
            _require(inside, f"shard_num_rows[{shard}]", f"in [0, {MAX_SHARD_ROWS}]", num_rows)
        _require(self.num_rows == sum(self.shard_num_rows), "num_rows", "the sum of shard_num_rows", self.num_rows)
        first_sample = 0
        for i, part in enumerate(self.parts):
            _require(part.num_samples >= 1, f"parts[{i}].num_samples", ">= 1", part.num_samples)
            _require(
                part.first_sample == first_sample, f"parts[{i}].first_sample", str(first_sample), part.first_sample
            )
            first_sample += part.num_samples
        _require(self.num_samples == first_sample, "num_samples", f"the parts' {first_sample}", self.num_samples)

    @property
    def objects(self) -> tuple[ObjectRecord, ...]:
        """Everything that the plan lists: the parts of the samples table, their indexes, the vocabulary."""
        indexes = (part.index for part in self.parts if part.index is not None)
        return (*(part.object for part in self.parts), *indexes, self.vocabulary)


@dataclass(frozen=True)
class ExtensionRecord:
    """A plan of further data: its samples and shards stand behind those of all plans before it."""

    corpus: CorpusIdentity
    """The data of this plan; that of the first plan stands in the cache's identity."""
    first_shard: int
    """Number of its first shard in the cache, which is the number of shards planned before."""
    plan: PlanRecord
    """Numbered from 0, but for the column `shard` of its samples, which holds the cache's numbers."""

    def __post_init__(self) -> None:
        _require(self.first_shard >= 0, "first_shard", ">= 0", self.first_shard)


@dataclass(frozen=True)
class ShardRecord:
    """A committed shard: which attempt won, its objects, and a few sums over its rows."""

    shard: int
    attempt: str
    num_rows: int
    num_bytes: int
    objects: tuple[ObjectRecord, ...]
    statistics: dict[str, float]
    seconds: float
    worker: str
    created: str

    def __post_init__(self) -> None:
        _require(self.shard >= 0, "shard", ">= 0", self.shard)
        _require(0 <= self.num_rows <= MAX_SHARD_ROWS, "num_rows", f"in [0, {MAX_SHARD_ROWS}]", self.num_rows)
        _require(_ATTEMPT.fullmatch(self.attempt) is not None, "attempt", "16 lower-case hex digits", self.attempt)
        num_bytes = sum(item.size for item in self.objects)
        _require(self.num_bytes == num_bytes, "num_bytes", f"the objects' {num_bytes}", self.num_bytes)


@dataclass(frozen=True)
class ManifestRecord:
    """Where all commit records of a complete cache stand as one table (`manifest`)."""

    num_shards: int
    table: ObjectRecord

    def __post_init__(self) -> None:
        # An attempt's name is 8 random bytes, so a table of fewer for each shard is none.
        _require(0 <= 8 * self.num_shards <= self.table.size, "num_shards", "within the table", self.num_shards)


@dataclass(frozen=True)
class QuarantineRecord:
    """A shard that could not be scored, and why; removed when a later run commits the shard."""

    shard: int
    attempts: int
    reasons: tuple[str, ...] = field(default=())
    created: str = ""


def to_json(record: Any) -> Any:
    """The record as plain JSON values; fields that are None are left out."""
    return json.loads(json.dumps(_as_dict(record)))


def dump_record(record: Any) -> bytes:
    """The record as the bytes that go to the store: JSON that begins with a field `crc32c` over its own bytes.

    The checksum is that of the bytes with eight zeros in its place, so a reader in any language can check it
    without re-serialising.

    Raises:
        ValueError: a number is not finite, or the record is too long for a reader to accept.
    """
    values = {"crc32c": "00000000", **_as_dict(record)}
    data = (json.dumps(values, separators=(", ", ": "), allow_nan=False) + "\n").encode()
    if len(data) > MAX_METADATA_BYTES:
        raise InputError(
            f"{type(record).__name__} of {len(data)} bytes, readers accept {MAX_METADATA_BYTES};"
            " build with more rows per shard (--shard-rows)"
        )
    return data.replace(b"00000000", f"{google_crc32c.value(data):08x}".encode(), 1)


def load_record(cls: type[Record], data: bytes, *, where: str) -> Record:
    """Parse the bytes of one record; `where` names the object in errors.

    Raises:
        CorruptionError: the bytes are not JSON of the expected fields and types.
        MismatchError: the record is of another format version.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise CorruptionError(f"{where}: {len(data)} bytes of metadata, expected at most {MAX_METADATA_BYTES}")
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
        _check_version(values, where)
        _check_checksum(data, where)
        return parse(cls, {name: value for name, value in values.items() if name != "crc32c"}, where=where)
    except MismatchError:
        raise
    except (ValueError, RecursionError) as e:
        raise CorruptionError(f"{where}: not a valid {cls.__name__}: {e}") from e


def parse(cls: type[Record], data: Any, *, where: str) -> Record:
    """Build the record from JSON values, refusing unknown, missing and mistyped fields by name."""
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected an object with the fields of {cls.__name__}, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    if unknown := sorted(data.keys() - known.keys()):
        raise InputError(f"{where}: unknown field {unknown[0]!r} in {cls.__name__}")
    values = {}
    for name, f in known.items():
        if name in data:
            values[name] = _parse_value(hints[name], data[name], f"{where}: {name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: missing field {name!r} in {cls.__name__}")
    return cls(**values)


def parse_object_path(path: str) -> str:
    """A path below the cache: relative, of plain names; nothing that could leave the cache's folder."""
    parts = path.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", part) for part in parts):
        raise InputError(f"object path {path!r} must be relative and made of letters, digits, '_', '.', '-'")
    return path


def _as_dict(record: Any) -> dict[str, Any]:
    return dataclasses.asdict(
        record, dict_factory=lambda items: {name: value for name, value in items if value is not None}
    )


def _refuse_constant(name: str) -> float:
    raise InputError(f"the number {name} is not JSON")


def _check_version(values: Any, where: str) -> None:
    version = values.get("format_version", FORMAT_VERSION) if isinstance(values, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"{where}: format version {version!r}, this logitcache reads version {FORMAT_VERSION};"
            " read it with the release of logitcache that wrote it"
        )


def _check_checksum(data: bytes, where: str) -> None:
    found = _CHECKSUM.match(data)
    if found is None:
        raise CorruptionError(f"{where}: does not begin with a crc32c field; the file was damaged or edited")
    zeroed = data[: found.start(1)] + b"00000000" + data[found.end(1) :]
    if google_crc32c.value(zeroed) != int(found[1], 16):
        raise CorruptionError(
            f"{where}: crc32c {google_crc32c.value(zeroed):08x}, the file says {found[1].decode()};"
            " the file was damaged or edited"
        )


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type[Any], hint), value, where=where)
    origin = typing.get_origin(hint)
    if origin is types.UnionType:  # a field that may be left out; null it is never
        return _parse_value(typing.get_args(hint)[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where}: expected a list, found {type(value).__name__}")
        item = typing.get_args(hint)[0]
        return tuple(_parse_value(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected an object, found {type(value).__name__}")
        item = typing.get_args(hint)[1]
        if item is Any:
            _refuse_deep(value, where)
            return value
        return {name: _parse_value(item, v, f"{where}.{name}") for name, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def _refuse_deep(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return
    raise InputError(f"{where}: values nested more than {MAX_DEPTH} deep")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _flatten(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise InputError(f"{name} must be {expected}, got {found!r}")
