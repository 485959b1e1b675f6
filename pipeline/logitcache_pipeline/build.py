"""A build from beginning to end: corpus -> identity -> plan -> scored shards -> manifest.

Every step is repeatable. What is done is read from the store, so the same command continues a build that was stopped
anywhere, from any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_pipeline.cluster import Cluster, check_reachable, ray_cluster
from logitcache_pipeline.plan import render_report
from logitcache_pipeline.prepare import Prepared, plan_summary, prepare, write_plan
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.worker import ScoringWorker, ShardOutcome, ShardTask, TeacherSettings
from logitcache_storage.commit import (
    MANIFEST_PATH,
    committed_shards,
    create_or_continue,
    load_commits,
    load_quarantine,
    quarantine_shard,
    write_manifest,
)
from logitcache_storage.errors import BuildError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.progress import Meter, progress
from logitcache_storage.samples import SamplesTable
from logitcache_storage.schema import PlanRecord
from logitcache_storage.terminal import format_duration

Say = Callable[[str], None]


def build(
    settings: BuildSettings,
    *,
    storage_options: Mapping[str, Any] | None = None,
    data_storage_options: Mapping[str, Any] | None = None,
    say: Say = print,
) -> None:
    """Make a cache, or continue one.

    Args:
        settings: what to build.
        storage_options: for the cache's URL, handed to fsspec.
        data_storage_options: for the corpus's URLs, handed to fsspec.
        say: takes a line for people.

    Raises:
        InputError: something is wrong that can be known before the first shard.
        BuildError: shards are quarantined; all others are committed.
    """
    if settings.ray_address is not None:
        check_reachable(settings.ray_address)
    prepared = prepare(settings, data_storage_options)
    if settings.dry_run:
        _say_plan(prepared, say)
        return
    store = open_store(_seen_from_anywhere(settings.cache), storage_options)
    with ray_cluster(settings.ray_address, settings.workers, settings.gpus_per_worker) as cluster:
        plan, dtype = _claim(store, prepared, cluster, say)
        tasks = remaining_tasks(store, plan)
        if tasks:
            if len(tasks) < len(plan.shard_num_rows):
                done = len(plan.shard_num_rows) - len(tasks)
                say(f"continuing: {done:,} of {len(plan.shard_num_rows):,} shards are committed")
            # One that an earlier run wrote names commits that have been removed since.
            store.delete(MANIFEST_PATH)
            path = _seen_from_anywhere(settings.teacher) if Path(settings.teacher).is_dir() else settings.teacher
            teacher = TeacherSettings(settings.engine, path, dtype, tokens_per_batch=settings.tokens_per_batch)
            make_worker = cluster.actor_maker(ScoringWorker, store.url, storage_options, teacher)
            _score(store, plan, tasks, make_worker, cluster, settings)
    finish(store, plan, say)


def remaining_tasks(store: ObjectStore, plan: PlanRecord) -> list[ShardTask]:
    """The shards of the plan that are not committed, in order."""
    committed = committed_shards(store)
    if len(committed) == len(plan.shard_num_rows):
        return []
    samples = _samples_of_shards(SamplesTable(store, plan).index(), len(plan.shard_num_rows))
    return [
        ShardTask(shard, samples[shard], num_rows)
        for shard, num_rows in enumerate(plan.shard_num_rows)
        if shard not in committed
    ]


def finish(store: ObjectStore, plan: PlanRecord, say: Say) -> None:
    """Write the manifest of a complete cache, or say what is missing.

    Raises:
        BuildError: shards are missing.
    """
    records = load_commits(store)
    if len(records) == len(plan.shard_num_rows):
        write_manifest(store, records)
        num_bytes = sum(record.num_bytes for record in records.values())
        say(
            f"complete: {plan.num_samples:,} samples, {plan.num_rows:,} target tokens in {len(records):,} shards,"
            f" {num_bytes / 1e6:,.1f} MB ({num_bytes / plan.num_rows:.1f} bytes per target token)"
        )
        return
    quarantined = load_quarantine(store)
    reasons = "\n".join(
        f"  shard {shard}: {record.reasons[-1] if record.reasons else 'no reason recorded'}"
        for shard, record in sorted(quarantined.items())[:10]
    )
    missing = len(plan.shard_num_rows) - len(records)
    raise BuildError(
        f"{missing:,} of {len(plan.shard_num_rows):,} shards could not be scored; the others are committed.\n"
        f"{reasons}\nmend the cause and run the same command to score them; 'logitcache status {store.url}' lists all"
    )


def _samples_of_shards(index: pa.Table, num_shards: int) -> list[npt.NDArray[np.int64]]:
    """For each shard, the samples whose rows it holds, in the order of the rows."""
    shard, first_row = (index.column(name).to_numpy().astype(np.int64) for name in ("shard", "first_row"))
    # The first sample at a place owns its rows: duplicates come later in the plan.
    _, owners = np.unique(shard << 32 | first_row, return_index=True)
    return np.split(owners, np.searchsorted(shard[owners], np.arange(1, num_shards)))


def _seen_from_anywhere(path: str) -> str:
    """Workers run in folders of their own."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _say_plan(prepared: Prepared, say: Say) -> None:
    summary = plan_summary(prepared)
    say(render_report(summary.report))
    say(f"{len(summary.shard_num_rows):,} shards of up to {prepared.shard_rows:,} target rows; nothing was written")


def _claim(store: ObjectStore, prepared: Prepared, cluster: Cluster, say: Say) -> tuple[PlanRecord, str]:
    """Make the cache this build's, or find that it is; returns its plan and the teacher's dtype."""
    dtype = prepared.settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cluster.gpus_per_worker > 0 else "float32"
    create_or_continue(store, prepared.identity(dtype))
    plan = load_plan(store) or write_plan(store, prepared)
    say(render_report(plan.report))
    return plan, dtype


def _score(
    store: ObjectStore,
    plan: PlanRecord,
    tasks: list[ShardTask],
    make_worker: Callable[[], Any],
    cluster: Cluster,
    settings: BuildSettings,
) -> None:
    from logitcache_pipeline.run import RunSettings, run_shards

    left = sum(task.num_rows for task in tasks)
    patience = RunSettings(cluster.num_workers, settings.max_attempts, settings.shard_deadline)
    with progress("scoring", total=plan.num_rows, done=plan.num_rows - left, unit="tok") as meter:
        run_shards(tasks, make_worker, patience, _Report(store, meter))


class _Report:
    """What happens, to the meter and to the store."""

    def __init__(self, store: ObjectStore, meter: Meter) -> None:
        self._store, self._meter = store, meter

    def committed(self, outcome: ShardOutcome) -> None:
        self._meter.advance(outcome.num_rows)

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        self._meter.note(f"shard {shard}, attempt {attempt} failed: {reason}")

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        self._meter.note(f"shard {shard} is quarantined after {len(reasons)} attempts")
        quarantine_shard(self._store, shard, reasons)

    def worker_failed(self, reason: str) -> None:
        self._meter.note(f"a worker cannot start: {reason}")

    def waiting(self, seconds: float) -> None:
        self._meter.note(
            f"no worker has started for {format_duration(seconds)}: the teacher is being loaded, or the Ray cluster has"
            " no room for a worker ('ray status' says)"
        )
