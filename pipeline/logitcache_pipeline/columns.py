"""A corpus's own columns: which arrow type each has, and how its values become an arrow array.

The type of a column is the join over all its values, so it depends neither on the order of records nor on the
container they stand in:

    null < bool < json        null < string < json        null < int < float < json
    null < [] < [int] < [float] < json
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from logitcache_storage.errors import CorpusError

JSON_COLUMN = {b"encoding": b"json"}
"""Field metadata of a string column whose every value is JSON: the corpus mixes or nests types there."""

_TYPES = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "[]": pa.list_(pa.int64()),
    "[int]": pa.list_(pa.int64()),
    "[float]": pa.list_(pa.float64()),
    "json": pa.string(),
}
_CHAINS = (("int", "float"), ("[]", "[int]", "[float]"))
_SCALARS = {type(None): "null", bool: "bool", float: "float", str: "string"}
_INT64 = range(-(2**63), 2**63)
# default=str: Parquet has values that JSON has no type for (dates, decimals, bytes).
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces; dates, decimals and bytes as their `str`."""
    return _ENCODER.encode(value)


class ColumnTypes:
    """Collects the type of every column over the records it is shown."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}

    def add(self, data: Mapping[str, Any]) -> None:
        """Take the values of one record into account."""
        for name, value in data.items():
            known = self._kinds.get(name, "null")
            if known != "json":
                self._kinds[name] = _join(known, _kind(value))

    def schema(self) -> pa.Schema:
        """One field per column, sorted by name; JSON columns carry the metadata `JSON_COLUMN`."""
        fields = [
            pa.field(name, _TYPES[kind], metadata=JSON_COLUMN if kind == "json" else None)
            for name, kind in sorted(self._kinds.items())
        ]
        return pa.schema(fields)


def extra_columns(columns: pa.Schema, text_fields: Collection[str]) -> pa.Schema:
    """The columns that are carried along: all but those that became text."""
    return pa.schema([field for field in columns if field.name not in text_fields])


def column_array(values: Sequence[Any], field: pa.Field) -> pa.Array:
    """Values of one column, None where a record lacks it, as an array of the field's type.

    Raises:
        CorpusError: a value does not fit the type, which held for the whole corpus: it has changed since.
    """
    if field.metadata == JSON_COLUMN:
        values = [None if value is None else canonical_json(value) for value in values]
    elif field.type == pa.float64():
        values = [None if value is None else float(value) for value in values]
    elif field.type == pa.list_(pa.float64()):
        values = [None if value is None else [float(v) for v in value] for value in values]
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowException, OverflowError) as e:
        raise CorpusError(
            f"column {field.name!r}: expected {field.type} as surveyed: {e};"
            " the corpus has changed since its survey, run again once it is at rest"
        ) from e


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if value in _INT64 else "json"
    if isinstance(value, list):
        return _list_kind(value)
    return _SCALARS.get(type(value), "json")


def _list_kind(values: list[Any]) -> str:
    types = set(map(type, values))
    if not types:
        return "[]"
    if not types <= {int, float} or not all(v in _INT64 for v in values if type(v) is int):
        return "json"
    return "[float]" if float in types else "[int]"


def _join(a: str, b: str) -> str:
    if a == b or b == "null":
        return a
    if a == "null":
        return b
    for chain in _CHAINS:
        if a in chain and b in chain:
            return max(a, b, key=chain.index)
    return "json"
