"""Every write point of every operation interrupted; and any order of builds, crashes, repairs, extensions and reads."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from logitcache_storage import commit
from logitcache_storage.cache import Cache
from logitcache_storage.copying import copy_cache
from logitcache_storage.errors import StoreError
from logitcache_storage.garbage import delete_garbage, find_garbage
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.repair import repair_cache, restore_commits
from logitcache_storage.testing import FlakyStore, extend_cache, make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

SAMPLES, TOPKS = make_samples(6, k=3, vocab_size=50, seed=5)
EXTENSIONS = [make_samples(2, k=3, vocab_size=50, seed=seed) for seed in (6, 7)]
IDENTITY = make_identity(k=3, precision="fp32", container="arrow", shard_rows=24)


class FlakyDeletes(FlakyStore):
    """Counts deletions among the writes."""

    def delete(self, path: str) -> None:
        self._write(lambda where, _: self._store.delete(where), path, b"")


def build(store: ObjectStore) -> None:
    write_cache(store, SAMPLES, TOPKS, identity=IDENTITY)


def extend(store: ObjectStore, number: int = 0) -> None:
    extend_cache(store, *EXTENSIONS[number])


def repair(store: ObjectStore) -> None:
    restored = restore_commits(store)
    repair_cache(store, verify_cache(store), restored=restored)


def flip(store: ObjectStore, path: str) -> None:
    data = bytearray(store.get(path))
    data[len(data) // 2] ^= 1
    store.put(path, bytes(data))


def check_rows(store: ObjectStore, *, num_extensions: int, complete: bool) -> None:
    """What is visible is what was written."""
    samples, topks = list(SAMPLES), list(TOPKS)
    for more in EXTENSIONS[:num_extensions]:
        samples += more[0]
        topks += more[1]
    cache = Cache.open(store.url)
    assert not complete or (cache.is_complete and len(cache) == len(samples))
    wanted = {sample[0].tobytes(): (sample, topk) for sample, topk in zip(samples, topks, strict=True)}
    for found in cache:
        sample, topk = wanted[found.input_ids.tobytes()]
        assert np.array_equal(found.input_ids, sample[0])
        assert found.topk.equals(topk)


def build_damaged(store: ObjectStore) -> None:
    build(store)
    flip(store, commit.load_commit(store, 1).objects[0].path)


def repair_and_build(store: ObjectStore) -> None:
    repair(store)
    build(store)


OPERATIONS: dict[str, tuple[Callable[[ObjectStore], None], Callable[[ObjectStore, ObjectStore], object], int]] = {
    "build": (lambda store: None, lambda store, _: build(store), 0),
    "extension": (build, lambda store, _: extend(store), 1),
    "repair": (build_damaged, lambda store, _: repair_and_build(store), 0),
    "copy": (lambda store: None, lambda store, source: copy_cache(source, store), 0),
}


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_write_point(name: str, after: bool, tmp_path: Path, count_fault) -> None:
    prepare, operate, num_extensions = OPERATIONS[name]
    source = open_store(f"memory://{uuid.uuid4().hex}")
    build(source)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    prepare(open_store(str(prepared)))
    num_writes = n = 0
    while n <= num_writes:
        n += 1
        store = open_store(str(shutil.copytree(prepared, tmp_path / f"copy-{n}")))
        flaky = FlakyDeletes(store, {n}, after=after)
        try:
            operate(flaky, source)
            num_writes = flaky.num_writes
        except StoreError as e:
            assert "fails on purpose" in str(e)
            operate(store, source)
            num_writes = n
            count_fault(f"write points interrupted: {name}")
        assert verify_cache(store, deep=True).is_intact
        check_rows(store, num_extensions=num_extensions, complete=True)
    assert n > 6


STOPS = st.sampled_from([None, None, *range(1, 16)])
"""The write at which a process dies; None: it lives."""


class Protocol(RuleBasedStateMachine):
    """Several builders, none of which may live long, on one cache that is damaged, repaired, extended and cleaned."""

    def __init__(self) -> None:
        super().__init__()
        self.store = open_store(f"memory://{uuid.uuid4().hex}")
        self.num_extensions = 0
        self.committed: dict[int, object] = {}
        self.damaged: set[int] = set()

    @initialize(stop=STOPS)
    def begin(self, stop: int | None) -> None:
        self.attempt(build, stop, after=False)

    @rule(stop=STOPS, after=st.booleans())
    def run_build(self, stop: int | None, after: bool) -> None:
        self.attempt(build, stop, after=after)

    @precondition(lambda self: self.is_whole())
    @rule(number=st.integers(0, 1), stop=STOPS, after=st.booleans())
    def run_extension(self, number: int, stop: int | None, after: bool) -> None:
        self.attempt(lambda store: extend(store, min(number, self.num_extensions)), stop, after=after)

    @rule(stop=STOPS, after=st.booleans())
    def run_repair(self, stop: int | None, after: bool) -> None:
        if load_plan(self.store) is not None:
            self.attempt(repair, stop, after=after)
            for shard in self.damaged - commit.committed_shards(self.store):
                self.committed.pop(shard)
            self.damaged &= commit.committed_shards(self.store)

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(self.committed)))
        if shard not in self.damaged:
            flip(self.store, commit.load_commit(self.store, shard).objects[0].path)
            self.damaged.add(shard)

    @precondition(lambda self: load_plan(self.store) is not None)
    @rule()
    def collect_garbage(self) -> None:
        delete_garbage(find_garbage(self.store.url, older_than_hours=0))

    def attempt(self, work: Callable[[ObjectStore], None], stop: int | None, *, after: bool) -> None:
        """The process dies at its n-th write; what it was told then is no matter."""
        try:
            work(FlakyDeletes(self.store, {stop} if stop else set(), after=after))
        except StoreError as e:
            assert "fails on purpose" in str(e)

    def is_whole(self) -> bool:
        plan = load_plan(self.store)
        return plan is not None and not self.damaged and len(self.committed) == len(plan.shard_num_rows)

    @invariant()
    def nothing_committed_is_lost_or_changed(self) -> None:
        there = {shard: commit.load_commit(self.store, shard) for shard in commit.committed_shards(self.store)}
        assert there.keys() >= self.committed.keys()
        assert all(there[shard] == record for shard, record in self.committed.items())
        self.committed = there
        self.num_extensions = max(0, len(self.store.list("plans")) - 1)

    @invariant()
    def what_is_read_is_true(self) -> None:
        if load_plan(self.store) is None:
            return
        report = verify_cache(self.store)
        assert {item.shard for item in report.damage if item.shard is not None} == self.damaged
        if not self.damaged:
            check_rows(self.store, num_extensions=self.num_extensions, complete=self.is_whole())


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(
    max_examples=30, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
)
