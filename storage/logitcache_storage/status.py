"""How far a build is, from what stands on the store alone: it may run anywhere, or not at all."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache_storage.commit import load_commits, load_identity, load_quarantine
from logitcache_storage.errors import CorruptionError
from logitcache_storage.excluded import Excluded, committed_samples, excluded_samples, num_excluded
from logitcache_storage.objects import ObjectStore
from logitcache_storage.plans import load_plan
from logitcache_storage.samples import SamplesTable
from logitcache_storage.schema import CacheIdentity, PlanRecord, QuarantineRecord, ShardRecord


@dataclass(frozen=True)
class BuildStatus:
    """What is planned, what is committed, what is in quarantine."""

    url: str
    identity: CacheIdentity
    plan: PlanRecord | None
    """None until the build has written its plan."""
    num_shards: int
    """Committed shards; the same for rows, samples and bytes."""
    num_rows: int
    num_samples: int
    num_bytes: int
    """Of the committed shards, without the samples table."""
    busy_seconds: float
    """Time in which at least one worker was scoring a shard that is committed now."""
    last_commit: datetime.datetime | None
    quarantine: dict[int, QuarantineRecord]
    """Shards that could not be scored."""
    quarantine_num_samples: dict[int, int]
    """How many samples each of them has."""
    excluded: Excluded
    """Samples that could not be scored, of shards that are committed without them."""

    @property
    def is_complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.plan is not None and self.num_shards == len(self.plan.shard_num_rows)

    @property
    def num_lost_samples(self) -> int:
        """Samples that could not be scored, whole shards of them counted."""
        return sum(self.quarantine_num_samples.values()) + num_excluded(self.excluded)

    @property
    def rows_per_second(self) -> float | None:
        """Of all workers together, without pauses between runs; None where too short to tell."""
        return self.num_rows / self.busy_seconds if self.busy_seconds >= 1 and self.num_rows else None

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None where there is none, or no plan."""
        if self.plan is None or self.rows_per_second is None:
            return None
        lacking = sum(sample.num_rows for samples in self.excluded.values() for sample in samples)
        return (self.plan.num_rows - self.num_rows - lacking) / self.rows_per_second


def build_status(store: ObjectStore) -> BuildStatus:
    """The state of the build of the cache on a store.

    Raises:
        CacheNotFoundError: there is no cache.
        CorruptionError: its metadata is damaged.
    """
    identity, plan = load_identity(store), load_plan(store)
    records = load_commits(store, len(plan.shard_num_rows)) if plan is not None else {}
    commit_times = [_time(record.created) for record in records.values()]
    quarantine, excluded = load_quarantine(store), excluded_samples(records)
    num_samples, sizes = (0, {}) if plan is None else _count_samples(store, plan, records, quarantine, excluded)
    return BuildStatus(
        url=store.url,
        identity=identity,
        plan=plan,
        num_shards=len(records),
        num_rows=sum(record.num_rows for record in records.values()),
        num_samples=num_samples,
        num_bytes=sum(record.num_bytes for record in records.values()),
        busy_seconds=busy_seconds(records.values()),
        last_commit=max(commit_times, default=None),
        quarantine=quarantine,
        quarantine_num_samples=sizes,
        excluded=excluded,
    )


def status_data(status: BuildStatus) -> dict[str, Any]:
    """As JSON values; fields are only ever added."""
    plan = status.plan
    planned = plan and {
        "shards": len(plan.shard_num_rows),
        "rows": plan.num_rows,
        "samples": plan.num_samples,
        "tokens": plan.num_tokens,
        "report": plan.report,
    }
    return {
        "url": status.url,
        "complete": status.is_complete,
        "planned": planned,
        "committed": {
            "shards": status.num_shards,
            "rows": status.num_rows,
            "samples": status.num_samples,
            "bytes": status.num_bytes,
        },
        "bytes_per_row": status.num_bytes / status.num_rows if status.num_rows else None,
        "rows_per_second": status.rows_per_second,
        "seconds_left": status.seconds_left,
        "last_commit": status.last_commit and status.last_commit.isoformat(),
        "quarantine": [
            {
                "shard": shard,
                "samples": status.quarantine_num_samples.get(shard),
                "attempts": record.attempts,
                "reasons": list(record.reasons),
                "created": record.created,
            }
            for shard, record in sorted(status.quarantine.items())
        ],
        "quarantined_samples": [
            {"shard": shard, "key": sample.key, "source_id": source_id, "reason": sample.reason}
            for shard, samples in sorted(status.excluded.items())
            for sample in samples
            for source_id in sample.source_ids
        ],
        "lost_samples": status.num_lost_samples,
    }


def busy_seconds(records: Iterable[ShardRecord]) -> float:
    """Length of the union of the intervals in which these shards were scored."""
    ends = [(_time(record.created).timestamp(), record.seconds) for record in records]
    total, reached = 0.0, -np.inf
    for start, end in sorted((end - seconds, end) for end, seconds in ends):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _count_samples(
    store: ObjectStore,
    plan: PlanRecord,
    shards: Mapping[int, ShardRecord],
    quarantine: Iterable[int],
    excluded: Excluded,
) -> tuple[int, dict[int, int]]:
    """How many samples are committed, and how many each shard in quarantine has."""
    committed = np.zeros(len(plan.shard_num_rows), dtype=bool)
    committed[list(shards)] = True
    if committed.all() and not excluded:
        return plan.num_samples, {}
    planned = SamplesTable(store, plan).places()
    _, there = committed_samples(planned, committed, excluded, where=store.url)
    sizes = np.bincount(planned.shard, minlength=len(committed))
    return len(there), {shard: int(sizes[shard]) for shard in quarantine if shard < len(sizes)}


def _time(created: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(created).astimezone(datetime.UTC)
    except ValueError as e:
        raise CorruptionError(f"commit record with the time {created!r}, expected one of ISO 8601") from e
