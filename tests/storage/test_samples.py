"""The samples table: parts of any size, tokens by sample, and tables that are not what the plan says."""

from __future__ import annotations

import dataclasses
import pickle
import uuid
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from logitcache_storage import samples
from logitcache_storage.committed import object_record
from logitcache_storage.errors import CorruptionError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import commit_plan, write_parquet, write_samples
from logitcache_storage.samples import ROWS_PER_GROUP, SAMPLES_SCHEMA, SamplesTable, target_positions
from logitcache_storage.schema import PlanRecord


def tokens_of(sample: int) -> np.ndarray:
    return np.arange(sample, sample + 3 + sample % 4, dtype=np.int32)


def table_of(numbers: range, **changes: object) -> pa.Table:
    rows = [
        {
            "key": sample.to_bytes(16, "big"),
            "source_id": f"test:{sample}",
            "shard": sample % 2,
            "first_row": sample // 2,
            "num_tokens": 3 + sample % 4,
            "num_targets": 1,
            "input_ids": tokens_of(sample),
            "target_ranges": [2, 3],
            **changes,
        }
        for sample in numbers
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)


def planned(tables: list[pa.Table]) -> tuple[ObjectStore, PlanRecord]:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    parts = write_samples(store, "0" * 16, iter(tables))
    num_samples = sum(table.num_rows for table in tables)
    sizes = (-(-num_samples // 2), num_samples // 2)
    vocabulary = write_parquet(store, "vocabulary/x.parquet", pa.table({"text": []}))
    return store, commit_plan(store, PlanRecord(num_samples, 0, num_samples, sizes, {}, parts, vocabulary))


@pytest.mark.parametrize("sizes", [[], [1], [1023, 1], [1024, 1025], [5, 2049, 1, 7], [2500]])
def test_parts_of_any_size(sizes: list[int]) -> None:
    edges = np.cumsum([0, *sizes]).tolist()
    store, plan = planned([table_of(range(a, b)) for a, b in pairwise(edges)])
    table = SamplesTable(store, plan)
    index = table.index()
    assert index.column("source_id").to_pylist() == [f"test:{i}" for i in range(edges[-1])]
    assert "input_ids" not in index.column_names
    near = {i for edge in (*edges, ROWS_PER_GROUP, 2 * ROWS_PER_GROUP) for i in (edge - 1, edge, edge + 1)}
    for sample in sorted(i for i in near if 0 <= i < edges[-1]):
        ids, positions = table.tokens(sample)
        assert np.array_equal(ids, tokens_of(sample))
        assert positions.tolist() == [2]
    for outside in (-1, edges[-1]):
        with pytest.raises(IndexError, match=f"sample {outside} of a plan with {edges[-1]}"):
            table.tokens(outside)


def test_token_groups_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "TOKEN_GROUPS_KEPT", 2)
    store, plan = planned([table_of(range(2100)), table_of(range(2100, 3500))])
    table = SamplesTable(store, plan)
    for sample in (0, 1024, 2100, 3499, 0, 5):
        assert np.array_equal(table.tokens(sample)[0], tokens_of(sample))
        assert len(table._token_groups) <= 2
    assert pickle.loads(pickle.dumps(table))._token_groups == {}


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ([table_of(range(3), shard=2)], "points outside the shards of the plan"),
        ([table_of(range(3), shard=-1)], "points outside the shards of the plan"),
        ([table_of(range(3), first_row=-1)], "points outside the shards of the plan"),
        ([table_of(range(3), first_row=2)], "points outside the shards of the plan"),
        ([table_of(range(3), num_targets=0)], "points outside the shards of the plan"),
        ([table_of(range(3), first_row=2**31 - 1, num_targets=2**31 - 1)], "points outside the shards"),
        ([table_of(range(3)).drop_columns(["key"])], "without a column 'key' of fixed_size_binary"),
        ([table_of(range(3)).append_column("x", pa.array([1, 2, 3])), table_of(range(3, 5))], "parts .* differ"),
    ],
)
def test_tables_that_cannot_be(tables: list[pa.Table], match: str) -> None:
    store, plan = planned(tables)
    with pytest.raises(CorruptionError, match=match):
        SamplesTable(store, plan).index()


def test_parts_with_other_numbers_of_samples_than_planned() -> None:
    store, plan = planned([table_of(range(5))])
    more = dataclasses.replace(plan, num_samples=6, parts=(dataclasses.replace(plan.parts[0], num_samples=6),))
    with pytest.raises(CorruptionError, match="5 samples, the plan says 6"):
        SamplesTable(store, more).index()
    with pytest.raises(CorruptionError, match="5 samples in row group 0, expected 6"):
        SamplesTable(store, more).tokens(5)
    many = dataclasses.replace(plan, num_samples=5000, parts=(dataclasses.replace(plan.parts[0], num_samples=5000),))
    with pytest.raises(CorruptionError, match="not the Parquet file it should be"):
        SamplesTable(store, many).tokens(4999)


def test_parts_that_are_no_parquet() -> None:
    store, plan = planned([table_of(range(5))])
    for data in (b"", b"PAR1", b"\x00" * 500):
        store.put("samples/x", data)
        part = dataclasses.replace(plan.parts[0], object=object_record("samples/x", data))
        with pytest.raises(CorruptionError, match="samples/x: not the Parquet file it should be"):
            SamplesTable(store, dataclasses.replace(plan, parts=(part,))).index()


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [([], []), ([1, 2], [1]), ([1, 4, 4, 6, 9, 10], [1, 2, 3, 4, 5, 9]), ([3, 3, 5, 7], [5, 6])],
)
def test_target_positions(ranges: list[int], expected: list[int]) -> None:
    found = target_positions(np.asarray(ranges, dtype=np.int32))
    assert found.dtype == np.int32
    assert found.tolist() == expected
