"""Workers for the driver's loop that raise, die, hang or never start, as they are told to, and a run with them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from logitcache_pipeline.engines.base import TeacherLostError
from logitcache_pipeline.run import RunSettings, run_shards
from logitcache_pipeline.worker import ShardOutcome, ShardTask, WorkerInfo, WorkerStoppingError
from logitcache_storage.errors import MismatchError, StoreError, StoreUnavailableError
from logitcache_storage.schema import ExcludedSample

ALWAYS = 99
SLOW = 0.5
"""Seconds."""
Faults = dict[str | int, tuple[str, int]]
"""What happens to a shard, or at the start of a worker, and at how many attempts."""


class FaultyWorker:
    """Does to each shard what it is told, for the first so many attempts at it; a folder counts them."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self._folder, self._faults = folder, faults
        self._started = self._broken = False

    def start(self) -> WorkerInfo:
        self._suffer("start")
        self._started = True
        return WorkerInfo(f"worker {os.getpid()}", ray.get_runtime_context().get_node_id())

    def score(self, task: ShardTask) -> None:
        assert self._started, "given work before it had started"
        if self._broken:
            raise RuntimeError("an illegal memory access was encountered")
        self._suffer(task.shard)
        for sample in task.samples.tolist():
            self._suffer(f"sample {sample}")
        self._excluded = tuple(
            ExcludedSample(sample, 1, f"{sample:032x}", (f"record {sample}",), why) for sample, why in task.excluded
        )

    def commit(self, shard: int) -> ShardOutcome:
        self._suffer(f"commit {shard}")
        return ShardOutcome(shard, 10, 1, 0.0, scored=True, excluded=self._excluded)

    def _suffer(self, name: str | int) -> None:
        fault, num_attempts = self._faults.get(name, ("none", 0))
        with (self._folder / str(name)).open("a") as f:
            f.write(f"{os.getpid()}\n")
        if attempts(self._folder, name) > num_attempts:
            return
        match fault:
            case "raise":
                raise RuntimeError(f"{name} is bad")
            case "lose":
                raise TeacherLostError(f"{name} was too much")
            case "break":
                self._broken = True
                raise RuntimeError(f"{name} breaks it")
            case "exit":
                os._exit(1)
            case "exit beside a commit":
                while not any(self._folder.glob("commit *")):
                    time.sleep(0.05)
                os._exit(1)
            case "hang":
                (self._folder / "hanging").touch()
                threading.Event().wait()
            case "hold":
                while not (self._folder / "go").exists():
                    time.sleep(0.05)
            case "slow":
                time.sleep(SLOW)
            case "stop":
                raise WorkerStoppingError("told to stop")
            case "unavailable":
                raise StoreUnavailableError("the bucket does not answer")
            case "no store":
                raise StoreError("the bucket cannot be reached")
            case "other teacher":
                raise MismatchError("another checkpoint")


@dataclass
class Events:
    """An observer that writes down what it is told."""

    worker_names: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    committed_shards: list[int] = field(default_factory=list)
    failures: list[tuple[int, int]] = field(default_factory=list)
    quarantined: dict[int, list[str]] = field(default_factory=dict)
    lost_workers: list[str] = field(default_factory=list)
    leaving: list[tuple[int, str]] = field(default_factory=list)
    given_back_shards: list[int] = field(default_factory=list)
    store_reasons: list[str] = field(default_factory=list)
    excluded: dict[int, str] = field(default_factory=dict)
    num_waiting: int = 0

    def worker_started(self, worker: int, name: str) -> None:
        self.worker_names[worker].append(name)

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        assert self.worker_names[worker]
        self.committed_shards.append(outcome.shard)
        self.excluded |= {sample.first_row: sample.reason for sample in outcome.excluded}

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        self.failures.append((shard, attempt))

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        assert shard not in self.quarantined
        self.quarantined[shard] = list(reasons)

    def worker_failed(self, reason: str) -> None:
        self.lost_workers.append(reason)

    def worker_leaves(self, worker: int, reason: str) -> None:
        self.leaving.append((worker, reason))

    def given_back(self, shard: int, reason: str) -> None:
        self.given_back_shards.append(shard)

    def store_waits(self, seconds: float, reason: str) -> None:
        self.store_reasons.append(reason)

    def waiting(self, seconds: float) -> None:
        self.num_waiting += 1


def run(
    folder: Path,
    num_shards: int,
    faults: Faults | Callable[[], Faults],
    *,
    cpus: float = 0.5,
    places: Iterator[dict[str, float]] | None = None,
    events: Events | None = None,
    tokens: Callable[[int], int] = lambda shard: 1,
    num_samples: int = 1,
    **settings: Any,
) -> Events:
    """Run the loop, and check what holds in every run: each shard is committed or quarantined, and once.

    Args:
        folder: counts the attempts.
        num_shards: how many there are.
        faults: of every worker, or a function that says those of the next one.
        cpus: of a worker.
        places: custom resources of the first workers.
        events: what is told of the run goes here.
        tokens: of a shard.
        num_samples: of a shard; those of shard n have numbers from 100 n.
        settings: of the run.
    """

    def make_worker() -> Any:
        options = {
            "num_cpus": cpus,
            "resources": next(places or iter(()), None),
            "max_concurrency": 2,
        }
        return ray.remote(FaultyWorker).options(**options).remote(folder, faults() if callable(faults) else faults)

    events = events or Events()
    samples = np.arange(num_samples)
    tasks = [ShardTask(shard, 100 * shard + samples, 10, tokens(shard)) for shard in range(num_shards)]
    run_shards(tasks, make_worker, RunSettings(**settings), events)
    assert Counter([*events.committed_shards, *events.quarantined]) == Counter(range(num_shards))
    return events


def attempts(folder: Path, name: str | int) -> int:
    path = folder / str(name)
    return len(path.read_text().splitlines()) if path.exists() else 0


@contextmanager
def doing(action: Callable[[], None], *, when: Callable[[], bool]) -> Iterator[None]:
    """Do something beside the block, as soon as it may be done."""

    def wait_and_do() -> None:
        while not when():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait_and_do, daemon=True)
    thread.start()
    yield
    thread.join(30)
