"""What a run of a build took: `report.json` beside the cache, one entry for each run that had something to score.

    {"runs": [{"outcome": "complete", "started": "...", "rate": {...}, "workers": [...], ...}]}

The newest run stands last. Nobody needs it to read or continue the cache: it may be missing, and where two drivers end
at once one entry may be lost.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from logitcache_pipeline.worker import ShardOutcome
from logitcache_storage.commit import REPORT_PATH
from logitcache_storage.errors import ObjectNotFoundError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.schema import ExcludedSample

MAX_RUNS = 100
MAX_WARNINGS = 10
PACKAGES = ("logitcache", "numpy", "pyarrow", "ray", "tokenizers", "torch", "transformers", "vllm", "zarr")


@dataclass
class _Worker:
    """What one worker has done, and the actors that followed each other in its place."""

    started: float
    names: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_rows: int = 0
    busy_seconds: float = 0.0
    store_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


class RunReport:
    """Counts over one run, of a size that depends on its workers and its losses alone."""

    def __init__(
        self, settings: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], *, num_planned: int, num_left: int
    ) -> None:
        """The run begins now.

        Args:
            settings: of the build, as JSON values.
            nodes: of the cluster, as JSON values.
            num_planned: shards of the plan.
            num_left: shards of it that are not committed.
        """
        self._settings, self._nodes = dict(settings), list(nodes)
        self._num_planned, self._num_left = num_planned, num_left
        self._started, self._start = _now(), time.monotonic()
        self._workers: dict[int, _Worker] = {}
        self._num_scored = self._num_found = 0
        self._num_rows = self._num_tokens = self._num_bytes = 0
        self._num_failed_attempts = self._num_failed_starts = self._num_given_back = 0
        self._quarantine: dict[int, str] = {}
        self._excluded: dict[int, tuple[ExcludedSample, ...]] = {}

    def worker_started(self, worker: int, name: str) -> None:
        """A worker has loaded its teacher."""
        self._workers.setdefault(worker, _Worker(time.monotonic())).names.append(name)

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        """A shard is in the store."""
        if outcome.excluded:
            self._excluded[outcome.shard] = outcome.excluded
        if not outcome.scored:
            self._num_found += 1
            return
        self._num_scored += 1
        self._num_rows += outcome.num_rows
        self._num_tokens += outcome.num_tokens
        self._num_bytes += outcome.num_bytes
        it = self._workers[worker]
        it.num_shards += 1
        it.num_rows += outcome.num_rows
        it.busy_seconds += outcome.seconds
        it.store_seconds += outcome.store_seconds
        it.warnings = [*it.warnings, *outcome.warnings][-MAX_WARNINGS:]

    def attempt_failed(self) -> None:
        """An attempt at a shard has failed."""
        self._num_failed_attempts += 1

    def given_back(self) -> None:
        """An attempt at a shard has ended through no fault of it."""
        self._num_given_back += 1

    def quarantined(self, shard: int, reason: str) -> None:
        """A shard has used up its attempts; `reason` is that of the last."""
        self._quarantine[shard] = reason

    def start_failed(self) -> None:
        """A worker could not start."""
        self._num_failed_starts += 1

    def entry(self, error: BaseException | None = None) -> dict[str, Any]:
        """The run up to now, as JSON values; `error` is what ended it early."""
        now = time.monotonic()
        seconds = now - self._start
        entry = {
            "outcome": self._outcome(error),
            "started": self._started,
            "ended": _now(),
            "seconds": round(seconds, 3),
            "shards": {
                "planned": self._num_planned,
                "committed_before": self._num_planned - self._num_left,
                "scored": self._num_scored,
                "committed_by_others": self._num_found,
                "quarantined": len(self._quarantine),
            },
            "target_tokens": self._num_rows,
            "tokens": self._num_tokens,
            "bytes": self._num_bytes,
            "rate": {
                "target_tokens_per_second": round(self._num_rows / seconds, 3),
                "tokens_per_second": round(self._num_tokens / seconds, 3),
            },
            "retries": self._num_failed_attempts - len(self._quarantine),
            "failed_attempts": self._num_failed_attempts,
            "failed_starts": self._num_failed_starts,
            "given_back": self._num_given_back,
            "quarantine": {str(shard): reason for shard, reason in sorted(self._quarantine.items())},
            "quarantined_samples": [
                {"shard": shard, "key": sample.key, "source_ids": sample.source_ids, "reason": sample.reason}
                for shard, samples in sorted(self._excluded.items())
                for sample in samples
            ],
            "workers": [_worker_entry(number, it, now) for number, it in sorted(self._workers.items())],
            "settings": self._settings,
            "hardware": {"driver": platform.node(), "platform": platform.platform(), "nodes": self._nodes},
            "versions": {"python": platform.python_version(), **package_versions()},
        }
        return entry if error is None else {**entry, "error": " ".join(str(error).split()) or type(error).__name__}

    def _outcome(self, error: BaseException | None) -> str:
        if error is not None:
            return "failed" if isinstance(error, Exception) else "interrupted"
        return "quarantined" if self._quarantine or self._excluded else "complete"


def save_report(store: ObjectStore, entry: Mapping[str, Any]) -> None:
    """Put the entry of a run behind those of earlier ones; the oldest beyond `MAX_RUNS` are dropped.

    Raises:
        StoreError: the store cannot be reached.
    """
    runs = [*load_report(store), entry][-MAX_RUNS:]
    store.put(REPORT_PATH, (json.dumps({"runs": runs}, indent=1) + "\n").encode())


def load_report(store: ObjectStore) -> list[dict[str, Any]]:
    """The entries of all runs, the newest last; none where there is no report that can be read."""
    try:
        runs = json.loads(store.get(REPORT_PATH))["runs"]
    except (ObjectNotFoundError, ValueError, LookupError, TypeError):
        return []
    return runs if isinstance(runs, list) else []


def package_versions() -> dict[str, str]:
    """Of what is installed of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _worker_entry(number: int, it: _Worker, now: float) -> dict[str, Any]:
    """Utilisation: the share of the time since it first started in which it was scoring what is committed now."""
    seconds = now - it.started
    return {
        "worker": number,
        "names": it.names[-10:],
        "starts": len(it.names),
        "shards": it.num_shards,
        "target_tokens": it.num_rows,
        "seconds": round(seconds, 3),
        "busy_seconds": round(it.busy_seconds, 3),
        "store_seconds": round(it.store_seconds, 3),
        "utilisation": round(it.busy_seconds / seconds, 4) if seconds > 0 else 0.0,
        "warnings": it.warnings,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
