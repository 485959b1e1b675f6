"""Caches whose shards lack samples that could not be scored, against the same cache with all of them."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache_storage import Cache, sample_statistics
from logitcache_storage.cli import main
from logitcache_storage.commit import MANIFEST_PATH, commit_path, load_commit, load_commits, load_manifest
from logitcache_storage.compare import compare_caches
from logitcache_storage.copying import copy_cache
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.export import export_cache
from logitcache_storage.garbage import find_garbage
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.record_json import dump_record
from logitcache_storage.repair import repair_cache, restore_commits, set_aside
from logitcache_storage.stats import choose_shards, distributions, total
from logitcache_storage.status import build_status
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

NUM_SAMPLES = 40
SAMPLES, TOPKS = make_samples(NUM_SAMPLES, 6, 30, seed=1)
IDENTITY = make_identity(k=6, vocab_size=30, shard_rows=50, precision="fp32")
LACKING = {0: "first of its shard", 3: "raises", 4: "kills", 21: "hangs"}
THERE = [i for i in range(NUM_SAMPLES) if i not in LACKING]


def write(url: str = "", commit_shards: int | None = None, excluded: dict[int, str] | None = None) -> str:
    """Write a cache, or continue it; returns its URL."""
    url, excluded = url or f"memory://{uuid.uuid4().hex}", LACKING if excluded is None else excluded
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY, excluded=excluded, commit_shards=commit_shards)
    return url


def numbers(cache: Cache) -> list[int]:
    """Which of our samples are in a cache."""
    return [int(name.removeprefix("test:")) - 1 for name in cache.samples.column("source_id").to_pylist()]


def check(cache: Cache, expected: list[int]) -> None:
    """Every way to a sample leads to these and their rows, and to no other."""
    assert numbers(cache) == expected and len(cache) == len(expected)
    for i, (sample, number) in enumerate(zip(cache, expected, strict=True)):
        assert np.array_equal(sample.input_ids, SAMPLES[number][0])
        assert sample.topk.equals(TOPKS[number])
        assert cache.index_of(sample.key) == i
        rows = slice(*(int(cache.index.first_row[i]) + n for n in (0, int(cache.index.num_targets[i]))))
        assert cache.read_shard(int(cache.index.shard[i]))[rows].equals(TOPKS[number])
    assert cache.samples.column("first_row").to_pylist() == cache.index.first_row.tolist()
    assert [about["first_row"] for about in cache.describe(range(len(cache)))] == cache.index.first_row.tolist()
    assert len(cache.keys()) == len(expected)


@pytest.fixture
def store() -> ObjectStore:
    return open_store(write())


def test_excluded_samples_are_nowhere(store):
    cache = Cache.open(store.url)
    check(cache, THERE)
    whole = Cache.open(write(excluded={}))
    for number in LACKING:
        with pytest.raises(InputError, match="no sample has"):
            cache.index_of(whole[number].key)
    assert cache.is_complete
    assert {s.reason for samples in cache.excluded.values() for s in samples} == set(LACKING.values())


def test_commit_records_say_what_the_manifest_says(store):
    manifest = load_manifest(store)
    assert manifest is not None and manifest.excluded
    store.delete(MANIFEST_PATH)
    assert dict(load_commits(store)) == dict(manifest)
    check(Cache.open(store.url), THERE)


def test_beside_shards_that_are_not_committed():
    url = write(commit_shards=2)
    found = numbers(Cache.open(url))
    assert found == [i for i in THERE if i <= found[-1]] and 4 < found[-1] < 20
    check(Cache.open(url), found)
    write(url)
    check(Cache.open(url), THERE)


def test_from_a_local_disk_cache(store, tmp_path):
    cache = Cache.open(store.url, disk_cache=DiskCache(tmp_path / "local", 10_000_000))
    for _ in range(2):
        check(cache, THERE)


def test_a_deep_check_finds_nothing_wrong(store):
    report = verify_cache(store, deep=True)
    assert report.is_intact and report.num_rows == sum(len(TOPKS[i]) for i in THERE)


@pytest.mark.parametrize("change", [{"num_rows": 0}, {"num_rows": 2**31}, {"first_row": -1}, {"key": "x"}])
def test_records_that_cannot_be(store, change):
    excluded = load_commit(store, 0).excluded
    assert excluded is not None
    with pytest.raises(InputError, match=f"^{next(iter(change))} must be"):
        replace(excluded[0], **change)
    with pytest.raises(InputError, match=r"^excluded\[1\].first_row must be"):
        replace(load_commit(store, 0), excluded=(excluded[1], excluded[0]))


@pytest.mark.parametrize("change", [{"first_row": 1}, {"num_rows": 1}, {"key": "0" * 32}])
def test_a_record_that_excludes_what_is_not_planned_is_damage(store, change):
    """The first shard lacks samples 0, 3 and 4."""
    store.delete(MANIFEST_PATH)
    record = load_commit(store, 0)
    assert record.excluded is not None
    first = replace(record.excluded[0], **change)
    store.put(commit_path(0), dump_record(replace(record, excluded=(first, *record.excluded[1:]))))
    assert not verify_cache(store, deep=True).is_intact
    if "key" not in change:
        with pytest.raises(CorruptionError):
            Cache.open(store.url)


def test_statistics_are_of_the_rows_that_are_there(store):
    cache = Cache.open(store.url)
    found = distributions(cache, choose_shards(cache.shards))
    labels = np.concatenate([TOPKS[i].label_log_prob for i in THERE])
    assert found.num_rows == len(labels) == total(cache.shards.values()).num_rows
    assert found.quantiles["label_log_prob"]["p50"] == pytest.approx(np.quantile(labels, 0.5))
    assert total(cache.shards.values()).label_log_prob == pytest.approx(labels.mean(dtype=np.float64))


@pytest.mark.parametrize("are_stored", [True, False])
def test_statistics_stand_beside_their_samples(store, are_stored, monkeypatch, tmp_path):
    """Also where they are computed from the rows, as for caches of early writers."""
    if not are_stored:
        monkeypatch.setattr(sample_statistics, "read_statistics", lambda cache, record: None)
        monkeypatch.setattr(sample_statistics, "_stored", lambda cache, records: {})
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = sample_statistics.load_statistics(Cache.open(store.url))
    assert table.known.all() and not table.problems
    expected = [TOPKS[i].label_log_prob.mean() for i in THERE]
    np.testing.assert_allclose(table.column("mean_label_log_prob"), expected, rtol=1e-6)


def test_a_comparison_names_what_one_cache_lacks(store):
    whole = Cache.open(write(excluded={}))
    found = compare_caches(Cache.open(store.url), whole)
    assert (found.num_samples, found.only_a.num_samples, found.only_b.num_samples) == (len(THERE), 0, len(LACKING))
    assert found.only_b.examples == tuple(f"test:{i + 1}" for i in LACKING)
    assert found.kl_ab == found.label_distance == 0


def test_copies_and_exports_hold_what_is_there(store):
    target, output = (open_store(f"memory://{uuid.uuid4().hex}") for _ in range(2))
    assert copy_cache(store, target).is_complete
    check(Cache.open(target.url), THERE)
    exported = export_cache(Cache.open(store.url), output, layout="parquet")
    assert exported.num_samples == len(THERE)
    rows = pq.read_table(pa.BufferReader(output.get("part-00000.parquet"))).column("source_id").to_pylist()
    assert rows == [f"test:{i + 1}" for i in THERE]


def test_nothing_of_it_is_garbage(store):
    report = find_garbage(store.url, older_than_hours=0)
    assert not report.garbage and not report.foreign


def test_a_lost_record_comes_back_from_the_manifest(store):
    store.delete(commit_path(0))
    assert restore_commits(store) == (0,)
    check(Cache.open(store.url), THERE)


def test_a_damaged_shard_is_set_aside_and_scored_again(store):
    path = load_commit(store, 0).row_objects[0].path
    store.put(path, b"\0" * len(store.get(path)))
    repaired = repair_cache(store, verify_cache(store, deep=True))
    assert repaired.set_aside == (0,)
    write(store.url, excluded={})  # which finds the samples of this shard well again
    check(Cache.open(store.url), sorted({*THERE, 0, 3, 4}))


def test_a_shard_may_be_set_aside_for_another_try(store):
    store.delete(MANIFEST_PATH)
    set_aside(store, 0, ["test:1: first of its shard"])
    status = build_status(store)
    assert (set(status.quarantine), set(status.excluded)) == ({0}, set(Cache.open(store.url).excluded))
    write(store.url, excluded={21: "hangs"})
    check(Cache.open(store.url), [i for i in range(NUM_SAMPLES) if i != 21])


def test_status_names_each_sample(store, capsys):
    assert main(["status", store.url, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and found["lost_samples"] == len(LACKING)
    assert {s["source_id"]: s["reason"] for s in found["quarantined_samples"]} == {
        f"test:{i + 1}": reason for i, reason in LACKING.items()
    }
    assert found["committed"]["samples"] == len(THERE) and found["planned"]["samples"] == NUM_SAMPLES
    assert main(["status", store.url]) == 1
    out = "".join(capsys.readouterr().out.split())  # long lines are folded
    assert "4 samples of committed shards could not be scored".replace(" ", "") in out
    for number, reason in LACKING.items():
        assert f"sampletest:{number + 1}(key" in out and f"):{reason.replace(' ', '')}" in out
