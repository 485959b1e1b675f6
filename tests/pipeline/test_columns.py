"""Column types: the join over all values, whatever their order."""

from __future__ import annotations

import datetime
import json
import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache_pipeline.columns import (
    JSON_COLUMN,
    ColumnTypes,
    canonical_json,
    column_array,
    extra_columns,
)
from logitcache_storage.errors import CorpusError


def schema_of(values: list) -> pa.Schema:
    types = ColumnTypes()
    for value in values:
        types.add({"x": value})
    return types.schema()


@pytest.mark.parametrize(
    ("values", "expected", "is_json"),
    [
        ([True, False], pa.bool_(), False),
        ([1, -5, 2**63 - 1, -(2**63)], pa.int64(), False),
        ([1, 2.5], pa.float64(), False),
        (["a", ""], pa.string(), False),
        ([[1], [], [2, 3]], pa.list_(pa.int64()), False),
        ([[1], [0.5], []], pa.list_(pa.float64()), False),
        ([[]], pa.list_(pa.int64()), False),
        ([None], pa.string(), False),
        ([None, 3], pa.int64(), False),
        ([True, 1], pa.string(), True),
        ([1, "1"], pa.string(), True),
        ([1, [1]], pa.string(), True),
        ([2**63], pa.string(), True),
        ([[2**63]], pa.string(), True),
        ([[True]], pa.string(), True),
        ([["a"]], pa.string(), True),
        ([[1, None]], pa.string(), True),
        ([{"a": 1}], pa.string(), True),
        ([datetime.date(2024, 1, 2)], pa.string(), True),
    ],
)
def test_type_of_a_column(values, expected, is_json):
    field = schema_of(values).field("x")
    assert field.type == expected
    assert (field.metadata == JSON_COLUMN) == is_json
    array = column_array(values, field)
    array.validate(full=True)
    if is_json:
        assert array.to_pylist() == [canonical_json(v) for v in values]
    else:
        assert array.to_pylist() == values


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.one_of(st.integers(-(2**64), 2**64), st.floats(allow_nan=False))),
    st.dictionaries(st.text("ab"), st.integers()),
)


@given(st.lists(VALUES, min_size=1), st.randoms(use_true_random=False))
def test_type_does_not_depend_on_order_and_holds_every_value(values: list, rng: random.Random):
    shuffled = list(values)
    rng.shuffle(shuffled)
    schema = schema_of(values)
    assert schema.equals(schema_of(shuffled), check_metadata=True)
    found = column_array(values, schema.field("x")).to_pylist()
    if schema.field("x").metadata == JSON_COLUMN:
        found = [None if text is None else json.loads(text) for text in found]
    elif schema.field("x").type in (pa.float64(), pa.list_(pa.float64())):
        values = [[float(x) for x in v] if isinstance(v, list) else v if v is None else float(v) for v in values]
    assert found == values


def test_columns_are_sorted_and_text_fields_left_out():
    types = ColumnTypes()
    types.add({"z": 1, "prompt": "p", "a": 2})
    types.add({"m": "later"})
    assert types.schema().names == ["a", "m", "prompt", "z"]
    assert extra_columns(types.schema(), ("prompt",)).names == ["a", "m", "z"]


def test_a_value_of_another_type_than_surveyed_is_refused():
    with pytest.raises(CorpusError, match=r"column 'x': expected int64 as surveyed.*changed"):
        column_array(["text"], pa.field("x", pa.int64()))
