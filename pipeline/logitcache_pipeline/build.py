"""A build from beginning to end: corpus -> identity -> plan -> scored shards -> manifest.

Every step is repeatable. What is done is read from the store, so the same command continues a build that was stopped
anywhere, from any machine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitcache_pipeline.cluster import Cluster, check_reachable, node_hardware, ray_cluster
from logitcache_pipeline.estimate import estimate, render_estimate
from logitcache_pipeline.log import Log, Say
from logitcache_pipeline.losses import find_losses, set_aside_incomplete
from logitcache_pipeline.metrics import BuildMetrics
from logitcache_pipeline.plan import render_report
from logitcache_pipeline.prepare import Prepared, prepare, prepare_extension, write_extension, write_plan
from logitcache_pipeline.report import RunReport, save_report
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.watch import RunWatcher, wait_for_store
from logitcache_pipeline.worker import ScoringWorker, ShardTask, TeacherSettings
from logitcache_storage.commit import (
    MANIFEST_PATH,
    committed_shards,
    create_or_continue,
    load_commits,
    load_identity,
    new_attempt,
    write_manifest,
)
from logitcache_storage.errors import BuildError, InputError, LogitCacheError, MismatchError
from logitcache_storage.objects import ObjectStore, check_writable, open_store
from logitcache_storage.plans import Plans, join_plans, load_plan, load_plans
from logitcache_storage.progress import progress
from logitcache_storage.samples import SamplesTable
from logitcache_storage.schema import PlanRecord
from logitcache_storage.shard_labels import row_owners
from logitcache_storage.terminal import counted

if TYPE_CHECKING:
    from logitcache_pipeline.actors import ActorMaker


def build(
    settings: BuildSettings,
    *,
    storage_options: Mapping[str, Any] | None = None,
    data_storage_options: Mapping[str, Any] | None = None,
    say: Say = print,
) -> None:
    """Make a cache, continue one, or extend one.

    Args:
        settings: what to build.
        storage_options: for the cache's URL, handed to fsspec.
        data_storage_options: for the corpus's URLs, handed to fsspec.
        say: takes a line, of the settings' `log_format`.

    Raises:
        InputError: something is wrong that can be known before the first shard.
        BuildError: more samples are quarantined than `allow_quarantine` says; all others are committed.
    """
    log = Log(say, settings.log_format == "json")
    if settings.dry_run:
        found = dry_run(settings, storage_options=storage_options, data_storage_options=data_storage_options)
        log.info("estimate", render_estimate(found), estimate=found)
        return
    store, prepared = _prepare(settings, storage_options, data_storage_options)
    if settings.extend:
        prepared = _extend(store, prepared, log)
    workers = settings.workers, settings.devices_per_worker, settings.nodes_per_worker
    with ray_cluster(settings.ray_address, *workers) as cluster:
        plan, dtype = _claim(store, prepared, cluster, log)
        if settings.retry_quarantine:
            set_aside_incomplete(store, plan, log)
        tasks = remaining_tasks(store, plan)
        if tasks:
            random.shuffle(tasks)  # two builds of one cache at a time begin at different shards
            if len(tasks) < len(plan.shard_num_rows):
                done = len(plan.shard_num_rows) - len(tasks)
                text = f"continuing: {done:,} of {len(plan.shard_num_rows):,} shards are committed"
                log.info("continuing", text, committed=done, planned=len(plan.shard_num_rows))
            # One that an earlier run wrote names commits that have been removed since.
            store.delete(MANIFEST_PATH)
            path = _seen_from_anywhere(settings.teacher) if Path(settings.teacher).is_dir() else settings.teacher
            # The commit that the cache is of: a branch may have moved on when a worker loads it.
            revision = load_identity(store).teacher.revision or None
            teacher = TeacherSettings(settings.engine, path, dtype, settings.teacher_options | {"revision": revision})
            make_worker = cluster.actor_maker(ScoringWorker, store.url, storage_options, teacher)
            _say_what_scores(settings, cluster, min(cluster.num_workers, len(tasks)), log)
            _score(store, plan, tasks, make_worker, cluster, settings, log)
    wait_for_store(lambda: finish(store, plan, log, settings.allow_quarantine), log)


def dry_run(
    settings: BuildSettings,
    *,
    storage_options: Mapping[str, Any] | None = None,
    data_storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the build would take (`estimate.estimate`); the arguments are those of `build`.

    Raises:
        InputError: something is wrong that can be known before the first shard.
    """
    return estimate(*_prepare(settings, storage_options, data_storage_options))


def remaining_tasks(store: ObjectStore, plan: PlanRecord) -> list[ShardTask]:
    """The shards of the plan that are not committed, in order."""
    missing = sorted(set(range(len(plan.shard_num_rows))) - committed_shards(store))
    if not missing:
        return []
    places = SamplesTable(store, plan).places()
    owners, _ = row_owners(places.shard, places.first_row)
    ends = np.searchsorted(places.shard[owners], np.arange(1, len(plan.shard_num_rows)))
    samples = np.split(owners, ends)
    return [
        ShardTask(shard, samples[shard], plan.shard_num_rows[shard], int(places.num_tokens[samples[shard]].sum()))
        for shard in missing
    ]


def finish(store: ObjectStore, plan: PlanRecord, log: Log, allow_quarantine: int = 0) -> None:
    """Write the manifest, if every shard is there; say what is missing: each shard and each sample, and why.

    Raises:
        BuildError: more samples are missing than `allow_quarantine`.
    """
    num_shards = len(plan.shard_num_rows)
    records = load_commits(store, num_shards)
    num_rows = sum(record.num_rows for record in records.values())
    num_bytes = sum(record.num_bytes for record in records.values())
    if len(records) == num_shards:
        now = load_plan(store)
        if now is not None and len(now.shard_num_rows) == num_shards:  # else another build is extending the cache
            write_manifest(store, records)
    if len(records) == num_shards and num_rows == plan.num_rows:
        text = (
            f"complete: {counted(plan.num_samples, 'sample')}, {plan.num_rows:,} target tokens in"
            f" {counted(len(records), 'shard')},"
            f" {num_bytes / 1e6:,.1f} MB ({num_bytes / plan.num_rows:.1f} bytes per target token)"
        )
        log.info("complete", text, samples=plan.num_samples, target_tokens=num_rows, shards=num_shards, bytes=num_bytes)
        return
    losses = find_losses(store, plan, records)
    text = (
        f"{losses.summary(num_shards)}; all others are committed.\n"
        + "\n".join(f"  {line}" for line in losses.lines())
        + f"\n{losses.remedy()}; 'logitcache status {store.url}' lists all"
    )
    if losses.num_samples > allow_quarantine:
        raise BuildError(text)
    log.warning("done_with_losses", text, **losses.as_json())


def _prepare(
    settings: BuildSettings,
    storage_options: Mapping[str, Any] | None,
    data_storage_options: Mapping[str, Any] | None,
) -> tuple[ObjectStore, Prepared]:
    if settings.ray_address is not None:
        check_reachable(settings.ray_address)
    store = open_store(_seen_from_anywhere(settings.cache), storage_options)
    if not settings.dry_run:
        # Now, and not when a large corpus has been read. What a process that dies leaves of it, gc takes away.
        check_writable(store, f"samples/{new_attempt()}-00000.index")
    return store, prepare(settings, data_storage_options)


def _seen_from_anywhere(path: str) -> str:
    """Workers run in folders of their own."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _claim(store: ObjectStore, prepared: Prepared, cluster: Cluster, log: Log) -> tuple[PlanRecord, str]:
    """Make the cache this build's, or find that it is; returns its plan and the teacher's dtype."""
    dtype = prepared.settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cluster.gpus_per_worker > 0 else "float32"
    if not prepared.settings.extend:
        _create_or_continue(store, prepared, dtype)
    plans = load_plans(store) or Plans(write_plan(store, prepared))
    log.info("plan", render_report(plans.first.report), number=0, report=plans.first.report)
    for number, extension in enumerate(plans.extensions, 1):
        report = extension.plan.report
        text = f"extended by plan {number}, of corpus {extension.corpus.fingerprint[:12]}: {render_report(report)}"
        log.info("plan", text, number=number, report=report)
    return join_plans(plans, where=store.url), dtype


def _create_or_continue(store: ObjectStore, prepared: Prepared, dtype: str) -> None:
    try:
        create_or_continue(store, prepared.identity(dtype))
    except MismatchError as e:
        cached = load_identity(store).teacher
        if cached.revision and cached.id == prepared.settings.teacher and "teacher.weights" in str(e):
            raise MismatchError(f"{e};\nthe cache's teacher is another commit: --revision {cached.revision}") from e
        try:
            prepare_extension(store, prepared)
        except InputError:
            raise e from None
        raise MismatchError(f"{e};\nto add these data to the cache, or to go on adding them: --extend") from e


def _extend(store: ObjectStore, prepared: Prepared, log: Log) -> Prepared:
    """Plan the data behind what the cache holds, unless they are planned already; returns the settings to go on with.

    Raises:
        MismatchError: the cache was made with other settings.
    """
    while True:
        extension, base = prepare_extension(store, prepared)
        if (number := base.number_of(extension.corpus_identity)) is not None:
            log.info("continuing", f"continuing: plan {number} of the cache is of these data", number=number)
            return extension
        if write_extension(extension, base):
            return extension
        log.info("planning_again", "another build has extended the cache meanwhile: planning behind it")


def _say_what_scores(settings: BuildSettings, cluster: Cluster, num_workers: int, log: Log) -> None:
    """What the command line does not say of the workers."""
    if settings.engine == "vllm":
        from transformers import AutoConfig

        from logitcache_pipeline.engines.vllm import choose_route

        config = AutoConfig.from_pretrained(settings.teacher, **settings.loading_options)
        architecture, route = choose_route(config, settings.engine_options.get("route"))
        text = f"vLLM scores {architecture} by the route {route}"
        log.info("route", text, architecture=architecture, route=route)
    if cluster.num_placeable < num_workers:
        text = f"{num_workers:,} workers are wanted, and there is room for {cluster.num_placeable:,}: the others wait"
        log.info("workers_wait", text, wanted=num_workers, placeable=cluster.num_placeable)


def _score(
    store: ObjectStore,
    plan: PlanRecord,
    tasks: list[ShardTask],
    make_worker: ActorMaker,
    cluster: Cluster,
    settings: BuildSettings,
    log: Log,
) -> None:
    from logitcache_pipeline.run import RunSettings, run_shards

    left = sum(task.num_rows for task in tasks)
    patience = RunSettings(cluster.num_workers, settings.max_attempts, settings.shard_deadline, settings.start_deadline)
    report = RunReport(
        {**asdict(settings), "cluster": asdict(cluster)},
        node_hardware(),
        num_planned=len(plan.shard_num_rows),
        num_left=len(tasks),
    )
    metrics = BuildMetrics(store.url, left)
    error: BaseException | None = None
    try:
        done = plan.num_rows - left
        with progress("scoring", total=plan.num_rows, done=done, unit="tok", quiet=log.as_json) as meter:
            watcher = RunWatcher(store, meter, log, metrics, report)
            run_shards(tasks, make_worker, patience, watcher, make_worker.kill)
    except BaseException as e:
        error = e
        raise
    finally:
        _save_report(store, report.entry(error), log)


def _save_report(store: ObjectStore, entry: dict[str, Any], log: Log) -> None:
    """What the run took is no reason for it to fail."""
    try:
        if "error" in entry:  # whoever stops a run does not wait for its report
            save_report(store, entry)
        else:
            wait_for_store(lambda: save_report(store, entry), log)
    except LogitCacheError as e:
        log.warning("report_not_written", f"the report of this run could not be written: {e}")
        return
    if log.as_json:
        log.info("run_ended", f"the run has ended: {entry['outcome']}", run=entry)
