"""What happens in a run, for all who want to know: the terminal or the log, Prometheus, the report, the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from logitcache_pipeline.log import Log
from logitcache_pipeline.metrics import BuildMetrics
from logitcache_pipeline.report import RunReport
from logitcache_pipeline.worker import ShardOutcome
from logitcache_storage.commit import quarantine_shard
from logitcache_storage.errors import StoreUnavailableError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.patience import patiently
from logitcache_storage.progress import LINE_EVERY_SECONDS, Meter
from logitcache_storage.terminal import counted, format_duration

STORE_SECONDS = 300.0
"""How long the driver itself waits for a store that is unavailable, before the run ends."""

_Result = TypeVar("_Result")


def wait_for_store(action: Callable[[], _Result], log: Log) -> _Result:
    """What `action` returns, once the store answers the driver; `patience.patiently` says what it must be.

    Raises:
        StoreUnavailableError: it has not for `STORE_SECONDS`.
    """
    said: list[StoreUnavailableError] = []

    def say(error: StoreUnavailableError) -> None:
        if not said:
            log.warning("store_waits", f"waiting for the store: {error}", reason=str(error))
        said.append(error)

    return patiently(action, seconds=STORE_SECONDS, on_pause=say)


class RunWatcher:
    """The observer of `run.run_shards` in a build."""

    def __init__(self, store: ObjectStore, meter: Meter, log: Log, metrics: BuildMetrics, report: RunReport) -> None:
        self._store, self._meter, self._metrics, self._report = store, meter, metrics, report
        self._log = log.beside(meter.note)
        self._names: dict[int, str] = {}
        self._last_progress = time.monotonic()
        self._is_shared = False

    def worker_started(self, worker: int, name: str) -> None:
        """A worker has loaded its teacher."""
        self._names[worker] = name
        self._report.worker_started(worker, name)
        if self._log.as_json:  # people see that it goes on
            self._log.info("worker_started", f"worker {worker} has started: {name}", worker=worker, name=name)

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        """A shard is in the store."""
        self._meter.advance(outcome.num_rows + sum(sample.num_rows for sample in outcome.excluded))
        self._metrics.committed(outcome, self._names[worker])
        self._report.committed(outcome, worker)
        for sample in outcome.excluded:
            names = ", ".join(sample.source_ids)
            text = f"{names} (key {sample.key}) is quarantined, and shard {outcome.shard} committed without it"
            about = {"shard": outcome.shard, "key": sample.key, "source_ids": sample.source_ids}
            self._log.warning("sample_quarantined", f"{text}: {sample.reason}", **about, reason=sample.reason)
        for warning in outcome.warnings:
            text = f"worker {worker} ({self._names[worker]}): {warning}"
            self._log.warning("worker_warning", text, worker=worker, reason=warning)
        if not outcome.scored and not self._is_shared:
            self._is_shared = True
            whose = "by another build of this cache, or by a worker that has been lost"
            text = f"shard {outcome.shard} was committed meanwhile, {whose}"
            self._log.info("shared", text, shard=outcome.shard)
        now = time.monotonic()
        if self._log.as_json and now - self._last_progress >= LINE_EVERY_SECONDS:
            self._last_progress = now
            self._log.info("progress", f"scoring: {self._meter.figures()}", target_tokens=self._meter.completed)

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        """An attempt at a shard has failed."""
        self._metrics.attempt_failed()
        self._report.attempt_failed()
        text = f"shard {shard}, attempt {attempt} failed: {reason}"
        self._log.warning("attempt_failed", text, shard=shard, attempt=attempt, reason=reason)

    def given_back(self, shard: int, reason: str) -> None:
        """An attempt has ended through no fault of the shard."""
        self._report.given_back()
        self._log.info("given_back", f"shard {shard} is given back: {reason}", shard=shard, reason=reason)

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        """A shard has used up its attempts."""
        self._metrics.quarantined()
        self._report.quarantined(shard, reasons[-1])
        text = f"shard {shard} is quarantined after {counted(len(reasons), 'attempt')}"
        self._log.warning("shard_quarantined", text, shard=shard, reasons=reasons)
        wait_for_store(lambda: quarantine_shard(self._store, shard, reasons), self._log)

    def worker_failed(self, reason: str) -> None:
        """A worker could not start."""
        self._metrics.start_failed()
        self._report.start_failed()
        self._log.warning("worker_failed", f"a worker cannot start: {reason}", reason=reason)

    def worker_leaves(self, worker: int, reason: str) -> None:
        """A worker takes no further shard."""
        self._log.info("worker_leaves", f"worker {worker} is replaced: {reason}", worker=worker, reason=reason)

    def store_waits(self, seconds: float, reason: str) -> None:
        """A worker has waited for the store for so long."""
        text = f"waiting for the store, which costs no shard an attempt: {reason}"
        self._log.warning("store_waits", text, seconds=round(seconds, 3), reason=reason)

    def waiting(self, seconds: float) -> None:
        """No worker has started for so long."""
        text = (
            f"no worker has started for {format_duration(seconds)}: the teacher is being loaded, or the Ray cluster has"
            " no room for a worker ('ray status' says)"
        )
        self._log.warning("waiting", text, seconds=round(seconds, 3))
