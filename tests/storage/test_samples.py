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
from logitcache_storage.samples import (
    ROWS_PER_GROUP,
    SAMPLES_SCHEMA,
    SamplesTable,
    read_vocabulary,
    target_positions,
)
from logitcache_storage.schema import BLOCK_BYTES, PlanPart, PlanRecord
from logitcache_storage.testing import FlakyStore
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA


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


def check_places(table: SamplesTable, num_samples: int) -> None:
    i, found = np.arange(num_samples), table.places()
    assert len(found) == num_samples
    for column, expected in zip(vars(found).values(), (i % 2, i // 2, 3 + i % 4, np.ones_like(i)), strict=True):
        assert np.array_equal(column, expected)
        assert column.dtype == np.uint16
    assert found[i[1:3]].shard.tolist() == (i[1:3] % 2).tolist()


def planned(tables: list[pa.Table], *, indexed: bool = True) -> tuple[ObjectStore, PlanRecord]:
    """A plan of these tables; not indexed, as early writers left it."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    if indexed:
        parts = write_samples(store, "0" * 16, iter(tables))
    else:
        objects = [write_parquet(store, f"samples/{i}.parquet", table) for i, table in enumerate(tables)]
        firsts = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
        parts = tuple(PlanPart(a, t.num_rows, o) for a, t, o in zip(firsts, tables, objects, strict=False))
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
    assert index.column_names == table.column_names()
    assert "input_ids" not in index.column_names
    check_places(table, edges[-1])
    near = {i for edge in (*edges, ROWS_PER_GROUP, 2 * ROWS_PER_GROUP) for i in (edge - 1, edge, edge + 1)}
    for sample in sorted(i for i in near if 0 <= i < edges[-1]):
        ids, positions = table.tokens(sample)
        assert np.array_equal(ids, tokens_of(sample))
        assert positions.tolist() == [2]
        assert table.key(sample) == sample.to_bytes(16, "big")
        assert table.describe([sample]) == index.slice(sample, 1).to_pylist()
    for outside in (-1, edges[-1]):
        with pytest.raises(IndexError, match=f"sample {outside} of a plan with {edges[-1]}"):
            table.tokens(outside)


def test_groups_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "KEPT_BYTES", 2 * table_of(range(1024)).nbytes)
    monkeypatch.setattr(samples, "FOOTERS_KEPT", 1)
    store, plan = planned([table_of(range(2100)), table_of(range(2100, 3500))])
    table = SamplesTable(store, plan)
    for sample in (0, 1024, 2100, 3499, 0, 5):
        assert np.array_equal(table.tokens(sample)[0], tokens_of(sample))
        assert sum(group.nbytes for group in table._groups.values()) <= samples.KEPT_BYTES
        assert table._num_kept_bytes == sum(group.nbytes for group in table._groups.values())
        assert len(table._footers) == 1
    assert len(table._groups) < 4
    again = pickle.loads(pickle.dumps(table))
    assert again._groups == {} and np.array_equal(again.tokens(7)[0], tokens_of(7))


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
    store, plan = planned(tables, indexed=False)
    with pytest.raises(CorruptionError, match=match):
        SamplesTable(store, plan).index()


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "table alone"])
@pytest.mark.parametrize(
    "change",
    [{"shard": 2}, {"shard": -1}, {"first_row": -1}, {"first_row": 2}, {"num_targets": 0}, {"num_targets": 2**31 - 1}],
)
def test_places_that_cannot_be(change: dict[str, int], indexed: bool) -> None:
    store, plan = planned([table_of(range(3), **change)], indexed=indexed)
    with pytest.raises(CorruptionError, match="points outside the shards of the plan"):
        SamplesTable(store, plan).places()


def test_parts_with_other_numbers_of_samples_than_planned() -> None:
    store, plan = planned([table_of(range(5))], indexed=False)
    more = dataclasses.replace(plan, num_samples=6, parts=(dataclasses.replace(plan.parts[0], num_samples=6),))
    with pytest.raises(CorruptionError, match="5 samples, the plan says 6"):
        SamplesTable(store, more).index()
    with pytest.raises(CorruptionError, match="5 samples in row group 0, expected 6"):
        SamplesTable(store, more).tokens(5)
    many = dataclasses.replace(plan, num_samples=5000, parts=(dataclasses.replace(plan.parts[0], num_samples=5000),))
    with pytest.raises(CorruptionError, match="0 samples in row group 4, expected 904"):
        SamplesTable(store, many).tokens(4999)
    for read in (SamplesTable(store, many).places, lambda: SamplesTable(store, many).find("00")):
        with pytest.raises(CorruptionError, match="5 samples, the plan says 5000"):
            read()


def test_parts_without_an_index_give_the_same_places() -> None:
    tables = [table_of(range(1500)), table_of(range(1500, 1503))]
    check_places(SamplesTable(*planned(tables, indexed=False)), 1503)


def test_places_are_as_wide_as_they_must() -> None:
    """One wide value in the second part widens its column and keeps what was read before."""
    tables = [table_of(range(3)), table_of(range(3, 5), num_tokens=65_536), table_of(range(5, 8), num_tokens=65_535)]
    found = SamplesTable(*planned(tables)).places()
    assert found.num_tokens.tolist() == [3, 4, 5, 65_536, 65_536, 65_535, 65_535, 65_535]
    assert (found.num_tokens.dtype, found.shard.dtype) == (np.int32, np.uint16)


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_are_found_by_the_beginning_of_their_key(indexed: bool) -> None:
    table = SamplesTable(*planned([table_of(range(300)), table_of(range(300, 700))], indexed=indexed))
    keys = [sample.to_bytes(16, "big") for sample in range(700)]
    for wanted in (
        "0" * 29,
        "0" * 30,
        "0" * 31,
        "0" * 29 + "1",
        "0" * 30 + "1",
        "0" * 29 + "12",
        "0" * 29 + "1f4",
        "1",
    ):
        expected = [(i, key) for i, key in enumerate(keys) if key.hex().startswith(wanted)]
        assert table.find(wanted) == expected
    assert len(table.find("000000")) == 700


def test_a_plan_of_more_samples_than_there_are_bytes_takes_no_memory() -> None:
    store, plan = planned([table_of(range(5))], indexed=False)
    for n in (2**36, 2**40, 2**61, 2**70):
        part = dataclasses.replace(plan.parts[0], num_samples=n)
        with pytest.raises(CorruptionError):
            SamplesTable(store, dataclasses.replace(plan, num_samples=n, parts=(part,))).places()


class Watched(FlakyStore):
    """Counts what is asked of it."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner, set())
        self.ranges: list[tuple[int, int]] = []
        self.num_whole = 0

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        return self._store.get_range(path, start, stop)

    def get(self, path: str) -> bytes:
        self.num_whole += 1
        return self._store.get(path)

    def get_many(self, paths: list[str]) -> list[bytes]:
        self.num_whole += len(paths)
        return self._store.get_many(paths)


def test_the_vocabulary_is_read_in_one_request() -> None:
    """It has a row group for every 1,024 words; a remote store takes its time for each request."""
    rng = np.random.default_rng(0)
    words = [rng.bytes(20).hex() for _ in range(20_000)]
    texts, special = [word.encode() for word in words], [False] * len(words)
    store = Watched(open_store(f"memory://{uuid.uuid4().hex}"))
    table = pa.table({"token": words, "text": texts, "special": special}, schema=VOCABULARY_SCHEMA)
    record = write_parquet(store, "vocabulary/x", table)
    assert record.size > 2 * BLOCK_BYTES
    assert read_vocabulary(store, record, len(words)).equals(table)
    assert (store.num_whole, store.ranges) == (1, [])


def test_a_group_is_read_in_one_request() -> None:
    """A remote store takes its time for each; the footer is read once for all groups of a part."""

    rng = np.random.default_rng(0)
    table = table_of(range(3000))
    ids = pa.array([rng.integers(10**9, size=300, dtype=np.int32) for _ in range(3000)], pa.list_(pa.int32()))
    store, plan = planned([table.set_column(6, "input_ids", ids)])
    watched = Watched(store)
    samples_table = SamplesTable(watched, plan)
    samples_table.tokens(0)
    before, size = len(watched.ranges), plan.parts[0].object.size
    samples_table.tokens(2000)
    samples_table.tokens(1100)
    assert len(watched.ranges) == before + 1
    start, stop = watched.ranges[-1]
    assert stop - start < 0.6 * size  # a third, and up to a block at each end


def test_parts_that_are_no_parquet() -> None:
    store, plan = planned([table_of(range(5))], indexed=False)
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
