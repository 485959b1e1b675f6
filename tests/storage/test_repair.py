"""Repair: whatever is damaged, the next build makes the cache whole again, and nothing good is ever lost."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import commit
from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError, StoreError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.record_json import dump_record, load_record
from logitcache_storage.repair import RepairReport, build_command, repair_cache, restore_commits
from logitcache_storage.schema import ShardRecord
from logitcache_storage.testing import FlakyStore, make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

K, VOCAB = 3, 40
SAMPLES, TOPKS = make_samples(12, K, VOCAB, seed=3)
IDENTITY = make_identity(k=K, vocab_size=VOCAB, precision="fp32", shard_rows=30, container="arrow")


def build(store: ObjectStore) -> None:
    """The command that made the cache, again."""
    write_cache(store, SAMPLES, TOPKS, identity=IDENTITY)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "cache"
    build(open_store(str(folder)))
    return folder


@pytest.fixture
def store(intact: Path, tmp_path: Path) -> ObjectStore:
    """A copy to damage."""
    return open_store(str(shutil.copytree(intact, tmp_path / "cache")))


def repair(store: ObjectStore, *, deep: bool = False) -> RepairReport:
    restored = restore_commits(store)
    return repair_cache(store, verify_cache(store, deep=deep), restored=restored)


def files(store: ObjectStore) -> dict[str, bytes]:
    return {path: store.get(path) for path in store.list("")}


def check_whole(store: ObjectStore) -> None:
    assert verify_cache(store, deep=True).is_intact
    cache = Cache.open(store.url)
    assert cache.is_complete
    assert all(sample.topk.equals(topk) for sample, topk in zip(cache, TOPKS, strict=True))


def damage(store: ObjectStore, path: str) -> None:
    data = bytearray(store.get(path))
    data[len(data) // 2] ^= 4
    store.put(path, bytes(data))


def test_nothing_is_done_to_a_good_cache(store: ObjectStore) -> None:
    before = files(store)
    report = repair(store)
    assert (report.set_aside, report.restored, report.removed, report.left) == ((), (), (), ())
    assert files(store) == before


def test_every_object_damaged_in_turn(store: ObjectStore) -> None:
    commit.quarantine_shard(store, 1, ["void"])
    good, records = files(store), dict(commit.load_commits(store))
    for path in good:
        damage(store, path)
        report = repair(store)
        shards = {shard for shard, record in records.items() if path in [item.path for item in record.row_objects]}
        assert set(report.set_aside) == shards
        assert commit.committed_shards(store) == records.keys() - shards
        if path == "cache.json" or path.startswith(("plans", "samples", "vocabulary")):
            assert [found.path for found in report.left] == [path]
            assert not report.is_whole
            assert {name: data for name, data in files(store).items() if name != path} == {
                name: data for name, data in good.items() if name != path
            }
            store.put(path, good[path])
            continue
        assert report.is_whole and verify_cache(store).is_intact
        # What was good is there to the last bit, but for the manifest where a shard is missing from it.
        kept = {name: data for name, data in files(store).items() if not name.startswith(("damaged/", "quarantine/"))}
        if path.endswith(".statistics"):  # made again, on the same machine, so to the last bit
            assert report.remade == (path,) and kept[path] == good[path]
        dropped = {"manifest.json", "quarantine/00001.json", path, *(commit.commit_path(shard) for shard in shards)}
        assert {name: data for name, data in good.items() if name not in dropped}.items() <= kept.items()
        assert (commit.load_manifest(store) is None) == bool(shards)
        build(store)
        check_whole(store)
        for name in set(files(store)) - good.keys():
            store.delete(name)
        for name, data in good.items():
            store.put(name, data)


def test_a_shard_that_is_set_aside_says_why_and_can_be_put_back(store: ObjectStore) -> None:
    record = commit.load_commit(store, 1)
    path = record.objects[0].path
    data = store.get(path)
    store.put(path, data[:-1])
    repair(store)
    assert commit.load_quarantine(store)[1].reasons == (
        f"set aside by 'logitcache verify --repair': {path}: {len(data) - 1} bytes where the commit says {len(data)}",
    )
    aside = f"damaged/00001-{record.attempt}.json"
    assert load_record(ShardRecord, store.get(aside), where=aside) == record
    # It was the disk, and the disk is well again.
    store.put(path, data)
    store.put(commit.commit_path(1), store.get(aside))
    check_whole(store)


@pytest.mark.parametrize("lost", [True, False], ids=["missing", "damaged"])
def test_commit_records_come_back_from_the_manifest(store: ObjectStore, lost: bool) -> None:
    good = files(store)
    for shard in (0, 2):
        if lost:
            store.delete(commit.commit_path(shard))
        else:
            damage(store, commit.commit_path(shard))
    report = repair(store)
    assert report.restored == (0, 2) and report.set_aside == ()
    assert files(store) == good


def test_a_commit_record_that_nothing_repeats_is_scored_again(store: ObjectStore) -> None:
    store.delete("manifest.json")
    damage(store, commit.commit_path(1))
    damaged = store.get(commit.commit_path(1))
    report = repair(store)
    assert report.set_aside == (1,) and report.restored == ()
    assert [store.get(path) for path in store.list("damaged")] == [damaged]
    build(store)
    check_whole(store)


def test_an_attempt_that_the_manifest_alone_remembers_is_checked(store: ObjectStore) -> None:
    """Commit and objects of a shard were removed by hand, the manifest was forgotten."""
    record = commit.load_commit(store, 1)
    store.delete(commit.commit_path(1))
    store.delete(record.objects[0].path)
    report = repair(store)
    assert report.restored == (1,) and report.set_aside == (1,)
    build(store)
    check_whole(store)


def test_a_commit_beyond_the_plan_is_set_aside_without_a_quarantine(store: ObjectStore) -> None:
    record = commit.load_commit(store, 0)
    foreign = dataclasses.replace(record, shard=77, objects=(), num_bytes=0)
    store.put(commit.commit_path(77), dump_record(foreign))
    assert repair(store).set_aside == (77,)
    assert not commit.load_quarantine(store)
    check_whole(store)


def test_rows_that_make_no_sense_are_set_aside_by_deep(store: ObjectStore) -> None:
    record = commit.load_commit(store, 1)
    lies = dataclasses.replace(record, statistics={**record.statistics, "entropy_sum": 1e6})
    store.put(commit.commit_path(1), dump_record(lies))
    store.delete("manifest.json")
    assert repair(store).set_aside == ()
    assert repair(store, deep=True).set_aside == (1,)
    build(store)
    check_whole(store)


class FailingStore(FlakyStore):
    """Counts deletions among the writes."""

    def delete(self, path: str) -> None:
        self._write(lambda where, _: self._store.delete(where), path, b"")


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_interrupted_at_every_write_and_run_again(intact: Path, tmp_path: Path, after: bool) -> None:
    def damaged_copy(name: str) -> ObjectStore:
        store = open_store(str(shutil.copytree(intact, tmp_path / name)))
        commit.quarantine_shard(store, 0, ["void"])
        damage(store, commit.load_commit(store, 1).objects[0].path)
        damage(store, commit.commit_path(2))
        store.delete(commit.commit_path(0))
        damage(store, "quarantine/00000.json")
        return store

    counted = FailingStore(damaged_copy("counted"), set())
    assert repair(counted).set_aside == (1,)
    assert counted.num_writes == 7
    for n in range(1, counted.num_writes + 1):
        store = damaged_copy(f"copy-{n}")
        good = commit.load_manifest(store)
        with pytest.raises(StoreError, match=f"write {n} fails on purpose"):
            repair(FailingStore(store, {n}, after=after))
        for shard in (0, 2):  # a record that was repaired is never lost again, and a copy stays until then
            assert shard in commit.committed_shards(store) or commit.load_manifest(store) is not None
        report = repair(store)
        assert report.is_whole and verify_cache(store).is_intact
        assert commit.committed_shards(store) == good.keys() - {1}
        assert all(commit.load_commit(store, shard) == good[shard] for shard in good.keys() - {1})
        build(store)
        check_whole(store)


class DeafStore:
    """A store that does not answer for one object."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        self._store, self._path = store, path

    def get(self, path: str) -> bytes:
        if path == self._path:
            raise StoreError(f"{self._store.url}/{path}: connection reset")
        return self._store.get(path)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_what_the_store_does_not_answer_for_stays_as_it_is(store: ObjectStore) -> None:
    before = files(store)
    deaf = DeafStore(store, commit.load_commit(store, 1).objects[0].path)
    report = repair(deaf)
    assert report.set_aside == () and not report.is_whole
    assert files(store) == before


def test_a_shard_that_a_build_has_replaced_meanwhile_stays(store: ObjectStore) -> None:
    damage(store, commit.load_commit(store, 1).objects[0].path)
    report = verify_cache(store)
    store.delete(commit.commit_path(1))
    store.delete("manifest.json")
    build(store)
    assert repair_cache(store, report).set_aside == ()
    check_whole(store)


def test_a_reader_that_is_open_loses_only_what_was_damaged(store: ObjectStore) -> None:
    damage(store, commit.load_commit(store, 1).objects[0].path)
    cache = Cache.open(store.url)
    repair(store)
    for i in range(len(cache)):
        if cache.index.shard[i] == 1:
            with pytest.raises(CorruptionError):
                cache[i]
        else:
            assert cache[i].topk.equals(TOPKS[i])
    assert np.count_nonzero(cache.index.shard == 1)


def test_without_a_plan_nothing_is_restored(store: ObjectStore) -> None:
    store.delete(commit.commit_path(0))
    damage(store, "plans/00000.json")
    assert restore_commits(store) == ()
    assert load_plan(open_store(str(store.url) + "/nothing")) is None
    assert restore_commits(open_store(str(store.url) + "/nothing")) == ()


def test_the_command_that_made_the_cache() -> None:
    teacher = dataclasses.replace(IDENTITY.teacher, id="my teacher")
    identity = dataclasses.replace(IDENTITY, teacher=teacher, kept_mass=0.9)
    assert build_command(identity, "s3://b/c") == (
        "logitcache build --teacher 'my teacher' --data ... --cache s3://b/c --engine transformers --dtype float32"
        " --k 3 --kept-mass 0.9 --precision fp32 --format arrow --shard-rows 30"
    )
    assert build_command(dataclasses.replace(identity, role="reference"), "c").endswith(" 30 --role reference")
    from_hub = dataclasses.replace(identity, teacher=dataclasses.replace(teacher, revision="abc1234"))
    assert " --teacher 'my teacher' --revision abc1234 --data " in build_command(from_hub, "c")
