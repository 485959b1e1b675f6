"""The commit protocol: every write interrupted in turn, builders that race, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import uuid

import numpy as np
import pytest

from logitcache_storage import commit, plans
from logitcache_storage.cache import Cache
from logitcache_storage.committed import object_record
from logitcache_storage.errors import CacheNotFoundError, CorruptionError, MismatchError, StoreError
from logitcache_storage.manifest import Manifest
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.record_json import dump_record, to_json
from logitcache_storage.schema import CorpusIdentity, ObjectRecord, ShardRecord
from logitcache_storage.testing import FlakyStore, make_identity, make_samples, make_topk, write_cache
from logitcache_storage.topk import TopKLogProbs

SAMPLES, TOPKS = make_samples(11, k=3, vocab_size=50, seed=5)
EXACT = {"k": 3, "precision": "fp32", "shard_rows": 24}


def new_store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def check_samples(store: ObjectStore, *, complete: bool | None = None) -> int:
    """Every visible sample is the one that was written; returns how many there are."""
    cache = Cache.open(store.url)
    if complete is not None:
        assert cache.is_complete is complete
    for sample in cache:
        i = int(sample.source_id.removeprefix("test:")) - 1
        assert np.array_equal(sample.input_ids, SAMPLES[i][0])
        assert sample.topk.equals(TOPKS[i])
    return len(cache)


class WatchedStore(FlakyStore):
    """Opens the cache as a reader does after each write, and counts what was visible."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, set())
        self.num_visible: list[int] = []
        self.paths: list[str] = []

    def _write(self, write, path, data):
        super()._write(write, path, data)
        self.paths.append(path)
        if not path.endswith(".json"):
            self.num_visible.append(self.num_visible[-1])  # nothing that a reader looks at
            return
        try:
            self.num_visible.append(check_samples(self._store))
        except CacheNotFoundError:
            self.num_visible.append(-1)


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize(("container", "num_samples"), [("zarr", 5), ("arrow", 11)])
def test_every_write_interrupted(container: str, num_samples: int, after: bool) -> None:
    identity = make_identity(container=container, **EXACT)
    samples, topks = SAMPLES[:num_samples], TOPKS[:num_samples]
    counted = FlakyStore(new_store(), set())
    write_cache(counted, samples, topks, identity=identity)
    assert len(commit.committed_shards(counted)) > 1
    for n in range(1, counted.num_writes + 1):
        store = new_store()
        with pytest.raises(StoreError, match=f"write {n} fails on purpose"):
            write_cache(FlakyStore(store, {n}, after=after), samples, topks, identity=identity)
        before = {path: store.get(path) for path in store.list("") if not path.startswith("manifest")}
        write_cache(store, samples, topks, identity=identity)
        assert check_samples(store, complete=True) == num_samples
        assert {path: store.get(path) for path in before} == before
        # Nothing is added to a shard that was committed: only the one that was interrupted has two attempts.
        attempts = {path.split("/")[1].split(".")[0] for path in store.list("shards")}
        shards = [attempt.split("-")[0] for attempt in attempts]
        committed = [path for path in before if path.startswith("commits/")]
        for path in committed:
            assert shards.count(path.removeprefix("commits/").removesuffix(".json")) == 1
        assert len(shards) - len(set(shards)) <= 1


def test_readers_see_whole_shards_only() -> None:
    store = WatchedStore(new_store())
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(container="zarr", **EXACT))
    visible = dict(zip(store.paths, store.num_visible, strict=True))
    assert visible["cache.json"] == -1
    assert visible["plans/00000.json"] == 0
    assert store.num_visible == sorted(store.num_visible)
    steps = [n for n, before in zip(store.num_visible[1:], store.num_visible, strict=False) if n != before]
    commits = [visible[path] for path in store.paths if path.startswith("commits/")]
    assert steps == [0, *commits]
    assert commits[-1] == len(SAMPLES)


def test_racing_builders_make_one_cache(tmp_path) -> None:
    url = str(tmp_path / "cache")
    identity = make_identity(container="arrow", **EXACT)
    barrier = threading.Barrier(3)
    failures: list[BaseException] = []

    def build() -> None:
        barrier.wait()
        try:
            write_cache(url, SAMPLES, TOPKS, identity=identity)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store = open_store(url)
    assert check_samples(store, complete=True) == len(SAMPLES)
    assert len(store.list("commits")) == len(Cache.open(url).plan.shard_num_rows)


def test_a_lost_race_gives_the_winners_record() -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    winner = commit.load_commit(store, 0)
    labels = np.zeros(4, np.int32)
    lost = commit.commit_shard(
        store, make_identity(**EXACT), 0, make_topk(4, 3, 50, labels=labels), labels, seconds=1.0, worker="late"
    )
    assert lost == winner
    plan = plans.load_plan(store)
    assert plan is not None
    assert plans.commit_plan(store, dataclasses.replace(plan, num_tokens=7)) == plan
    check_samples(store, complete=True)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"k": 4}, "k: 3, 4"),
        ({"precision": "u10"}, "precision: 'fp32', 'u10'"),
        ({"container": "arrow"}, "container: 'zarr', 'arrow'"),
        ({"kept_mass": 0.5}, "kept_mass: 1.0, 0.5"),
        ({"role": "reference"}, "role: 'teacher', 'reference'"),
        ({"corpus": CorpusIdentity("f" * 64, 0, {"max_length": 7})}, "corpus.settings.max_length: None, 7"),
    ],
)
def test_other_settings_are_refused_by_name(change: dict, name: str) -> None:
    store = new_store()
    assert commit.create_or_continue(store, make_identity(**EXACT)) is True
    assert commit.create_or_continue(store, make_identity(**EXACT)) is False
    with pytest.raises(MismatchError, match="other settings") as e:
        commit.create_or_continue(store, make_identity(**{**EXACT, **change}))
    assert name in str(e.value)


def test_where_the_teacher_was_found_is_no_difference() -> None:
    store, identity = new_store(), make_identity(**EXACT)
    commit.create_or_continue(store, identity)
    moved = dataclasses.replace(identity.teacher, id="/elsewhere", revision="main")
    assert commit.create_or_continue(store, dataclasses.replace(identity, teacher=moved)) is False


def test_no_cache_and_no_plan() -> None:
    store = new_store()
    with pytest.raises(CacheNotFoundError, match=r"there is no cache.json; check the URL"):
        Cache.open(store.url)
    commit.create_or_continue(store, make_identity(**EXACT))
    assert plans.load_plan(store) is None
    with pytest.raises(CacheNotFoundError, match="not written its plan"):
        Cache.open(store.url)


def test_another_format_version() -> None:
    store = new_store()
    commit.create_or_continue(store, make_identity(**EXACT))
    store.put("cache.json", store.get("cache.json").replace(b'"format_version": 1', b'"format_version": 2'))
    for read in (lambda: Cache.open(store.url), lambda: commit.create_or_continue(store, make_identity(**EXACT))):
        with pytest.raises(MismatchError, match="format version 2, this logitcache reads version 1"):
            read()


def test_bad_rows_are_refused_before_anything_is_written() -> None:
    store, identity = new_store(), make_identity(**EXACT)
    labels = np.zeros(4, np.int32)
    good = make_topk(4, 3, 50, labels=labels)
    bad = dataclasses.replace(good, log_probs=good.log_probs[:, ::-1].copy())
    for topk, match in ((bad, "increase along a row"), (make_topk(4, 5, 50, labels=labels), "rows of 5 ids")):
        with pytest.raises(CorruptionError, match=match):
            commit.commit_shard(store, identity, 0, topk, labels, seconds=0.0, worker="test")
    assert store.list("") == []


def test_records_are_of_the_shard_that_their_name_says() -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT), commit_shards=2)
    store.put("commits/00001.json", store.get("commits/00000.json"))
    with pytest.raises(CorruptionError, match=r"commits/00001\.json: is the record of shard 0"):
        commit.load_commits(store)


def test_records_list_objects_of_their_own_attempt_only() -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(container="arrow", **EXACT))
    records = commit.load_commits(store)
    foreign = dataclasses.replace(records[0], objects=records[1].objects, num_bytes=records[1].num_bytes)
    store.put("commits/00000.json", dump_record(foreign))
    with pytest.raises(CorruptionError, match="expected objects of shards/00000-"):
        commit.load_commit(store, 0)
    store.delete("manifest.json")
    with pytest.raises(CorruptionError, match="expected objects of shards/00000-"):
        commit.load_commits(store)


def test_rows_that_are_not_the_plans() -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT), commit_shards=0)
    labels = np.zeros(4, np.int32)
    topk = make_topk(4, 3, 50, labels=labels)
    commit.commit_shard(store, make_identity(**EXACT), 0, topk, labels, seconds=0.0, worker="test")
    with pytest.raises(CorruptionError, match="shard 0 has 4 rows"):
        Cache.open(store.url)


def test_quarantine_is_lifted_by_a_commit() -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT), commit_shards=1)
    for shard in (0, 1):
        commit.quarantine_shard(store, shard, ["out of memory", "timeout"])
    found = commit.load_quarantine(store)
    assert list(found) == [1]
    assert (found[1].attempts, found[1].reasons) == (2, ("out of memory", "timeout"))
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    assert commit.load_quarantine(store) == {}


def test_manifest_says_what_the_commits_say() -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    manifest = commit.load_commits(store)
    assert isinstance(manifest, Manifest)
    assert list(manifest) == sorted(commit.committed_shards(store))
    assert all(manifest[shard] == commit.load_commit(store, shard) for shard in manifest)


def test_an_early_manifest_is_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    """It was one JSON record of all commits; the golden caches have one."""
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    records = commit.load_commits(store)
    body = json.dumps({"crc32c": "0" * 8, "shards": [to_json(record) for record in records.values()]})
    store.put("manifest.json", body.encode())
    assert commit.load_manifest(store) is None
    assert commit.load_commits(store) == records
    assert not caplog.records


@pytest.mark.parametrize("path", ["manifest.json", "manifest.parquet"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:70] + b"x" + data[71:], lambda _: b""])
def test_a_damaged_manifest_is_named_and_the_commits_are_read_instead(path: str, change, caplog) -> None:
    store = new_store()
    write_cache(store, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    records = commit.load_commits(store)
    store.put(path, change(store.get(path)))
    with pytest.raises(CorruptionError, match=re.escape(f"{store.url}/{path}")):
        commit.load_manifest(store)
    assert commit.load_commits(store) == records
    assert path in caplog.text and "the commit records are read instead" in caplog.text


def test_attempts_never_share_a_name() -> None:
    assert len({commit.new_attempt() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_bytes_that_are_committed_and_no_shard(container: str) -> None:
    """Checksums hold, but the objects are nothing that the format wrote, or one is not listed."""

    def read(record: ShardRecord, objects: tuple[ObjectRecord, ...]) -> TopKLogProbs:
        changed = dataclasses.replace(record, objects=objects, num_bytes=sum(item.size for item in objects))
        return commit.read_rows(store, identity, changed, slice(0, 4))

    store, identity = new_store(), make_identity(container=container, **EXACT)
    labels = np.zeros(4, np.int32)
    record = commit.commit_shard(
        store, identity, 0, make_topk(4, 3, 50, labels=labels), labels, seconds=0.0, worker="test"
    )
    written = read(record, record.objects)
    for item in record.objects:
        others = tuple(other for other in record.objects if other != item)
        original = store.get(item.path)
        for data in (b"", b"{}", b"[1]", b'{"zarr_format": 3, "node_type": "array"}', b"\x00" * 999):
            store.put(item.path, data)
            try:
                found = read(record, (*others, object_record(item.path, data)))
            except CorruptionError:
                continue
            assert item.path.endswith("/zarr.json")  # it says nothing that the identity and the record do not
            assert found.equals(written)
        store.put(item.path, original)
        with pytest.raises(CorruptionError):
            read(record, others)
