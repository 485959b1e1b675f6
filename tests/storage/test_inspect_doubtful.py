"""Doubtful labels against a loop over all rows; what a spreadsheet and a trainer get of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import threading
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.inspect import doubtful_reading
from logitcache_storage.inspect.doubtful import (
    CSV_COLUMNS,
    csv_lines,
    csv_parts,
    doubtful_positions,
    parquet_parts,
    write_columns,
    write_csv,
)
from logitcache_storage.inspect.doubtful_reading import DoubtfulPosition, Reading
from logitcache_storage.objects import open_store
from logitcache_storage.progress import progress
from logitcache_storage.sample_statistics import SampleTable, load_statistics
from logitcache_storage.statistics import row_statistics
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.visible import SPACE

SAMPLES, TOPKS = make_samples(150, 3, 40, seed=9)
WORDS = ["=1+1", "-2", "@x", "a,b", '"', "\n", " ", "\x1b[2J", *(f"w{i} " for i in range(32))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    url = str(tmp_path_factory.mktemp("doubtful"))
    identity = make_identity(k=3, vocab_size=40, shard_rows=200, container="arrow")
    write_cache(url, SAMPLES, TOPKS, identity=identity, vocabulary=WORDS)
    return Cache.open(url)


@pytest.fixture(scope="module")
def table(cache: Cache) -> SampleTable:
    return load_statistics(cache)


def expected_positions(cache: Cache, min_probability: float) -> list[tuple[float, float, int, int]]:
    """(- probability, label log-prob, sample, row) of all, in order."""
    found = []
    for index, sample in enumerate(cache):
        for row, label in enumerate(sample.labels.tolist()):
            probability = float(np.float32(math.exp(sample.topk.log_probs[row, 0])))
            is_kept = label in sample.topk.ids[row, : sample.topk.num_kept[row]].tolist()
            if not is_kept and probability >= min_probability:
                found.append((-probability, float(sample.topk.label_log_prob[row]), index, row))
    return sorted(found)


def key_of(found: DoubtfulPosition) -> tuple[float, float, int, int]:
    return (-found.choice_probability, found.label_log_prob, found.index, found.row)


@pytest.mark.parametrize("min_probability", [0.3, 0.6, 0.95, 1.0])
def test_against_a_loop(cache: Cache, table: SampleTable, min_probability: float) -> None:
    expected = expected_positions(cache, min_probability)
    found = doubtful_positions(cache, table, min_probability=min_probability, limit=None)
    assert np.allclose(np.array([key_of(p) for p in found.positions]), np.array(expected), rtol=1e-6, atol=0)
    assert len(found.positions) == len(expected)
    assert found.is_complete and not found.problems
    assert found.num_samples == len({index for _, _, index, _ in expected})
    for limit in (0, 1, 5, 40):
        first = doubtful_positions(cache, table, min_probability=min_probability, limit=limit)
        assert list(first.positions) == list(found.positions[:limit])
        assert first.is_complete == (len(expected) <= limit)
        assert first.num_samples == found.num_samples
    assert min_probability == 1.0 or found.positions


def test_a_position_says_what_it_is(cache: Cache, table: SampleTable) -> None:
    found = doubtful_positions(cache, table, min_probability=0.5, limit=3).positions[2]
    sample = cache[found.index]
    assert (found.key, found.source_id) == (sample.key, sample.source_id)
    assert found.label["id"] == sample.labels[found.row] == sample.input_ids[found.position]
    assert found.label["text"].encode() == cache.vocabulary.text(found.label["id"])
    assert found.choice["id"] == sample.topk.ids[found.row, 0]
    assert found.entropy == row_statistics(sample.topk, sample.labels).entropy[found.row]


def test_few_rows_are_read(cache: Cache, table: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = reads_of(monkeypatch)
    found = doubtful_positions(cache, table, min_probability=0.01, limit=5)
    assert len(found.positions) == 5 and found.num_samples > 100 and sum(map(len, reads)) <= 64


def test_where_all_are_wanted_neighbours_are_read_together(
    cache: Cache, table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = reads_of(monkeypatch)
    with progress("reading", quiet=True) as meter:
        found = doubtful_positions(cache, table, min_probability=0.01, limit=None, meter=meter)
    assert meter.completed == found.num_samples == sum(map(len, reads)) > 100
    assert len(reads) == len(cache.shards) > 1
    reads.clear()
    write_columns(cache, table, str(tmp_path / "weights.parquet"), min_probability=0.01)
    assert len(reads) == len(cache.shards)


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Which samples are read together, from now on."""
    reads: list[list[int]] = []
    read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda self, indices: (reads.append(list(indices)), read(self, indices))[1])
    return reads


@pytest.mark.parametrize("min_probability", [0.0, -1.0, 1.1, math.nan])
def test_no_probability(cache: Cache, table: SampleTable, min_probability: float) -> None:
    with pytest.raises(InputError, match=r"a probability of .*; give one above 0 and up to 1"):
        doubtful_positions(cache, table, min_probability=min_probability)


def test_a_spreadsheet(cache: Cache, table: SampleTable) -> None:
    found = doubtful_positions(cache, table, min_probability=0.01, limit=None).positions
    sink = io.StringIO()
    write_csv(found, sink)
    assert sink.getvalue() == "".join(csv_lines(found))
    rows = list(csv.DictReader(io.StringIO(sink.getvalue())))
    assert len(rows) == len(found) and tuple(rows[0]) == CSV_COLUMNS
    assert "\x1b" not in sink.getvalue()
    for row, position in zip(rows, found, strict=True):
        assert int(row["label_id"]) == position.label["id"] and row["key"] == position.key
        assert float(row["choice_probability"]) == pytest.approx(position.choice_probability, rel=1e-5)
        assert row["label"][:1] not in ("=", "+", "-", "@") and row["choice"][:1] not in ("=", "+", "-", "@")
    labels = {row["label"] for row in rows}
    assert {"'=1+1", "'-2", "'@x", "a,b", '"', r"\n", SPACE, r"\x1b[2J"} <= labels


def test_files_are_sent_while_they_are_made(
    cache: Cache, table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.parquet"
    write_columns(cache, table, path, min_probability=0.3)
    found = doubtful_positions(cache, table, min_probability=0.3, limit=None)
    reads = reads_of(monkeypatch)
    parts = csv_parts(Reading(cache, table, 0.3))
    assert next(parts) == ",".join(CSV_COLUMNS) + "\n" and not reads
    assert next(parts) == "" and reads
    assert "".join(parts) == "".join(itertools.islice(csv_lines(found.positions), 1, None))
    assert b"".join(parquet_parts(Reading(cache, table, 0.3))) == path.read_bytes()


def test_whoever_leaves_stops_the_reading(cache: Cache, table: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubtful_reading, "ROWS_AT_ONCE", 1)  # and so as many runs as samples
    monkeypatch.setattr(doubtful_reading, "NUM_READERS", 1)
    reads, go_on = reads_of(monkeypatch), threading.Semaphore(2)
    read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda self, indices: (go_on.acquire(timeout=10), read(self, indices))[1])
    parts = csv_parts(Reading(cache, table, 0.01))
    assert next(parts) and next(parts) == ""
    go_on.release()
    assert isinstance(parts, Generator)
    parts.close()
    assert len(reads) <= 3 < len(cache)


@pytest.mark.parametrize("min_probability", [0.3, 1.0])
def test_weights_for_training(cache: Cache, table: SampleTable, tmp_path: Path, min_probability: float) -> None:
    path = tmp_path / "doubts.parquet"
    count = write_columns(cache, table, str(path), min_probability=min_probability, name="trust")
    rows = pq.read_table(path).to_pylist()
    doubtful = {(index, row) for _, _, index, row in expected_positions(cache, min_probability)}
    assert count == len(doubtful)
    for index, (row, sample) in enumerate(itertools.zip_longest(rows, cache)):
        assert row["key"].hex() == sample.key
        assert row["trust"] == [0 if (index, m) in doubtful else 1 for m in range(len(sample.labels))]


def test_what_cannot_be_read(cache: Cache, tmp_path: Path) -> None:
    """A shard is damaged after its statistics were loaded, then before."""
    whole, store = (
        {path: open_store(cache.store.url).get(path) for path in cache.store.list("")},
        open_store(str(tmp_path)),
    )
    for path, data in whole.items():
        store.put(path, data)
    opened = Cache.open(store.url)
    table = load_statistics(opened)
    good = doubtful_positions(opened, table, min_probability=0.5, limit=None)
    for item in opened.shards[1].objects:
        store.put(item.path, b"\0" * item.size)
    found = doubtful_positions(opened, table, min_probability=0.5, limit=None)
    in_shard = {p for p in map(key_of, good.positions) if opened.index.shard[p[2]] == 1}
    assert in_shard and set(map(key_of, good.positions)) - in_shard == set(map(key_of, found.positions))
    assert len(found.problems) == 1 and "shards/00001-" in found.problems[0]
    *lines, last = csv.reader("".join(csv_parts(Reading(opened, table, 0.5))).splitlines())
    assert len(lines) == 1 + len(found.positions) and last == [f"NOT READ: {found.problems[0]}"]
    with pytest.raises(CorruptionError, match="shards/00001-"):
        write_columns(opened, table, str(tmp_path / "weights.parquet"), min_probability=0.5)
    table = load_statistics(opened)
    again = doubtful_positions(opened, table, min_probability=0.5, limit=None)
    assert list(again.positions) == list(found.positions)
    with pytest.raises(CorruptionError, match=r"not every sample is known: .*shards/00001-"):
        write_columns(opened, table, str(tmp_path / "weights.parquet"), min_probability=0.5)


def test_plain_values() -> None:
    """They go into JSON and pages as they are."""
    assert {f.type for f in dataclasses.fields(DoubtfulPosition)} <= {"int", "float", "str", "dict[str, Any]"}
