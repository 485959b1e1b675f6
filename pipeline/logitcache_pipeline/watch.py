"""What happens in a run, for all who want to know: the terminal or the log, Prometheus, the report, the store."""

from __future__ import annotations

import time

from logitcache_pipeline.log import Log
from logitcache_pipeline.metrics import BuildMetrics
from logitcache_pipeline.report import RunReport
from logitcache_pipeline.worker import ShardOutcome
from logitcache_storage.commit import quarantine_shard
from logitcache_storage.objects import ObjectStore
from logitcache_storage.progress import LINE_EVERY_SECONDS, Meter
from logitcache_storage.terminal import format_duration


class RunWatcher:
    """The observer of `run.run_shards` in a build."""

    def __init__(self, store: ObjectStore, meter: Meter, log: Log, metrics: BuildMetrics, report: RunReport) -> None:
        self._store, self._meter, self._metrics, self._report = store, meter, metrics, report
        self._log = log.beside(meter.note)
        self._names: dict[int, str] = {}
        self._last_progress = time.monotonic()

    def worker_started(self, worker: int, name: str) -> None:
        """A worker has loaded its teacher."""
        self._names[worker] = name
        self._report.worker_started(worker, name)
        if self._log.as_json:  # people see that it goes on
            self._log.info("worker_started", f"worker {worker} has started: {name}", worker=worker, name=name)

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        """A shard is in the store."""
        self._meter.advance(outcome.num_rows)
        self._metrics.committed(outcome, self._names[worker])
        self._report.committed(outcome, worker)
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

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        """A shard has used up its attempts."""
        self._metrics.quarantined()
        self._report.quarantined(shard, reasons[-1])
        text = f"shard {shard} is quarantined after {len(reasons)} attempts"
        self._log.warning("shard_quarantined", text, shard=shard, reasons=reasons)
        quarantine_shard(self._store, shard, reasons)

    def worker_failed(self, reason: str) -> None:
        """A worker could not start."""
        self._metrics.start_failed()
        self._report.start_failed()
        self._log.warning("worker_failed", f"a worker cannot start: {reason}", reason=reason)

    def waiting(self, seconds: float) -> None:
        """No worker has started for so long."""
        text = (
            f"no worker has started for {format_duration(seconds)}: the teacher is being loaded, or the Ray cluster has"
            " no room for a worker ('ray status' says)"
        )
        self._log.warning("waiting", text, seconds=round(seconds, 3))
