"""Is every byte of a cache what was committed, and does every row make sense?

Nothing stops the check: each damaged object is reported by name and the rest is checked all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from logitcache_storage import commit, plans
from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import CorruptionError, LogitCacheError, ObjectNotFoundError
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.invariants import check_rows
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.progress import Meter, progress
from logitcache_storage.samples import TOKEN_COLUMNS, SamplesTable, read_parquet_object
from logitcache_storage.schema import (
    CacheIdentity,
    ManifestRecord,
    ObjectRecord,
    PlanPart,
    PlanRecord,
    QuarantineRecord,
    ShardRecord,
    load_record,
)
from logitcache_storage.shard_labels import ShardLabels
from logitcache_storage.statistics import sum_statistics
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA

NUM_READERS = 4
STATISTICS_TOLERANCE = 1e-5
"""Allowed difference of a mean from the committed one: another machine may sum in another order."""

_REMEDY_BEGINS = "; the object is damaged"
"""What every checksum error goes on with; a report of many says once what to do."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be."""

    path: str
    """Below the cache."""
    problem: str
    shard: int | None = None
    """The shard that must be scored again; None where the object belongs to no shard."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what was found."""

    url: str
    is_deep: bool
    num_planned_shards: int
    """0 where there is no readable plan."""
    num_shards: int
    """Committed shards; the same for rows."""
    num_rows: int
    num_objects: int
    """Objects that were read and checked; the same for bytes."""
    num_bytes: int
    damage: tuple[Damage, ...]
    quarantine: tuple[QuarantineRecord, ...]

    @property
    def is_intact(self) -> bool:
        """Whether nothing is damaged; a cache may be intact and unfinished."""
        return not self.damage


def verify_cache(
    cache: ObjectStore | str,
    *,
    deep: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> VerifyReport:
    """Check every object of a cache against its checksum.

    Args:
        cache: its store or URL.
        deep: also decode everything and check the invariants of rows, samples and statistics.
        storage_options: handed to fsspec, with a URL.
        quiet: show no progress.

    Raises:
        CacheNotFoundError: there is no cache.
        MismatchError: it is of another format version.
    """
    store = open_store(cache, storage_options) if isinstance(cache, str) else cache
    check = _Check(store, deep)
    identity = check.identity()
    plan = check.plan()
    shards = check.commits(plan)
    check.manifest(shards)
    quarantine = check.quarantine()
    parts = (*(part.object for part in plan.parts), plan.vocabulary) if plan else ()
    total = sum(o.size for o in parts) + sum(o.size for record in shards.values() for o in record.objects)
    with progress("verifying", total=total, unit="B", quiet=quiet) as meter:
        labels = check.samples(plan, meter) if plan else None
        check.shards(shards.values(), identity, labels, meter)
    return VerifyReport(
        url=store.url,
        is_deep=deep,
        num_planned_shards=len(plan.shard_num_rows) if plan else 0,
        num_shards=len(shards),
        num_rows=sum(record.num_rows for record in shards.values()),
        num_objects=check.num_objects,
        num_bytes=check.num_bytes,
        damage=tuple(sorted(check.damage, key=lambda d: (d.shard is not None, d.shard or 0, d.path))),
        quarantine=tuple(quarantine),
    )


class _Check:
    """One pass over a cache; each step adds to `damage` and goes on."""

    def __init__(self, store: ObjectStore, deep: bool) -> None:
        self._store, self._deep = store, deep
        self._lock = threading.Lock()
        self.damage: list[Damage] = []
        self.num_objects = 0
        self.num_bytes = 0

    def identity(self) -> CacheIdentity | None:
        try:
            identity = commit.load_identity(self._store)
        except CorruptionError as e:
            self._report(commit.IDENTITY_PATH, e)
            return None
        self._count()
        return identity

    def plan(self) -> PlanRecord | None:
        with self._reporting(plans.PLAN_PATH):
            plan = plans.load_plan(self._store)
            self._count(0 if plan is None else 1)
            return plan
        return None

    def commits(self, plan: PlanRecord | None) -> dict[int, ShardRecord]:
        """All commit records that can be read."""
        numbers = sorted(commit.committed_shards(self._store))
        records = {record.shard: record for record in self._each(self._commit, numbers) if record is not None}
        sizes = plan.shard_num_rows if plan else ()
        if plan is None and records and not self._is_damaged(plans.PLAN_PATH):
            self._report(plans.PLAN_PATH, f"missing, and {len(records)} shards are committed")
        for shard, record in records.items():
            if plan is not None and (shard >= len(sizes) or sizes[shard] != record.num_rows):
                planned = f"{sizes[shard]} rows" if shard < len(sizes) else f"only {len(sizes)} shards"
                self._report(commit.commit_path(shard), f"{record.num_rows} rows; the plan has {planned}", shard)
        return records

    def manifest(self, shards: Mapping[int, ShardRecord]) -> None:
        """The manifest must say what the commit records say: readers open it instead of them."""
        path = commit.MANIFEST_PATH
        with self._reporting(path):
            try:
                data = self._store.get(path)
            except ObjectNotFoundError:
                return
            listed = load_record(ManifestRecord, data, where=f"{self._store.url}/{path}").shards
            self._count()
            found = {record.shard: record for record in listed}
            differ = [
                shard
                for shard in sorted(found.keys() | shards.keys())
                if found.get(shard) != shards.get(shard) and not self._is_damaged(commit.commit_path(shard))
            ]
            if differ:
                shown = ", ".join(map(str, differ[:5]))
                raise CorruptionError(f"differs from the commit records of {len(differ)} shards ({shown})")

    def quarantine(self) -> list[QuarantineRecord]:
        """Shards that wait for another try."""
        with self._reporting("quarantine"):
            return [record for _, record in sorted(commit.load_quarantine(self._store).items())]
        return []

    def samples(self, plan: PlanRecord, meter: Meter) -> ShardLabels | None:
        """Check the samples table and the vocabulary; deep, return the labels of all shards."""
        records = [part.object for part in plan.parts]
        good = [self._object(record, None, meter) for record in (*records, plan.vocabulary)]
        if not self._deep or not all(good[:-1]):
            return None
        if good[-1]:
            with self._reporting(plan.vocabulary.path):
                read_parquet_object(self._store, plan.vocabulary).read(VOCABULARY_SCHEMA.names).cast(VOCABULARY_SCHEMA)
        for part in plan.parts:
            with self._reporting(part.object.path):
                _check_part(self._store, part)
        table = SamplesTable(self._store, plan)
        with self._reporting("samples"):
            return ShardLabels(table.index(), lambda samples: [table.tokens(i) for i in samples])
        return None

    def shards(
        self,
        records: Iterable[ShardRecord],
        identity: CacheIdentity | None,
        labels: ShardLabels | None,
        meter: Meter,
    ) -> None:
        """Every object of every committed shard; deep, the rows behind them."""

        def check(record: ShardRecord) -> None:
            good = [self._object(item, record.shard, meter) for item in record.objects]
            if self._deep and identity is not None and all(good):
                with self._reporting(commit.shard_prefix(record.shard, record.attempt), record.shard):
                    self._check_rows(record, identity, labels)

        self._each(check, records)

    def _commit(self, shard: int) -> ShardRecord | None:
        with self._reporting(commit.commit_path(shard), shard):
            record = commit.load_commit(self._store, shard)
            self._count()
            return record
        return None

    def _object(self, record: ObjectRecord, shard: int | None, meter: Meter) -> bool:
        """Whether an object is what its record says."""
        good = False
        with self._reporting(record.path, shard):
            CommittedObjects(self._store, [record]).get(record.path)
            self._count(1, record.size)
            good = True
        meter.advance(record.size)
        return good

    def _check_rows(self, record: ShardRecord, identity: CacheIdentity, labels: ShardLabels | None) -> None:
        topk = commit.read_rows(self._store, identity, record, slice(0, record.num_rows))
        if labels is None:
            return
        with self._lock:  # the samples table keeps what it has read, for one reader at a time
            observed = labels.of(record.shard, record.num_rows)
        where = f"shard {record.shard}"
        check_rows(topk, observed, identity.vocab_size, where=where, precision=identity.precision)
        for name, value in sum_statistics(topk, observed).items():
            committed = record.statistics.get(name)
            if committed is None or not abs(value - committed) <= STATISTICS_TOLERANCE * max(1, record.num_rows):
                raise CorruptionError(f"{where}: {name} is {value:.6g}, its commit record says {committed}")

    def _each(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """The function of each item, several at a time: a remote store answers slowly, but many at once."""
        pool = ThreadPoolExecutor(NUM_READERS)
        try:
            return list(pool.map(function, items))
        finally:
            pool.shutdown(cancel_futures=True)

    @contextmanager
    def _reporting(self, path: str, shard: int | None = None) -> Iterator[None]:
        """Whatever goes wrong over the bytes of this object is damage: decoders raise errors of all kinds."""
        try:
            yield
        except LogitCacheError as e:
            self._report(path, e, shard)
        except Exception as e:
            self._report(path, f"cannot be decoded: {type(e).__name__}: {e}", shard)

    def _report(self, path: str, problem: Exception | str, shard: int | None = None) -> None:
        text = str(problem).removeprefix(f"{self._store.url}/{path}: ").partition(_REMEDY_BEGINS)[0]
        with self._lock:
            self.damage.append(Damage(path, text, shard))

    def _is_damaged(self, path: str) -> bool:
        return any(found.path == path for found in self.damage)

    def _count(self, num_objects: int = 1, num_bytes: int = 0) -> None:
        with self._lock:
            self.num_objects += num_objects
            self.num_bytes += num_bytes


def _check_part(store: ObjectStore, part: PlanPart) -> None:
    """Every sample has the key of its tokens, and the numbers of tokens and targets that it says."""
    file = read_parquet_object(store, part.object)
    names = ["key", "num_tokens", "num_targets", *TOKEN_COLUMNS]
    sample = part.first_sample
    for group in range(file.num_row_groups):
        rows = zip(*(file.read_row_group(group, columns=[name]).column(0) for name in names), strict=True)
        for key, num_tokens, num_targets, input_ids, flat_ranges in rows:
            ids = input_ids.values.to_numpy()
            ranges = flat_ranges.values.to_numpy().reshape(-1, 2)
            if sample_key(ids, ranges) != key.as_py().hex():
                raise CorruptionError(f"sample {sample}: its key is not the hash of its tokens")
            _check_ranges(sample, ids, ranges, num_tokens.as_py(), num_targets.as_py())
            sample += 1
    if sample != part.first_sample + part.num_samples:
        raise CorruptionError(f"{sample - part.first_sample} samples, the plan says {part.num_samples}")


def _check_ranges(
    sample: int, ids: npt.NDArray[np.int32], ranges: npt.NDArray[np.int32], num_tokens: int, num_targets: int
) -> None:
    edges = ranges.ravel()
    ascending = len(edges) and edges[0] >= 1 and edges[-1] <= len(ids) and (np.diff(edges)[::2] > 0).all()
    if not ascending or (np.diff(edges)[1::2] < 0).any():
        raise CorruptionError(f"sample {sample}: target ranges {ranges.tolist()} in {len(ids)} tokens")
    if (num_tokens, num_targets) != (len(ids), int(np.diff(edges)[::2].sum())):
        raise CorruptionError(f"sample {sample}: says {num_tokens} tokens and {num_targets} targets, has others")
