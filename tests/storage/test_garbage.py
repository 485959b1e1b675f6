"""Garbage: found by what records list, old enough to be nobody's, and the only thing that is ever deleted."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import garbage
from logitcache_storage.cache import Cache
from logitcache_storage.commit import (
    MANIFEST_PATH,
    commit_path,
    commit_shard,
    load_commit,
    load_identity,
    new_attempt,
    quarantine_path,
    quarantine_shard,
)
from logitcache_storage.errors import CacheNotFoundError, CorruptionError, StoreError
from logitcache_storage.garbage import delete_garbage, find_garbage, stored_objects
from logitcache_storage.objects import open_store
from logitcache_storage.plans import PLAN_PATH, load_plan
from logitcache_storage.samples import target_positions
from logitcache_storage.testing import FlakyStore, make_identity, make_samples, write_cache
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.verify import verify_cache

SAMPLES, TOPKS = make_samples(20, 5, 30)


def write(url: str, options=None, container: str = "arrow", **changes) -> None:
    identity = make_identity(k=5, vocab_size=30, shard_rows=50, container=container)
    write_cache(url, SAMPLES, TOPKS, identity=identity, storage_options=options, **changes)


def leavings(store) -> dict[str, bytes]:
    """What dead writers leave: attempts of shards and of plans, in every form."""
    attempt = new_attempt()
    return {
        f"shards/00001-{attempt}.arrow": b"arrow",
        f"shards/00099-{attempt}/zarr.json": b"{}",
        f"shards/00099-{attempt}/ids/c/0/0": b"ids",
        f"samples/{attempt}-00000.parquet": b"samples",
        f"samples/{attempt}-00000.index": b"index",
        f"vocabulary/{attempt}.parquet": b"vocabulary",
    }


def age(root: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    for path in root.rglob("*"):
        os.utime(path, (then, then))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_exactly_the_leavings_go(store_location) -> None:
    """On every kind of store, whatever it calls the time of writing."""
    url, options = store_location.url, store_location.storage_options
    write(url, options)
    store = open_store(url, options)
    before = {path: store.get(path) for path in store.list("")}
    left = leavings(store)
    for path, data in left.items():
        store.put(path, data)
    assert all(item.modified is not None for item in stored_objects(url, options))
    young = find_garbage(url, options)
    assert not young.garbage and {item.path for item in young.recent} == set(left)
    report = find_garbage(url, options, older_than_hours=0)
    assert {item.path: item.size for item in report.garbage} == {path: len(data) for path, data in left.items()}
    assert report.num_kept == len(before) and not report.foreign
    assert store.list("") == sorted([*before, *left]), "looking deletes nothing"
    delete_garbage(report, options)
    assert {path: store.get(path) for path in store.list("")} == before
    assert verify_cache(store).is_intact
    assert not find_garbage(url, options, older_than_hours=0).garbage


def test_age_decides(tmp_path: Path) -> None:
    write(str(tmp_path))
    old, young = f"shards/00001-{new_attempt()}.arrow", f"shards/00001-{new_attempt()}.arrow"
    (tmp_path / old).write_bytes(b"old")
    age(tmp_path, 30)
    (tmp_path / young).write_bytes(b"young")
    report = find_garbage(str(tmp_path))
    assert [item.path for item in report.garbage] == [old] and [item.path for item in report.recent] == [young]
    assert report.garbage[0].age_hours == pytest.approx(30, abs=0.1)
    assert not find_garbage(str(tmp_path), older_than_hours=31).garbage


def test_of_unknown_age_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path))
    (tmp_path / f"shards/00001-{new_attempt()}.arrow").write_bytes(b"x")
    age(tmp_path, 100)
    monkeypatch.setattr(garbage.time, "time", lambda: float("nan"))
    assert not find_garbage(str(tmp_path)).garbage and len(find_garbage(str(tmp_path)).recent) == 1
    assert len(find_garbage(str(tmp_path), older_than_hours=0).garbage) == 1


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"mtime": 17.5, "created": 3}, 17.5),
        ({"updated": "1970-01-01T00:01:00Z"}, 60.0),
        ({"updated": "yesterday"}, None),
        ({"LastModified": None, "name": "x"}, None),
    ],
)
def test_times_as_file_systems_give_them(info, expected) -> None:
    assert garbage._modified(info) == expected


def test_a_builder_that_died_leaves_garbage_and_a_cache_that_goes_on(tmp_path: Path) -> None:
    for n in range(1, 12):
        root = tmp_path / str(n)
        with contextlib.suppress(StoreError):
            write(FlakyStore(open_store(str(root)), {n}))
        if n > 1:  # the first write is cache.json
            report = find_garbage(str(root), older_than_hours=0)
            delete_garbage(report)
            assert not find_garbage(str(root), older_than_hours=0).garbage
        write(str(root))
        assert verify_cache(str(root), deep=True).is_intact
        delete_garbage(find_garbage(str(root), older_than_hours=0))
        assert verify_cache(str(root), deep=True).is_intact


def test_temporary_files_and_void_quarantine(tmp_path: Path) -> None:
    write(str(tmp_path), commit_shards=1)
    store = open_store(str(tmp_path))
    for shard in (0, 1):
        quarantine_shard(store, shard, ["worker lost"])
        store.put(f"damaged/{shard:05d}-{'d' * 16}.json", b"a commit record that was set aside")
    hidden = [f"commits/.{'a' * 32}.tmp", f".{'b' * 32}.tmp", f"shards/.{'c' * 32}.tmp"]
    for path in hidden:
        (tmp_path / path).write_bytes(b"half")
    assert not find_garbage(str(tmp_path)).garbage
    report = find_garbage(str(tmp_path), older_than_hours=0)
    found = {item.path: item.kind for item in report.garbage}
    void = [quarantine_path(0), f"damaged/00000-{'d' * 16}.json"]
    assert found == {**dict.fromkeys(hidden, "temporary"), **dict.fromkeys(void, "superseded")}
    delete_garbage(report)
    assert not any((tmp_path / path).exists() for path in hidden)
    assert store.list("quarantine") == [quarantine_path(1)]
    assert store.list("damaged") == [f"damaged/00001-{'d' * 16}.json"] and not report.foreign


def test_what_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    root, outside = tmp_path / "cache", tmp_path / "outside"
    write(str(root))
    outside.mkdir()
    (outside / f"00001-{'a' * 16}.arrow").write_bytes(b"outside")
    foreign = ["README", "shards/notes.txt", "samples/mine.parquet", ".DS_Store", "commits/.x.tmp", "shards/1-a.arrow"]
    for path in [*foreign, "shards/\x1b[31m\n"]:
        (root / path).write_bytes(b"mine")
    (root / "shards/link").symlink_to(outside)
    (root / f"shards/00002-{'b' * 16}").symlink_to(outside)
    (root / f"shards/00003-{'c' * 16}.arrow").symlink_to(outside / "nothing")
    before = contents(root)
    report = find_garbage(str(root), older_than_hours=0)
    assert not report.garbage
    assert set(foreign) < set(report.foreign) and len(report.foreign) == len(foreign) + 4
    delete_garbage(report)
    assert contents(root) == before and len(list(outside.iterdir())) == 1


def test_folders_of_deleted_attempts_go_too(tmp_path: Path) -> None:
    write(str(tmp_path), container="zarr")
    attempt = new_attempt()
    for name in ("zarr.json", "ids/c/0/0"):
        path = tmp_path / f"shards/00001-{attempt}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    delete_garbage(find_garbage(str(tmp_path), older_than_hours=0))
    assert not (tmp_path / f"shards/00001-{attempt}").exists() and (tmp_path / "shards").is_dir()


def test_with_a_damaged_record_nothing_is_known(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write(str(tmp_path))
    (tmp_path / f"shards/00001-{new_attempt()}.arrow").write_bytes(b"x")
    for path in (commit_path(1), PLAN_PATH, MANIFEST_PATH):
        whole = store.get(path)
        (tmp_path / path).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorruptionError, match=r"nothing is deleted while it is not known what a record lists"):
            find_garbage(str(tmp_path), older_than_hours=0)
        (tmp_path / path).write_bytes(whole)
    (tmp_path / PLAN_PATH).unlink()
    with pytest.raises(CorruptionError, match=r"missing, and \d+ shards are committed; nothing is deleted"):
        find_garbage(str(tmp_path), older_than_hours=0)


def test_what_only_the_manifest_lists_is_kept(tmp_path: Path) -> None:
    """A shard that is set aside by hand may be put back."""
    write(str(tmp_path))
    objects = {item.path for item in load_commit(open_store(str(tmp_path)), 1).objects}
    (tmp_path / commit_path(1)).unlink()
    assert not find_garbage(str(tmp_path), older_than_hours=0).garbage
    (tmp_path / MANIFEST_PATH).unlink()
    assert {item.path for item in find_garbage(str(tmp_path), older_than_hours=0).garbage} == objects


def test_what_is_committed_while_we_look_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing of objects and the reading of records, a build commits."""
    write(str(tmp_path), commit_shards=1)
    listing = garbage.stored_objects

    def then_commit(*args):
        yield from listing(*args)
        write(str(tmp_path))

    monkeypatch.setattr(garbage, "stored_objects", then_commit)
    report = find_garbage(str(tmp_path), older_than_hours=0)
    delete_garbage(report)
    assert len(Cache.open(str(tmp_path))) == 20 and verify_cache(str(tmp_path)).is_intact


def test_a_lost_race_is_garbage(tmp_path: Path) -> None:
    write(str(tmp_path))
    store = open_store(str(tmp_path))
    inside = [i for i, n in enumerate(Cache.open(str(tmp_path)).samples.column("shard").to_pylist()) if n == 0]
    labels = np.concatenate([SAMPLES[i][0][target_positions(SAMPLES[i][1].ravel())] for i in inside])
    rows = TopKLogProbs.concatenate([TOPKS[i] for i in inside])
    commit_shard(store, load_identity(store), 0, rows, labels, seconds=0, worker="late")
    (lost,) = find_garbage(str(tmp_path), older_than_hours=0).garbage
    assert lost.path.startswith("shards/00000-") and lost.path not in {o.path for o in load_commit(store, 0).objects}


def test_before_there_is_a_plan(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        find_garbage(str(tmp_path / "nothing"))
    store = open_store(str(tmp_path))
    write(str(tmp_path), commit_shards=0)
    planned = {item.path for item in load_plan(store).objects}
    assert not find_garbage(str(tmp_path), older_than_hours=0).garbage
    store.delete(PLAN_PATH)
    assert {item.path for item in find_garbage(str(tmp_path), older_than_hours=0).garbage} == planned
