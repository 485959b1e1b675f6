"""Statistics that are damaged or wrong: found, named, made again, and never a reason to score a shard again."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import commit
from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.committed import object_record
from logitcache_storage.copying import copy_cache
from logitcache_storage.garbage import find_garbage
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.record_json import dump_record
from logitcache_storage.repair import RepairReport, repair_cache
from logitcache_storage.sample_statistics import load_statistics
from logitcache_storage.schema import ShardRecord
from logitcache_storage.statistics_object import dump_statistics, parse_statistics
from logitcache_storage.testing import extend_cache, make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

SAMPLES, TOPKS = make_samples(30, 4, 40, seed=6)
EXCLUDED = {3: "killed its worker"}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("statistics") / "cache")
    identity = make_identity(k=4, vocab_size=40, shard_rows=60, container="arrow")
    write_cache(url, SAMPLES[:20], TOPKS[:20], identity=identity, excluded=EXCLUDED)
    extend_cache(open_store(url), SAMPLES[20:], TOPKS[20:])
    return url


@pytest.fixture
def store(intact: str, tmp_path: Path) -> ObjectStore:
    """A copy to damage."""
    return open_store(str(shutil.copytree(intact, tmp_path / "cache")))


def repaired(store: ObjectStore, *, deep: bool) -> RepairReport:
    return repair_cache(store, verify_cache(store, deep=deep))


def commit_other(store: ObjectStore, shard: int, name: str, value: float) -> ShardRecord:
    """Commit statistics in which a number is another, with a right checksum: what a writer with a mistake leaves."""
    record = commit.load_commit(store, shard)
    item = record.statistics_object
    assert item is not None
    found = parse_statistics(store.get(item.path), record.num_rows, where="here")
    changed = {**found.columns, name: found.columns[name].copy()}
    changed[name][0] = value
    data = dump_statistics(dataclasses.replace(found, columns=changed))
    store.put(item.path, data)
    objects = (*record.row_objects, object_record(item.path, data))
    wrong = dataclasses.replace(record, objects=objects)
    store.put(commit.commit_path(shard), dump_record(wrong))
    commit.write_manifest(store, {**commit.load_commits(store), shard: wrong})
    return wrong


def test_every_shard_has_them_and_they_are_right(store: ObjectStore) -> None:
    records = commit.load_commits(store)
    assert len(records) >= 3 and all(record.statistics_object is not None for record in records.values())
    assert verify_cache(store, deep=True).is_intact


@pytest.mark.parametrize("lost", [False, True])
def test_damage_costs_no_scoring(store: ObjectStore, lost: bool) -> None:
    good = {path: store.get(path) for path in store.list("")}
    item = commit.load_commit(store, 1).statistics_object
    assert item is not None
    if lost:
        store.delete(item.path)
    else:
        store.put(item.path, b"\xff" + good[item.path][1:])
    for deep in (False, True):
        report = verify_cache(store, deep=deep)
        assert [(found.path, found.shard) for found in report.damage] == [(item.path, None)]
    report = repaired(store, deep=False)
    assert (report.remade, report.set_aside, report.removed, report.left) == ((item.path,), (), (), ())
    assert {path: store.get(path) for path in store.list("")} == good


@pytest.mark.parametrize(("name", "value"), [("mean_entropy", 9.0), ("num_top_k", 0), ("label_rank_bins", 1 << 30)])
def test_wrong_numbers_are_found_by_a_deep_check(store: ObjectStore, name: str, value: float) -> None:
    wrong = commit_other(store, 1, name, value)
    assert verify_cache(store).is_intact
    (found,) = verify_cache(store, deep=True).damage
    assert wrong.statistics_object is not None and found.path == wrong.statistics_object.path and found.shard is None
    assert f"{name} of its sample 0 is" in found.problem
    report = repaired(store, deep=True)
    assert report.remade == (found.path,) and report.is_whole
    # The record lists the new checksum, in the manifest, too.
    assert verify_cache(store, deep=True).is_intact
    again = commit.load_commit(store, 1)
    assert again.statistics_object != wrong.statistics_object and again.row_objects == wrong.row_objects
    manifest = commit.load_manifest(store)
    assert manifest is not None and manifest[1] == again
    assert np.all(load_statistics(Cache.open(store.url)).known)


def test_a_shard_that_is_damaged_as_well_is_scored_again(store: ObjectStore) -> None:
    for item in commit.load_commit(store, 1).objects:
        store.put(item.path, b"\0" * item.size)
    report = repaired(store, deep=False)
    assert (report.remade, report.set_aside, report.left) == ((), (1,), ())


def test_without_samples_nothing_can_be_made_again(store: ObjectStore) -> None:
    cache = Cache.open(store.url)
    path, item = cache.plan.parts[0].object.path, cache.shards[1].statistics_object
    assert item is not None
    store.put(path, b"\0" * cache.plan.parts[0].object.size)
    store.put(item.path, b"\0" * item.size)
    report = repaired(store, deep=False)
    assert report.remade == () and {found.path for found in report.left} == {path, item.path}


def test_the_command_says_so(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    item = commit.load_commit(store, 1).statistics_object
    assert item is not None
    store.put(item.path, b"")
    assert main(["verify", store.url]) == 1
    out = capsys.readouterr().out
    assert item.path in out and f"'logitcache verify {store.url} --repair' makes statistics again" in out
    assert "scored" not in out
    assert main(["verify", store.url, "--repair"]) == 0
    assert f"Made again from the rows: {item.path}." in capsys.readouterr().out
    assert main(["verify", store.url, "--deep"]) == 0


def test_copies_have_them_and_garbage_is_told(store: ObjectStore, tmp_path: Path) -> None:
    target = open_store(str(tmp_path / "copy"))
    copy_cache(store, target)
    table, copied = (load_statistics(Cache.open(s.url)) for s in (store, target))
    assert copied.known.all() and np.array_equal(table.column("doubt"), copied.column("doubt"))
    target.put("shards/00001-0123456789abcdef.statistics", b"of an attempt that lost")
    report = find_garbage(target.url, older_than_hours=0)
    assert [found.path for found in report.garbage] == ["shards/00001-0123456789abcdef.statistics"]
    assert not report.foreign
