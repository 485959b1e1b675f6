"""The metadata of a cache: frozen records, parsed and validated field by field.

Every record is plain JSON on the store (`record_json`); `storage/SPEC.md` lists each field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from logitcache_storage.errors import InputError
from logitcache_storage.record_json import FORMAT_VERSION, to_json

BLOCK_BYTES = 1 << 18
"""Every object carries one CRC-32C per block of this many bytes, so that a range read is verified too."""
INDEX_BYTES = 32
"""Of one sample in the index of a part of the samples table."""
MAX_SHARD_ROWS = (1 << 31) - 1
"""Rows of a shard are counted in int32."""
STATISTICS_SUFFIX = ".statistics"
"""What the path of a shard's statistics ends with (`statistics_object`), and that of no object of its rows."""
PRECISIONS = ("u8", "u10", "fp16", "fp32")
CONTAINERS = ("zarr", "arrow")
ID_LAYOUTS = ("plain", "ascending", "split")
MAX_SPLIT_VOCAB = 1 << 24
"""The id layout `split` has 24 bits for an id."""

_ATTEMPT = re.compile("[0-9a-f]{16}")
_KEY = re.compile("[0-9a-f]{32}")


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
    """Kept ids per row; 0: only the label's log-prob is kept, in caches of other roles than teacher."""
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
        least = 1 if self.role == "teacher" else 0
        _require(
            least <= self.k <= self.vocab_size,
            "k",
            f"between {least} and the vocabulary size {self.vocab_size} in a cache of role {self.role!r}",
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
class ExcludedSample:
    """A planned sample that could not be scored, of a shard that is committed without its rows."""

    first_row: int
    """Where its rows would stand, if every sample of the shard had been scored."""
    num_rows: int
    key: str
    source_ids: tuple[str, ...]
    """Of all records that became this sample: those of equal tokens share its rows."""
    reason: str

    def __post_init__(self) -> None:
        rows = self.first_row, self.num_rows
        _require(0 <= rows[0] <= MAX_SHARD_ROWS, "first_row", f"in [0, {MAX_SHARD_ROWS}]", rows[0])
        _require(1 <= rows[1] <= MAX_SHARD_ROWS, "num_rows", f"in [1, {MAX_SHARD_ROWS}]", rows[1])
        _require(_KEY.fullmatch(self.key) is not None, "key", "32 lower-case hex digits", self.key)


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
    excluded: tuple[ExcludedSample, ...] | None = None
    """Samples whose rows it lacks, in the order of those; None: it holds every row that was planned."""

    def __post_init__(self) -> None:
        _require(self.shard >= 0, "shard", ">= 0", self.shard)
        _require(0 <= self.num_rows <= MAX_SHARD_ROWS, "num_rows", f"in [0, {MAX_SHARD_ROWS}]", self.num_rows)
        _require(_ATTEMPT.fullmatch(self.attempt) is not None, "attempt", "16 lower-case hex digits", self.attempt)
        num_bytes = sum(item.size for item in self.objects)
        _require(self.num_bytes == num_bytes, "num_bytes", f"the objects' {num_bytes}", self.num_bytes)
        reached = 0
        for i, sample in enumerate(self.excluded or ()):
            _require(sample.first_row >= reached, f"excluded[{i}].first_row", f">= {reached}", sample.first_row)
            reached = sample.first_row + sample.num_rows

    @property
    def num_planned_rows(self) -> int:
        """Rows that the plan gives the shard."""
        return self.num_rows + sum(sample.num_rows for sample in self.excluded or ())

    @property
    def row_objects(self) -> tuple[ObjectRecord, ...]:
        """The objects that hold its rows: all but its statistics."""
        return tuple(item for item in self.objects if not item.path.endswith(STATISTICS_SUFFIX))

    @property
    def statistics_object(self) -> ObjectRecord | None:
        """The object with the statistics of its samples; None where it was committed without."""
        return next((item for item in self.objects if item.path.endswith(STATISTICS_SUFFIX)), None)


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


def parse_object_path(path: str) -> str:
    """A path below the cache: relative, of plain names; nothing that could leave the cache's folder."""
    parts = path.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", part) for part in parts):
        raise InputError(f"object path {path!r} must be relative and made of letters, digits, '_', '.', '-'")
    return path


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _flatten(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise InputError(f"{name} must be {expected}, got {found!r}")
