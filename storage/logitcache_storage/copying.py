"""Copy a cache from any store to any other, every block checked on the way.

Written in this order:

    samples/, vocabulary/     what the plans list
    plans/                    create-only
    shards/, commits/         of each shard its objects, then its record, create-only
    quarantine/, report.json  as they are
    manifest                  where every shard is at the target
    cache.json                create-only, last: before it, nothing at the target can be opened as a cache

A copy that was interrupted is continued by the same call. A target that is a copy already is brought up to date, and is
at every moment a cache that a build may be writing: each record comes after what it lists.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from logitcache_storage import commit
from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import (
    CacheNotFoundError,
    CorruptionError,
    InputError,
    MismatchError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from logitcache_storage.objects import ObjectStore
from logitcache_storage.plans import Plans, join_plans, load_plans, plan_path
from logitcache_storage.progress import Meter, progress
from logitcache_storage.record_json import load_record
from logitcache_storage.schema import CacheIdentity, ObjectRecord, ShardRecord

NUM_THREADS = 8
MAX_BYTES_IN_FLIGHT = 1 << 28
"""Bytes in memory at once; an object larger than this travels alone."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class CopyReport:
    """What was copied, and what was there already."""

    source: str
    target: str
    is_complete: bool
    """Whether every planned shard is at the target now."""
    num_shards: int
    """Committed shards of the source that are at the target now."""
    num_objects: int
    """Written by this call, records not counted; the same for bytes."""
    num_bytes: int
    num_objects_there: int
    """Found at the target as they should be; the same for bytes."""
    num_bytes_there: int
    damaged: dict[int, str]
    """Shards that were left out, and what is wrong with each; empty without `skip_damaged`."""


def copy_cache(
    source: ObjectStore,
    target: ObjectStore,
    *,
    check: bool = False,
    skip_damaged: bool = False,
    quiet: bool = True,
) -> CopyReport:
    """Copy all that is committed; continues a copy that was interrupted.

    Args:
        source: a cache, complete or not.
        target: a store with no cache below its URL, or with an earlier copy of this one.
        check: read what is at the target already and copy again what is damaged; else the right size is enough.
        skip_damaged: leave a shard that is damaged at the source out of the copy, so that a build can score it again,
            instead of stopping.
        quiet: show no progress.

    Raises:
        CacheNotFoundError: there is no cache at the source, or it has no plan yet.
        MismatchError: the target holds another cache.
        CorruptionError: the source is damaged.
    """
    _refuse_overlap(source.url, target.url)
    plans, plan_records = _plans_of(source)
    identity = source.get(commit.IDENTITY_PATH)
    _refuse_another_cache(target, identity, plan_records)
    num_planned = len(join_plans(plans, where=source.url).shard_num_rows)
    shards = commit.load_commits(source, num_planned)
    there = commit.committed_shards(target) & shards.keys()
    fixed = _planned_objects(plans)
    total = sum(item.size for item in fixed) + sum(record.num_bytes for record in shards.values())
    done = 0 if check else sum(shards[shard].num_bytes for shard in there)
    with progress("copying", total=total, done=done, unit="B", quiet=quiet) as meter:
        copier = _Copier(source, target, check, skip_damaged, meter)
        copier.each(copier.object, fixed)
        for path, data in plan_records.items():
            copier.create(path, data)
        copier.each(lambda shard: copier.shard(shards[shard], is_there=shard in there), shards)
        copier.quarantine()
        copier.report()
        num_copied = len(shards) - len(copier.damaged)
        if num_copied == num_planned:
            commit.write_manifest(target, shards)
        copier.create(commit.IDENTITY_PATH, identity)
    return CopyReport(
        source=source.url,
        target=target.url,
        is_complete=num_copied == num_planned,
        num_shards=num_copied,
        num_objects=copier.num_objects,
        num_bytes=copier.num_bytes,
        num_objects_there=copier.num_objects_there,
        num_bytes_there=copier.num_bytes_there,
        damaged=dict(sorted(copier.damaged.items())),
    )


class _Copier:
    """One call of `copy_cache`; its methods may run side by side."""

    def __init__(self, source: ObjectStore, target: ObjectStore, check: bool, skip_damaged: bool, meter: Meter) -> None:
        self._source, self._target, self._check, self._skip_damaged = source, target, check, skip_damaged
        self._meter = meter
        self._budget = _Budget(MAX_BYTES_IN_FLIGHT)
        self._lock = threading.Lock()
        self.num_objects = self.num_bytes = self.num_objects_there = self.num_bytes_there = 0
        self.damaged: dict[int, str] = {}

    def each(self, function: Callable[[_Item], None], items: Iterable[_Item]) -> None:
        """The function of each item, several at a time; the first error stops the rest."""
        pool = ThreadPoolExecutor(NUM_THREADS)
        try:
            for _ in pool.map(function, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def shard(self, record: ShardRecord, *, is_there: bool) -> None:
        """The objects of a shard, then its commit record."""
        path = commit.commit_path(record.shard)
        try:
            data = self._commit_record(path, record)
            if is_there and not self._check:
                self._count(0, record.num_bytes, len(record.objects), there=True)
            else:
                for item in record.objects:
                    self.object(item)
        except CorruptionError as e:
            if not self._skip_damaged:
                raise CorruptionError(f"{e}; or copy all other shards with --skip-damaged") from e
            with self._lock:
                self.damaged[record.shard] = str(e)
            self._meter.note(f"left out: {e}")
            return
        self.create(path, data)

    def object(self, record: ObjectRecord) -> None:
        """One object, unless it is at the target already."""
        with self._budget.taken(record.size):
            is_there = self._is_there(record)
            if not is_there:
                self._target.put(record.path, CommittedObjects(self._source, [record]).get(record.path))
        self._count(record.size, record.size, 1, there=is_there)

    def create(self, path: str, data: bytes) -> None:
        """A record, create-only; one that is there must be the same."""
        try:
            self._target.create(path, data)
        except ObjectExistsError:
            if self._target.get(path) != data:
                raise _another_cache(self._target, f"its {path} is another one") from None

    def quarantine(self) -> None:
        """What is known of shards that could not be scored."""
        for shard in commit.load_quarantine(self._source):
            path = commit.quarantine_path(shard)
            self._target.put(path, self._source.get(path))

    def report(self) -> None:
        """What the build took, unless builds at the target have said so of themselves."""
        with suppress(ObjectNotFoundError, ObjectExistsError):
            self._target.create(commit.REPORT_PATH, self._source.get(commit.REPORT_PATH))

    def _commit_record(self, path: str, record: ShardRecord) -> bytes:
        """The bytes of a commit record, which must say what was read of it before, maybe from the manifest."""
        where = f"{self._source.url}/{path}"
        try:
            data = self._source.get(path)
        except ObjectNotFoundError as e:
            raise CorruptionError(f"{e}, but the manifest lists shard {record.shard}; see 'logitcache verify'") from e
        if load_record(ShardRecord, data, where=where) != record:
            raise CorruptionError(f"{where}: differs from what the manifest says; see 'logitcache verify'")
        return data

    def _is_there(self, record: ObjectRecord) -> bool:
        try:
            if self._check:
                CommittedObjects(self._target, [record]).get(record.path)
                return True
            # Objects appear whole, so the size tells: one byte where the last should be, and none after it.
            last = self._target.get_range(record.path, max(record.size - 1, 0), record.size + 1)
            return len(last) == min(record.size, 1)
        except (ObjectNotFoundError, CorruptionError):
            return False

    def _count(self, advance: int, num_bytes: int, num_objects: int, *, there: bool) -> None:
        with self._lock:
            if there:
                self.num_objects_there += num_objects
                self.num_bytes_there += num_bytes
            else:
                self.num_objects += num_objects
                self.num_bytes += num_bytes
        if advance:
            self._meter.advance(advance)


class _Budget:
    """So many bytes at once, over all threads; one that asks for more than there is waits for all of it."""

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        wanted = min(amount, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


def _plans_of(source: ObjectStore) -> tuple[Plans, dict[str, bytes]]:
    """The plans of a cache, and their records by path."""
    commit.load_identity(source)
    plans = load_plans(source)
    if plans is None:
        raise CacheNotFoundError(f"{source.url}: the build has not written its plan yet; let it run, then copy")
    # A plan that was made since then is left to the next copy, as are the samples that it lists.
    planned = {plan_path(number) for number in range(len(plans.records))}
    return plans, {path: data for path, data in _plan_records(source) if path in planned}


def _plan_records(store: ObjectStore) -> Iterator[tuple[str, bytes]]:
    paths = store.list("plans")
    yield from zip(paths, store.get_many(paths), strict=True)


def _planned_objects(plans: Plans) -> list[ObjectRecord]:
    """What the plans list, each object once."""
    return list({item.path: item for plan in plans.records for item in plan.objects}.values())


def _refuse_overlap(source: str, target: str) -> None:
    """A copy inside its source would be taken for objects of it, and the other way round."""
    ours, theirs = (url if "://" in url else os.path.realpath(url) for url in (source, target))
    ours, theirs = (f"{url.rstrip('/')}/" for url in (ours, theirs))
    if ours == theirs:
        raise InputError(f"{source} cannot be copied onto itself; give another URL for the copy")
    if ours.startswith(theirs) or theirs.startswith(ours):
        raise InputError(f"{source} and {target} lie one inside the other; give a URL of its own for the copy")


def _refuse_another_cache(target: ObjectStore, identity: bytes, plans: dict[str, bytes]) -> None:
    try:
        found = target.get(commit.IDENTITY_PATH)
    except ObjectNotFoundError:
        found = identity
    if found != identity:
        ours, theirs = (load_record(CacheIdentity, data, where=f"{target.url}") for data in (identity, found))
        differences = "; ".join(theirs.differences(ours)[:5]) or "the place of the teacher"
        raise _another_cache(target, f"other settings (there, here): {differences}")
    for path, data in _plan_records(target):
        if plans.get(path) != data:
            raise _another_cache(target, f"its {path} is another one")


def _another_cache(target: ObjectStore, why: str) -> MismatchError:
    return MismatchError(f"{target.url} holds another cache, {why}; choose another URL for the copy")
