"""Copies: equal to the last byte, continued after any interruption, openable only when they are done."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from logitcache_storage import copying
from logitcache_storage.cache import Cache
from logitcache_storage.commit import (
    IDENTITY_PATH,
    MANIFEST_PATH,
    commit_path,
    load_commit,
    load_commits,
    new_attempt,
    quarantine_path,
    quarantine_shard,
)
from logitcache_storage.copying import copy_cache
from logitcache_storage.errors import CacheNotFoundError, CorruptionError, InputError, MismatchError, StoreError
from logitcache_storage.garbage import find_garbage
from logitcache_storage.objects import LocalStore, ObjectStore, open_store
from logitcache_storage.plans import commit_extension, load_plan, write_samples
from logitcache_storage.schema import BLOCK_BYTES, CorpusIdentity, ExtensionRecord, PlanRecord
from logitcache_storage.testing import FlakyStore, _plan_table, make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

GOLDEN = Path(__file__).parent / "golden"
SAMPLES, TOPKS = make_samples(20, 5, 30)


def new_store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def write(store: ObjectStore, container: str = "arrow", shard_rows: int = 30, **changes) -> None:
    identity = make_identity(k=5, vocab_size=30, shard_rows=shard_rows, container=container)
    write_cache(store, SAMPLES, TOPKS, identity=identity, **changes)


@pytest.fixture(scope="module")
def source() -> ObjectStore:
    store = new_store()
    write(store)
    return store


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {path: store.get(path) for path in store.list("")}


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_between_any_two_stores(store_location, container: str, tmp_path: Path) -> None:
    """There and back again, and no garbage travels."""
    start = open_store(str(tmp_path / "source"))
    write(start, container, shard_rows=90)
    expected = contents(start)
    start.put(f"shards/00001-{new_attempt()}.arrow", b"garbage")
    middle = open_store(store_location.url, store_location.storage_options)
    report = copy_cache(start, middle)
    assert contents(middle) == expected
    end = open_store(str(tmp_path / "target"))
    copy_cache(middle, end)
    assert contents(end) == expected and verify_cache(end, deep=True).is_intact
    shards, plan = load_commits(start), load_plan(start)
    num_bytes = sum(r.num_bytes for r in shards.values()) + sum(item.size for item in plan.objects)
    assert (report.num_shards, report.num_bytes, report.num_bytes_there) == (len(shards), num_bytes, 0)
    assert report.num_objects == sum(len(r.objects) for r in shards.values()) + len(plan.objects) and report.is_complete


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_every_write(source: ObjectStore, after: bool) -> None:
    expected = contents(source)
    counted = FlakyStore(new_store(), set())
    num_objects = copy_cache(source, counted).num_objects
    for n in range(1, counted.num_writes + 1):
        store = new_store()
        with pytest.raises(StoreError, match=f"write {n} fails on purpose"):
            copy_cache(source, FlakyStore(store, {n}, after=after))
        if not (after and store.list("") == source.list("")):
            with pytest.raises(CacheNotFoundError):
                Cache.open(store.url)
        again = copy_cache(source, store)
        assert contents(store) == expected
        assert again.num_objects + again.num_objects_there == num_objects


def test_what_is_there_is_not_copied_again(source: ObjectStore) -> None:
    store = new_store()
    first = copy_cache(source, store)
    watched = FlakyStore(store, set())
    second = copy_cache(source, watched)
    assert (second.num_objects, second.num_bytes) == (0, 0)
    assert (second.num_objects_there, second.num_bytes_there) == (first.num_objects, first.num_bytes)
    num_records = len(load_commits(source)) + len(["plan", "cache.json", "manifest.json", "manifest.parquet"])
    assert watched.num_writes == num_records, "creations that find what is there, and the manifest"


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_the_size_tells_whether_an_object_is_there(size: int) -> None:
    from logitcache_storage.committed import object_record
    from logitcache_storage.progress import Meter

    data = bytes(range(251)) * 1100
    source, record = new_store(), object_record("shards/x", data[:size])
    source.put("shards/x", data[:size])
    for there in {0, 1, max(size - 1, 0), size, size + 1}:
        target = new_store()
        target.put("shards/x", data[:there])
        copier = copying._Copier(source, target, False, False, Meter("", None, "", 0, None, 1))
        copier.object(record)
        assert target.get("shards/x") == data[:size] and copier.num_objects_there == (there == size)


def test_half_objects_are_replaced_and_check_finds_what_the_size_does_not(source: ObjectStore) -> None:
    store = new_store()
    copy_cache(source, store)
    short, flipped = (load_commit(source, n).objects[0].path for n in (0, 1))
    store.delete(commit_path(0))
    store.put(short, store.get(short)[:-1])
    store.put(flipped, bytes(len(store.get(flipped))))
    report = copy_cache(source, store)
    assert report.num_objects == 1 and store.get(short) == source.get(short)
    assert not verify_cache(store).is_intact
    report = copy_cache(source, store, check=True)
    assert report.num_objects == 1 and contents(store) == contents(source)


def test_a_growing_cache_is_followed() -> None:
    source, store = new_store(), new_store()
    write(source, commit_shards=2)
    quarantine_shard(source, 2, ["worker lost"])
    report = copy_cache(source, store)
    assert not report.is_complete and report.num_shards == 2
    assert len(Cache.open(store.url)) == len(Cache.open(source.url)) < 20
    assert store.get(quarantine_path(2)) == source.get(quarantine_path(2)) and MANIFEST_PATH not in store.list("")
    write(source)
    report = copy_cache(source, store)
    assert report.is_complete and report.num_objects_there == 2 * 2 + len(load_plan(source).objects)
    assert contents(store) == contents(source) and len(Cache.open(store.url)) == 20


def test_a_build_goes_on_at_the_copy() -> None:
    source, store = new_store(), new_store()
    write(source, commit_shards=2)
    copy_cache(source, store)
    write(store)
    assert verify_cache(store, deep=True).is_intact and len(Cache.open(store.url)) == 20


def test_another_cache_at_the_target_is_refused(source: ObjectStore) -> None:
    other = new_store()
    write(other)
    before = contents(other)
    with pytest.raises(MismatchError, match=r"holds another cache, its plans/00000.json is another one"):
        copy_cache(source, other)
    settings = new_store()
    identity = make_identity(k=5, vocab_size=30, shard_rows=31, container="arrow")
    write_cache(settings, SAMPLES, TOPKS, identity=identity)
    with pytest.raises(MismatchError, match=r"other settings \(there, here\): shard_rows: 31, 30; choose another URL"):
        copy_cache(source, settings)
    scored_elsewhere = new_store()
    write(scored_elsewhere, commit_shards=1)
    copy = new_store()
    copy_cache(scored_elsewhere, copy)
    write(scored_elsewhere)
    write(copy)
    with pytest.raises(MismatchError, match=rf"its {commit_path(1)} is another one"):
        copy_cache(scored_elsewhere, copy)
    assert contents(other) == before


def test_onto_itself_and_from_nothing(source: ObjectStore) -> None:
    with pytest.raises(InputError, match="cannot be copied onto itself"):
        copy_cache(source, open_store(source.url + "/"))
    for ours, theirs in ((source, f"{source.url}/inner"), (LocalStore("a/b"), "a/../a"), (LocalStore("a"), "./a/b")):
        with pytest.raises(InputError, match="lie one inside the other"):
            copy_cache(ours, open_store(theirs))
    with pytest.raises(CacheNotFoundError):
        copy_cache(new_store(), new_store())
    unplanned = new_store()
    unplanned.put(IDENTITY_PATH, source.get(IDENTITY_PATH))
    with pytest.raises(CacheNotFoundError, match="has not written its plan yet"):
        copy_cache(unplanned, new_store())


def twin(source: ObjectStore) -> ObjectStore:
    """All objects of a store in another one, as they are."""
    store = new_store()
    for path, data in contents(source).items():
        store.put(path, data)
    return store


def damaged(source: ObjectStore, path: str, data: bytes | None = None) -> ObjectStore:
    store = twin(source)
    store.put(path, bytes(len(store.get(path))) if data is None else data)
    return store


def test_damage_at_the_source_stops_the_copy(source: ObjectStore) -> None:
    path = load_commit(source, 1).objects[0].path
    store, target = damaged(source, path), new_store()
    with pytest.raises(CorruptionError, match=rf"{path}: crc32c .*or copy all other shards with --skip-damaged"):
        copy_cache(store, target)
    with pytest.raises(CacheNotFoundError):
        Cache.open(target.url)
    report = copy_cache(store, target, skip_damaged=True)
    assert list(report.damaged) == [1] and path in report.damaged[1] and not report.is_complete
    assert commit_path(1) not in target.list("") and MANIFEST_PATH not in target.list("")
    assert verify_cache(target, deep=True).is_intact
    write(target)
    assert len(Cache.open(target.url)) == 20 and verify_cache(target, deep=True).is_intact
    assert set(load_commits(target)) == set(load_commits(source))


def test_damaged_samples_cannot_be_left_out(source: ObjectStore) -> None:
    for path in [item.path for item in load_plan(source).objects]:
        with pytest.raises(CorruptionError, match=f"{path}: crc32c"):
            copy_cache(damaged(source, path), new_store(), skip_damaged=True)


def test_a_damaged_commit_record_is_not_copied(source: ObjectStore) -> None:
    other = load_commit(source, 0)
    for data in (source.get(commit_path(1))[:-9], source.get(commit_path(0))):
        store = damaged(source, commit_path(1), data)
        with pytest.raises(CorruptionError, match=rf"{commit_path(1)}: "):
            copy_cache(store, new_store())
        assert list(copy_cache(store, new_store(), skip_damaged=True).damaged) == [1]
    missing = damaged(source, other.objects[0].path, source.get(other.objects[0].path))
    missing.delete(commit_path(1))
    with pytest.raises(CorruptionError, match=r"but the manifest lists shard 1"):
        copy_cache(missing, new_store())


def test_bytes_in_memory_are_bounded(source: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(item.size for record in load_commits(source).values() for item in record.objects)
    limit = largest + 1
    monkeypatch.setattr(copying, "MAX_BYTES_IN_FLIGHT", limit)
    lock, held, most = threading.Lock(), 0, 0

    class Watched:
        """Counts what lies between a read at the source and the write at the target."""

        def __init__(self, store: ObjectStore) -> None:
            self.store, self.url = store, store.url

        def __getattr__(self, name):
            return getattr(self.store, name)

        def get(self, path: str) -> bytes:
            nonlocal held, most
            data = self.store.get(path)
            with lock:
                held += len(data) if path.startswith("shards/") else 0
                most = max(most, held)
            return data

        def put(self, path: str, data: bytes) -> None:
            nonlocal held
            self.store.put(path, data)
            with lock:
                held -= len(data) if path.startswith("shards/") else 0

    target = new_store()
    copy_cache(Watched(source), Watched(target))
    assert contents(target) == contents(source)
    assert 0 < most <= limit and held == 0


def extend(store: ObjectStore) -> None:
    """A second plan behind the first, of other samples, and none of its shards."""
    first = load_plan(store)
    samples, _ = make_samples(5, 5, 30, seed=7)
    table, sizes = _plan_table(samples, 30, {})
    shards = pa.array([shard + len(first.shard_num_rows) for shard in table.column("shard").to_pylist()], pa.int32())
    table = table.set_column(2, table.schema.field("shard"), shards)
    num_tokens = sum(len(ids) for ids, _ in samples)
    parts = write_samples(store, new_attempt(), [table])
    plan = PlanRecord(5, num_tokens, sum(sizes), sizes, {}, parts, first.vocabulary)
    corpus = CorpusIdentity("e" * 64, 5, {})
    assert commit_extension(store, 1, ExtensionRecord(corpus, len(first.shard_num_rows), plan))


def test_an_extended_cache_is_followed(tmp_path: Path) -> None:
    source, target = new_store(), open_store(str(tmp_path))
    write(source)
    assert copy_cache(source, target).is_complete
    extend(source)
    report = copy_cache(source, target)
    assert not report.is_complete and report.num_objects == 2, "the new samples and their index"
    assert contents(target) == contents(source) and len(Cache.open(target.url)) == 20
    assert not find_garbage(str(tmp_path), older_than_hours=0).garbage
    other = twin(source)
    other.delete("plans/00001.json")
    extend(other)
    with pytest.raises(MismatchError, match=r"its plans/00001.json is another one"):
        copy_cache(other, target)


def test_an_extension_that_is_made_meanwhile_is_left_to_the_next_copy() -> None:
    """Its samples are not among those that were copied, so its plan must not be, either."""

    class Growing:
        """Is extended as soon as its plans were read."""

        def __init__(self, store: ObjectStore) -> None:
            self.store, self.url = store, store.url

        def __getattr__(self, name):
            return getattr(self.store, name)

        def get_many(self, paths: list[str]) -> list[bytes]:
            found = self.store.get_many(paths)
            if paths == ["plans/00000.json"]:
                extend(self.store)
            return found

    source, target = new_store(), new_store()
    write(source)
    copy_cache(Growing(source), target)
    assert len(Cache.open(target.url)) == 20 and verify_cache(target, deep=True).is_intact
    copy_cache(source, target)
    assert contents(target) == contents(source)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if (path / IDENTITY_PATH).is_file()))
def test_caches_of_early_writers(name: str, tmp_path: Path) -> None:
    """Without an index of samples, with the manifest of their day."""
    start, target = open_store(str(GOLDEN / name)), open_store(str(tmp_path))
    copy_cache(start, target)
    before, after = contents(start), contents(target)
    changed = {path for path in before if before[path] != after.get(path)}
    assert changed <= {MANIFEST_PATH} and verify_cache(target, deep=True).is_intact
    assert not find_garbage(str(tmp_path), older_than_hours=0).garbage
