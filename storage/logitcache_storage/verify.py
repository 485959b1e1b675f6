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
import pyarrow as pa

from logitcache_storage import commit, plans
from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import CorruptionError, LogitCacheError, ObjectNotFoundError, StoreError
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.invariants import check_rows
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.progress import Meter, progress
from logitcache_storage.record_json import load_record
from logitcache_storage.sample_index import PLACE_COLUMNS, index_bytes
from logitcache_storage.samples import TOKEN_COLUMNS, SamplesTable, read_vocabulary
from logitcache_storage.schema import (
    CacheIdentity,
    ExtensionRecord,
    ObjectRecord,
    PlanPart,
    PlanRecord,
    QuarantineRecord,
    ShardRecord,
)
from logitcache_storage.shard_labels import ShardLabels
from logitcache_storage.statistics import row_statistics, sum_statistics
from logitcache_storage.statistics_object import check_statistics, parse_statistics, summarise

NUM_READERS = 4
NUM_RECORD_READERS = 16  # records are small, and there may be 100,000
STATISTICS_TOLERANCE = 1e-5
"""Allowed difference of a mean from the committed one: another machine may sum in another order."""

_REMEDY_BEGINS = "; the object is damaged"
"""What every checksum error goes on with; a report of many says once what to do."""

_Item = TypeVar("_Item")
_Record = TypeVar("_Record")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be."""

    path: str
    """Below the cache."""
    problem: str
    shard: int | None = None
    """The shard that must be scored again; None where the object belongs to no shard."""
    is_unreachable: bool = False
    """Whether the store refused to answer: nothing is known of the object's bytes."""


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
    # In this order: beside a running build, what is read first is in what is read later.
    manifest, shards = check.manifest(), check.commits(quiet)
    plan = check.plan()
    check.sizes(shards, plan)
    check.same(manifest, shards, plan)
    quarantine = check.quarantine()
    total = sum(record.size for record in plan.objects) if plan else 0
    total += sum(o.size for record in shards.values() for o in record.objects)
    with progress("verifying", total=total, unit="B", quiet=quiet) as meter:
        labels = check.samples(plan, identity, meter) if plan else None
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
        self._lock, self._reading_labels = threading.Lock(), threading.Lock()
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
        """All plans as one; None where there is none yet, or one is damaged."""
        paths = plans.plan_paths(self._store)
        first = self._record(PlanRecord, plans.PLAN_PATH) if paths else None
        extensions = [self._record(ExtensionRecord, path) for path in paths[1:]]
        if first is None or None in extensions:
            return None
        with self._reporting(paths[-1]):
            found = plans.Plans(first, tuple(e for e in extensions if e is not None))
            return plans.join_plans(found, where=self._store.url)
        return None

    def commits(self, quiet: bool) -> dict[int, ShardRecord]:
        """All commit records that can be read."""
        numbers = sorted(commit.committed_shards(self._store))
        with progress("reading records", total=len(numbers), unit="records", quiet=quiet) as meter:
            found = self._each(lambda shard: self._commit(shard, meter), numbers, NUM_RECORD_READERS)
        return {record.shard: record for record in found if record is not None}

    def sizes(self, shards: Mapping[int, ShardRecord], plan: PlanRecord | None) -> None:
        """Every committed shard must be planned, with as many rows."""
        sizes = plan.shard_num_rows if plan else ()
        if plan is None and shards and not any(found.path.startswith("plans/") for found in self.damage):
            self._report(plans.PLAN_PATH, f"missing, and {len(shards)} shards are committed")
        for shard, record in shards.items():
            found = record.num_planned_rows
            if plan is not None and (shard >= len(sizes) or sizes[shard] != found):
                planned = f"{sizes[shard]} rows" if shard < len(sizes) else f"only {len(sizes)} shards"
                self._report(commit.commit_path(shard), f"{found} rows; the plan has {planned}", shard)

    def manifest(self) -> Mapping[int, ShardRecord] | None:
        """What the manifest lists; None where there is none, or it is damaged."""
        try:
            found = commit.load_manifest(self._store)
        except LogitCacheError as e:
            is_table = str(e).startswith(f"{self._store.url}/{commit.MANIFEST_TABLE_PATH}")
            self._report(commit.MANIFEST_TABLE_PATH if is_table else commit.MANIFEST_PATH, e)
            return None
        self._count(0 if found is None else 2)  # the record and its table
        return found

    def same(
        self, manifest: Mapping[int, ShardRecord] | None, shards: Mapping[int, ShardRecord], plan: PlanRecord | None
    ) -> None:
        """The manifest must say what the commit records say: readers open it instead of them.

        One with fewer shards than are planned is older than an extension, and readers do not ask it.
        """
        if manifest is None:
            return
        is_older = plan is not None and len(manifest) < len(plan.shard_num_rows)
        compared = manifest.keys() if is_older else manifest.keys() | shards.keys()
        differ: list[int] = []
        with self._reporting(commit.MANIFEST_TABLE_PATH):
            differ += (shard for shard in sorted(compared) if manifest.get(shard) != shards.get(shard))
        differ = [shard for shard in differ if not self._is_damaged(commit.commit_path(shard))]
        if differ:
            shown = ", ".join(map(str, differ[:5]))
            self._report(commit.MANIFEST_PATH, f"differs from the commit records of {len(differ)} shards ({shown})")

    def quarantine(self) -> list[QuarantineRecord]:
        """Shards that wait for another try."""
        paths = self._store.list("quarantine")
        committed = commit.committed_shards(self._store) if paths else set()
        found = [record for path in paths if (record := self._record(QuarantineRecord, path)) is not None]
        return sorted((record for record in found if record.shard not in committed), key=lambda r: r.shard)

    def samples(self, plan: PlanRecord, identity: CacheIdentity | None, meter: Meter) -> ShardLabels | None:
        """Check the samples table and the vocabulary; deep, return the labels of all shards."""
        good = {record.path: self._object(record, None, meter) for record in plan.objects}
        is_vocabulary_good = good.pop(plan.vocabulary.path)
        if not self._deep or not all(good.values()):
            return None
        if is_vocabulary_good and identity is not None:
            with self._reporting(plan.vocabulary.path):
                read_vocabulary(self._store, plan.vocabulary, identity.vocab_size)
        table = SamplesTable(self._store, plan)
        columns: pa.Schema | None = None
        for part in plan.parts:
            with self._reporting(part.object.path):
                found = _check_part(table, part)
                columns = columns or found
                if not found.equals(columns):
                    raise CorruptionError("has other columns than the parts before it")
            if part.index is not None:
                with self._reporting(part.index.path):
                    _check_index(self._store, table, part, part.index)
        if any(self._is_damaged(part.object.path) for part in plan.parts):
            return None
        with self._reporting("samples"):
            return ShardLabels(table.places(), table.keys, lambda samples: [table.tokens(i) for i in samples])
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
            good = [self._object(item, record.shard, meter) for item in record.row_objects]
            # Statistics can be made again from the rows: what is wrong with them is not wrong with the shard.
            statistics = record.statistics_object
            if statistics is not None and not self._object(statistics, None, meter):
                statistics = None
            is_planned = not self._is_damaged(commit.commit_path(record.shard))
            if self._deep and identity is not None and is_planned and all(good):
                with self._reporting(commit.shard_prefix(record.shard, record.attempt), record.shard):
                    self._check_rows(record, identity, labels, statistics)

        self._each(check, records)

    def _record(self, kind: type[_Record], path: str) -> _Record | None:
        """A record, or None where it is damaged or missing."""
        with self._reporting(path):
            record = load_record(kind, self._store.get(path), where=f"{self._store.url}/{path}")
            self._count()
            return record
        return None

    def _commit(self, shard: int, meter: Meter) -> ShardRecord | None:
        meter.advance()
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

    def _check_rows(
        self,
        record: ShardRecord,
        identity: CacheIdentity,
        labels: ShardLabels | None,
        statistics: ObjectRecord | None,
    ) -> None:
        topk = commit.read_rows(self._store, identity, record, slice(0, record.num_rows))
        if labels is None:
            return
        by_sample = self._labels(labels, record)
        if by_sample is None:
            return
        observed = np.concatenate([np.zeros(0, np.int32), *by_sample])
        where = f"shard {record.shard}"
        check_rows(topk, observed, identity.vocab_size, where=where, precision=identity.precision)
        rows = row_statistics(topk, observed)
        for name, value in sum_statistics(topk, rows).items():
            committed = record.statistics.get(name)
            if committed is None or not abs(value - committed) <= STATISTICS_TOLERANCE * max(1, record.num_rows):
                raise CorruptionError(f"{where}: {name} is {value:.6g}, its commit record says {committed}")
        if statistics is not None:
            with self._reporting(statistics.path):
                found = CommittedObjects(self._store, [statistics]).get(statistics.path)
                expected = summarise(rows, topk, [len(sample) for sample in by_sample])
                check_statistics(parse_statistics(found, record.num_rows, where=where), expected, where=where)

    def _labels(self, labels: ShardLabels, record: ShardRecord) -> list[npt.NDArray[np.int32]] | None:
        """What is wrong with the labels is wrong with the samples: scoring the shard again would change nothing."""
        # The samples table keeps what it has read, for one reader at a time.
        with self._reading_labels, self._reporting("samples"):
            return labels.by_sample(record.shard, record.num_rows, record.excluded or ())
        return None

    def _each(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item], num_readers: int = NUM_READERS
    ) -> list[_Result]:
        """The function of each item, several at a time: a remote store answers slowly, but many at once."""
        pool = ThreadPoolExecutor(num_readers)
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
        is_unreachable = isinstance(problem, StoreError) and not isinstance(problem, ObjectNotFoundError)
        with self._lock:
            self.damage.append(Damage(path, text, shard, is_unreachable))

    def _is_damaged(self, path: str) -> bool:
        return any(found.path == path for found in self.damage)

    def _count(self, num_objects: int = 1, num_bytes: int = 0) -> None:
        with self._lock:
            self.num_objects += num_objects
            self.num_bytes += num_bytes


def _check_part(table: SamplesTable, part: PlanPart) -> pa.Schema:
    """Every sample has the key of its tokens, and the numbers of tokens and targets that it says."""
    schema = pa.schema([])
    for first_sample, group in table.scan_part(part):
        schema = group.schema
        rows = zip(*(group.column(name) for name in ("key", "num_tokens", "num_targets", *TOKEN_COLUMNS)), strict=True)
        for sample, (key, num_tokens, num_targets, input_ids, flat_ranges) in enumerate(rows, first_sample):
            ids = input_ids.values.to_numpy()
            ranges = flat_ranges.values.to_numpy().reshape(-1, 2)
            if sample_key(ids, ranges) != key.as_py().hex():
                raise CorruptionError(f"sample {sample}: its key is not the hash of its tokens")
            _check_ranges(sample, ids, ranges, num_tokens.as_py(), num_targets.as_py())
    return schema


def _check_index(store: ObjectStore, table: SamplesTable, part: PlanPart, index: ObjectRecord) -> None:
    """Readers look at the index instead of the columns that it repeats."""
    columns = pa.concat_tables([group for _, group in table.scan_part(part, [*PLACE_COLUMNS, "key"])])
    if CommittedObjects(store, [index]).get(index.path) != index_bytes(columns):
        raise CorruptionError(f"differs from {part.object.path}, whose columns it repeats")


def _check_ranges(
    sample: int, ids: npt.NDArray[np.int32], ranges: npt.NDArray[np.int32], num_tokens: int, num_targets: int
) -> None:
    edges = ranges.ravel()
    ascending = len(edges) and edges[0] >= 1 and edges[-1] <= len(ids) and (np.diff(edges)[::2] > 0).all()
    if not ascending or (np.diff(edges)[1::2] < 0).any():
        raise CorruptionError(f"sample {sample}: target ranges {ranges.tolist()} in {len(ids)} tokens")
    if (num_tokens, num_targets) != (len(ids), int(np.diff(edges)[::2].sum())):
        raise CorruptionError(f"sample {sample}: says {num_tokens} tokens and {num_targets} targets, has others")
