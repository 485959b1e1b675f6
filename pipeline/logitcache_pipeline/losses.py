"""What a build could not score: whole shards, and single samples of shards that are committed without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache_pipeline.log import Log
from logitcache_storage.commit import MANIFEST_PATH, load_commits, load_quarantine
from logitcache_storage.excluded import Excluded, excluded_samples, num_excluded
from logitcache_storage.objects import ObjectStore
from logitcache_storage.repair import set_aside
from logitcache_storage.samples import SamplesTable
from logitcache_storage.schema import PlanRecord, ShardRecord
from logitcache_storage.terminal import counted

MOST_NAMED = 3
"""Samples of a lost shard that are named."""


@dataclass(frozen=True)
class LostShard:
    """A shard that is not committed."""

    shard: int
    num_samples: int
    source_ids: tuple[str, ...]
    """Of its first samples."""
    reason: str


@dataclass(frozen=True)
class Losses:
    """All that is planned and not in the cache."""

    shards: tuple[LostShard, ...]
    excluded: Excluded

    @property
    def num_samples(self) -> int:
        """Samples that the cache lacks."""
        return sum(lost.num_samples for lost in self.shards) + num_excluded(self.excluded)

    def summary(self, num_planned: int) -> str:
        """How many there are; `num_planned` shards were planned."""
        whole = sum(lost.num_samples for lost in self.shards)
        shards = f"{len(self.shards):,} of {counted(num_planned, 'shard')} ({counted(whole, 'sample')})"
        samples = counted(num_excluded(self.excluded), "sample")
        found = [shards] * bool(self.shards) + [samples] * bool(self.excluded)
        return f"{' and '.join(found)} could not be scored"

    def lines(self) -> list[str]:
        """Every shard and every sample, and why."""
        lines = []
        for lost in self.shards:
            more = ", ..." if lost.num_samples > len(lost.source_ids) else ""
            names = f"{counted(lost.num_samples, 'sample')}: {', '.join(lost.source_ids)}{more}"
            lines.append(f"shard {lost.shard} ({names}): {lost.reason}")
        for shard, samples in sorted(self.excluded.items()):
            for sample in samples:
                names = ", ".join(sample.source_ids)
                lines.append(f"sample {names} (key {sample.key}, shard {shard}): {sample.reason}")
        return lines

    def remedy(self) -> str:
        """What to do about it."""
        how = " with --retry-quarantine" if self.excluded else ""
        return f"mend the cause and run the same command{how} to score them"

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "lost": {str(lost.shard): lost.reason for lost in self.shards},
            "quarantined_samples": [
                {"shard": shard, "key": sample.key, "source_ids": sample.source_ids, "reason": sample.reason}
                for shard, samples in sorted(self.excluded.items())
                for sample in samples
            ],
            "lost_samples": self.num_samples,
        }


def find_losses(store: ObjectStore, plan: PlanRecord, records: Mapping[int, ShardRecord]) -> Losses:
    """What the plan has and these commit records have not."""
    missing = [shard for shard in range(len(plan.shard_num_rows)) if shard not in records]
    if not missing:
        return Losses((), excluded_samples(records))
    quarantined, table = load_quarantine(store), SamplesTable(store, plan)
    shard_of = table.places().shard
    order = np.argsort(shard_of, kind="stable")
    edges = np.searchsorted(shard_of[order], [(shard, shard + 1) for shard in missing])
    lost = []
    for shard, (start, stop) in zip(missing, edges, strict=True):
        reasons = quarantined[shard].reasons if shard in quarantined else ()
        first = table.describe(order[start : min(stop, start + MOST_NAMED)].tolist())
        source_ids = tuple(about["source_id"] for about in first)
        lost.append(LostShard(shard, int(stop - start), source_ids, reasons[-1] if reasons else "not tried"))
    return Losses(tuple(lost), excluded_samples(records))


def set_aside_incomplete(store: ObjectStore, plan: PlanRecord, log: Log) -> None:
    """Make the shards that lack samples wait for another try; what they hold stays as garbage until `gc`."""
    excluded = excluded_samples(load_commits(store, len(plan.shard_num_rows)))
    if not excluded:
        return
    store.delete(MANIFEST_PATH)  # before its commits: a reader would believe it
    for shard, samples in sorted(excluded.items()):
        set_aside(store, shard, [f"{', '.join(sample.source_ids)}: {sample.reason}" for sample in samples])
    text = f"{counted(num_excluded(excluded), 'sample')} of {counted(len(excluded), 'shard')} will be tried again"
    log.info("retry_quarantine", text, shards=sorted(excluded))
