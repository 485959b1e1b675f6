"""Damaged shards are set aside, so that the next build scores just those; what only repeats others is written anew.

In this order, so that an interrupted repair loses nothing and the same command continues it:

    a commit record that is damaged or missing is put back from the manifest, if that has it     before the check
    the manifest is deleted                                         readers fall back to the commit records
    of each damaged shard the commit record is copied to damaged/, the reason goes to quarantine/, then the commit goes
    statistics of samples that are damaged are made again from the rows of their shard
    the manifest is written again, if every shard is there

Nothing but records is ever deleted. The objects of a shard that was set aside stay until `gc`; a reader that has the
cache open still reads what is good of them.
"""

from __future__ import annotations

import datetime
import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from logitcache_storage import commit
from logitcache_storage.cache import Cache
from logitcache_storage.committed import object_record
from logitcache_storage.errors import CorruptionError, ObjectNotFoundError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.plans import load_plan
from logitcache_storage.progress import progress
from logitcache_storage.record_json import dump_record
from logitcache_storage.sample_statistics import compute_statistics
from logitcache_storage.schema import STATISTICS_SUFFIX, CacheIdentity, QuarantineRecord, ShardRecord
from logitcache_storage.statistics_object import dump_statistics
from logitcache_storage.verify import NUM_RECORD_READERS, Damage, VerifyReport

_MANIFEST = (commit.MANIFEST_PATH, commit.MANIFEST_TABLE_PATH)

MAX_REASONS = 5
"""Problems of a shard that its quarantine record names."""


@dataclass(frozen=True)
class RepairReport:
    """What was done, and what is left."""

    restored: tuple[int, ...]
    """Shards whose commit record was put back from the manifest."""
    set_aside: tuple[int, ...]
    """Shards that the next build scores again."""
    remade: tuple[str, ...]
    """Statistics that were made again from the rows."""
    removed: tuple[str, ...]
    """Records that were deleted, because they were damaged and only repeated others."""
    left: tuple[Damage, ...]
    """What cannot be repaired from the cache itself, or could not be reached."""

    @property
    def is_whole(self) -> bool:
        """Whether no damage is left; shards may be waiting to be scored."""
        return not self.left


def is_repairable(found: Damage) -> bool:
    """Whether it can be scored again, or only repeats what is elsewhere; not so what the store did not answer for."""
    is_repeated = found.path in _MANIFEST or found.path.startswith("quarantine/") or _is_statistics(found)
    return not found.is_unreachable and (found.shard is not None or is_repeated)


def restore_commits(store: ObjectStore, *, quiet: bool = True) -> tuple[int, ...]:
    """Put back from the manifest the commit records that are damaged or missing; returns their shards.

    What they list is checked by the `verify_cache` that follows. `quiet`: show no progress.
    """
    try:
        plan, listed = load_plan(store), commit.load_manifest(store)
    except CorruptionError:
        return ()
    if plan is None or listed is None:
        return ()
    sizes, there = plan.shard_num_rows, commit.committed_shards(store)
    lost: list[int] = []
    restored: list[int] = []
    with (
        progress("reading records", total=len(listed), unit="records", quiet=quiet) as meter,
        ThreadPoolExecutor(NUM_RECORD_READERS) as pool,
    ):
        found = pool.map(lambda shard: _readable_commit(store, shard) if shard in there else None, listed)
        for shard, record in zip(listed, found, strict=True):
            lost += [] if record else [shard]
            meter.advance()
    for shard in lost:
        record = listed[shard]
        if shard < len(sizes) and record.num_planned_rows == sizes[shard]:
            store.put(commit.commit_path(shard), dump_record(record))
            restored.append(shard)
    return tuple(restored)


def repair_cache(store: ObjectStore, report: VerifyReport, *, restored: Sequence[int] = ()) -> RepairReport:
    """Set aside what the report calls damaged; see the head of this file.

    Args:
        store: where the cache is.
        report: what `verify_cache` has just found.
        restored: what `restore_commits` did before.
    """
    problems: dict[int, list[Damage]] = {}
    statistics: list[Damage] = []
    removed: list[str] = []
    left: list[Damage] = []
    for found in report.damage:
        if not is_repairable(found):
            left.append(found)
        elif found.shard is not None:
            problems.setdefault(found.shard, []).append(found)
        elif _is_statistics(found):
            statistics.append(found)
        else:
            removed.append(found.path)
    if problems or not {*removed}.isdisjoint(_MANIFEST):
        store.delete(commit.MANIFEST_PATH)  # without its record the table is not looked at
    for path in removed:
        store.delete(path)
    damaged = {shard: listed for shard, listed in problems.items() if _is_still_damaged(store, shard, listed)}
    for shard, listed in sorted(damaged.items()):
        is_planned = shard < report.num_planned_shards
        reasons = [f"set aside by 'logitcache verify --repair': {p.path}: {p.problem}" for p in listed[:MAX_REASONS]]
        set_aside(store, shard, reasons if is_planned else [])
    remade, lost = _remake_statistics(store, statistics)
    _write_manifest(store)
    return RepairReport(tuple(restored), tuple(sorted(damaged)), remade, tuple(removed), (*left, *lost))


def build_command(identity: CacheIdentity, url: str) -> str:
    """The command that made the cache, as far as the cache knows it."""
    teacher = identity.teacher
    options: Mapping[str, object] = {
        "--teacher": teacher.id,
        **({"--revision": teacher.revision} if teacher.revision else {}),
        "--data": "...",
        "--cache": url,
        "--engine": teacher.engine,
        "--dtype": teacher.dtype,
        "--k": identity.k,
        "--kept-mass": identity.kept_mass,
        "--precision": identity.precision,
        "--format": identity.container,
        "--shard-rows": identity.shard_rows,
        **({} if identity.role == "teacher" else {"--role": identity.role}),
    }
    return " ".join(["logitcache build", *(f"{name} {shlex.quote(str(value))}" for name, value in options.items())])


def _readable_commit(store: ObjectStore, shard: int) -> ShardRecord | None:
    try:
        return commit.load_commit(store, shard)
    except (CorruptionError, ObjectNotFoundError):
        return None


def _is_still_damaged(store: ObjectStore, shard: int, problems: Iterable[Damage]) -> bool:
    """Whether the commit record is the one that was found wanting: a build may have replaced it since."""
    record = _readable_commit(store, shard)
    if record is None:
        return True
    own = (commit.commit_path(shard), commit.shard_prefix(shard, record.attempt))
    return any(found.path.startswith(own) for found in problems)


def set_aside(store: ObjectStore, shard: int, reasons: Sequence[str]) -> None:
    """Keep the commit record of a shard as `damaged/` and delete it, so that the next build scores the shard.

    Args:
        store: where the cache is; its manifest is gone already.
        shard: does nothing where it is not committed.
        reasons: for its quarantine record; without any there is none.
    """
    path = commit.commit_path(shard)
    try:
        data = store.get(path)
    except ObjectNotFoundError:  # an earlier repair was interrupted right here, or another one is at work
        return
    record = _readable_commit(store, shard)
    name = record.attempt if record else hashlib.blake2b(data, digest_size=8).hexdigest()
    store.put(f"damaged/{shard:05d}-{name}.json", data)
    if reasons:
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        store.put(commit.quarantine_path(shard), dump_record(QuarantineRecord(shard, 0, tuple(reasons), created)))
    store.delete(path)


def _is_statistics(found: Damage) -> bool:
    return found.path.endswith(STATISTICS_SUFFIX)


def _remake_statistics(store: ObjectStore, damage: Sequence[Damage]) -> tuple[tuple[str, ...], list[Damage]]:
    """Paths of the statistics that were written again, and the damage for which that did not work.

    A commit record lists the checksum of its statistics. Made on another machine they may differ in the last bit; then
    the record is written again, too, and readers that have the cache open compute statistics of their own.
    """
    remade: list[str] = []
    lost: list[Damage] = []
    cache = _opened(store) if damage else None
    if cache is None:
        return (), [*damage]
    for found in damage:
        record = cache.shards.get(int(found.path.split("/")[1].split("-")[0]))
        item = None if record is None else record.statistics_object
        if record is None or item is None or item.path != found.path:
            continue  # its shard was set aside, or is another one by now
        try:
            samples = np.flatnonzero(cache.index.shard == record.shard)
            data = dump_statistics(compute_statistics(cache, record, samples))
        except CorruptionError:
            lost.append(found)
            continue
        made = object_record(item.path, data)
        if made != item:
            objects = tuple(made if other == item else other for other in record.objects)
            record = replace(record, objects=objects, num_bytes=sum(other.size for other in objects))
            store.delete(commit.MANIFEST_PATH)
        store.put(item.path, data)
        store.put(commit.commit_path(record.shard), dump_record(record))
        remade.append(item.path)
    return tuple(remade), lost


def _opened(store: ObjectStore) -> Cache | None:
    """The cache, where its plan and samples can be read."""
    try:
        plan = load_plan(store)
        if plan is None:
            return None
        return Cache(store, commit.load_identity(store), plan, commit.load_commits(store, len(plan.shard_num_rows)))
    except CorruptionError:
        return None


def _write_manifest(store: ObjectStore) -> None:
    """Where every shard is there and it is not: readers open the cache without reading each commit."""
    try:
        plan = load_plan(store) if commit.load_manifest(store) is None else None
        if plan is not None and commit.committed_shards(store) == set(range(len(plan.shard_num_rows))):
            commit.write_manifest(store, commit.load_commits(store))
    except CorruptionError:  # what is damaged here is in the report
        return
