"""Records as JSON: how a frozen dataclass becomes the bytes of one object, and is parsed and checked field by field.

Nothing is guessed: an unknown, missing or mistyped field, a number that is not JSON, another format version or a wrong
checksum is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import google_crc32c

from logitcache_storage.errors import CorruptionError, InputError, MismatchError

FORMAT_VERSION = 1
MAX_METADATA_BYTES = 1 << 28
MAX_DEPTH = 32
"""Of free-form values within a record."""

_CHECKSUM = re.compile(rb'\{"crc32c": "([0-9a-f]{8})"')

Record = TypeVar("Record")


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
    hints = _type_hints(typing.cast(Any, cls))
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


@functools.cache
def _type_hints(cls: type[Any]) -> dict[str, Any]:
    """Of a record's fields: to find them out costs as much as to parse a record, of which there may be 100,000."""
    return typing.get_type_hints(cls)


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
