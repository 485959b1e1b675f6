"""The driver alone: how busy it keeps many workers, how soon it knows what is left, what it remembers.

workers     256 simulated workers, slots of four async Ray actors, that take a second for a shard, 0.8 to 1.2 s in fact,
            by sleeping. Busy is the time asleep over the time of all workers, from the moment when all have started
            until there is no shard left to give away; shards that are under way then count for nothing.
resume      a cache of 100,000 shards of one sample each on local disk, all but 8 committed: commit records are written
            directly, as the format says. Time from opening the store to the list of what is left, then of reading all
            commits for the manifest.
memory      resident memory of the driver after a fifth of the shards of the first part, and at its end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import ray

from logitcache_pipeline.build import finish, remaining_tasks
from logitcache_pipeline.log import Log
from logitcache_pipeline.run import RunSettings, run_shards
from logitcache_pipeline.worker import ShardOutcome, ShardTask, WorkerInfo
from logitcache_storage.commit import commit_path, create_or_continue, new_attempt
from logitcache_storage.committed import shard_prefix
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.objects import open_store
from logitcache_storage.plans import commit_plan, load_plan, write_parquet, write_samples
from logitcache_storage.record_json import dump_record
from logitcache_storage.samples import SAMPLES_SCHEMA
from logitcache_storage.schema import ObjectRecord, PlanRecord, ShardRecord
from logitcache_storage.testing import make_identity
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA

NUM_ACTORS = 4
NUM_WORKERS = 256
SHARDS_PER_WORKER = 30
SECONDS = 1.0
COMMIT_SECONDS = 0.3
"""Of encoding and writing a shard, beside the next one's score."""
ROWS = 4096

NUM_SHARDS = 100_000
NUM_LEFT = 8


def main() -> None:
    ray.init("local", num_cpus=NUM_ACTORS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        results = {"workers": bench_workers(NUM_WORKERS, SHARDS_PER_WORKER, SECONDS)}
    finally:
        ray.shutdown()
    results["resume"] = bench_resume(NUM_SHARDS, NUM_LEFT)
    print(json.dumps(results, indent=1))


class Sleepers:
    """Many simulated workers in one process."""

    async def start(self) -> WorkerInfo:
        return WorkerInfo(f"sleepers:{os.getpid()}")

    async def score(self, task: ShardTask, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def commit(self, shard: int, seconds: float) -> ShardOutcome:
        """`seconds` is how long the score took."""
        await asyncio.sleep(COMMIT_SECONDS)
        return ShardOutcome(shard, ROWS, 0, seconds, scored=True, num_tokens=ROWS)


class Slot:
    """One simulated worker, with the four methods of a Ray actor that the driver calls."""

    def __init__(self, actor: Any, seconds: float) -> None:
        self._actor, self._seconds = actor, seconds
        self.__ray_ready__ = actor.__ray_ready__
        self.start = actor.start
        self.score = _Method(lambda task: actor.score.remote(task, self._duration(task.shard)))
        self.commit = _Method(lambda shard: actor.commit.remote(shard, self._duration(shard)))

    def _duration(self, shard: int) -> float:
        # Spread evenly over shards, and the same in every run: multiples of the golden ratio.
        return self._seconds * (0.8 + 0.4 * (shard * 0.6180339887 % 1.0))


@dataclass(frozen=True)
class _Method:
    remote: Callable[[Any], Any]


class Clock:
    """An observer that adds up the time asleep while all workers have something to do, and looks at the memory."""

    def __init__(self, num_workers: int, num_shards: int) -> None:
        self._num_workers, self._note_at = num_workers, num_shards // 5
        self._last_given_at = num_shards - num_workers
        self.num_started = self.num_committed = self.memory_then = 0
        self.busy_seconds = self.all_started = self.all_given = 0.0

    def worker_started(self, worker: int, name: str) -> None:
        self.num_started += 1
        if self.num_started == self._num_workers:
            self.all_started = time.perf_counter()

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        self.num_committed += 1
        if self.all_started and not self.all_given:
            self.busy_seconds += outcome.seconds
        if self.num_committed == self._last_given_at:
            self.all_given = time.perf_counter()
        if self.num_committed == self._note_at:
            self.memory_then = resident_bytes()

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        raise AssertionError(reason)

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        raise AssertionError(reasons)

    def worker_failed(self, reason: str) -> None:
        raise AssertionError(reason)

    def worker_leaves(self, worker: int, reason: str) -> None:
        raise AssertionError(reason)

    def given_back(self, shard: int, reason: str) -> None:
        raise AssertionError(reason)

    def store_waits(self, seconds: float, reason: str) -> None:
        raise AssertionError(reason)

    def waiting(self, seconds: float) -> None:
        print(f"waiting for {seconds:.0f} s", file=sys.stderr)


def bench_workers(num_workers: int, shards_per_worker: int, seconds: float) -> dict[str, Any]:
    actors = [ray.remote(Sleepers).options(max_concurrency=num_workers, num_cpus=0).remote() for _ in range(NUM_ACTORS)]
    ray.get([actor.start.remote() for actor in actors])
    slots = iter([Slot(actors[i % NUM_ACTORS], seconds) for i in range(num_workers)])
    num_shards = num_workers * shards_per_worker
    tasks = [ShardTask(shard, np.arange(64), ROWS, ROWS) for shard in range(num_shards)]
    clock = Clock(num_workers, num_shards)
    cpu = time.process_time()
    run_shards(tasks, lambda: next(slots), RunSettings(num_workers), clock, kill_worker=lambda slot: None)
    took, cpu = clock.all_given - clock.all_started, time.process_time() - cpu
    return {
        "workers": num_workers,
        "shards": num_shards,
        "seconds_per_shard": seconds,
        "seconds": round(took, 2),
        "busy": round(clock.busy_seconds / (num_workers * took), 4),
        "driver_cpu_ms_per_shard": round(cpu / num_shards * 1e3, 3),
        "resident_mb_at_a_fifth": round(clock.memory_then / 1e6, 1),
        "resident_mb_at_the_end": round(resident_bytes() / 1e6, 1),
    }


def bench_resume(num_shards: int, num_left: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_committed(folder, num_shards, num_left)
        start = time.perf_counter()
        store = open_store(folder)
        plan = load_plan(store)
        assert plan is not None
        tasks = remaining_tasks(store, plan)
        found = time.perf_counter() - start
        assert [task.shard for task in tasks] == list(range(num_shards - num_left, num_shards))
        for shard in range(num_shards - num_left, num_shards):
            write_commit(Path(folder), shard)
        start = time.perf_counter()
        finish(store, plan, Log(lambda line: None))
        return {
            "shards": num_shards,
            "start_seconds": round(found, 2),
            "manifest_seconds": round(time.perf_counter() - start, 2),
            "resident_mb": round(resident_bytes() / 1e6, 1),
        }


def write_committed(folder: str, num_shards: int, num_left: int) -> None:
    """A cache whose shards hold one sample of two tokens each; all but the last few have a commit record."""
    store = open_store(folder)
    create_or_continue(store, make_identity(shard_rows=1))
    ids, ranges = np.array([1, 2], np.int32), np.array([[1, 2]], np.int32)
    keys = [sample_key(np.array([1, n], np.int32), ranges) for n in range(num_shards)]
    columns = {
        "key": pa.array([bytes.fromhex(key) for key in keys], pa.binary(16)),
        "source_id": pa.array([f"made:{n}" for n in range(num_shards)], pa.string()),
        "shard": pa.array(np.arange(num_shards, dtype=np.int32)),
        "first_row": pa.array(np.zeros(num_shards, np.int32)),
        "num_tokens": pa.array(np.full(num_shards, len(ids), np.int32)),
        "num_targets": pa.array(np.ones(num_shards, np.int32)),
        "input_ids": pa.array([ids] * num_shards, pa.list_(pa.int32())),
        "target_ranges": pa.array([ranges.reshape(-1)] * num_shards, pa.list_(pa.int32())),
    }
    attempt = new_attempt()
    table = pa.Table.from_arrays([columns[name] for name in SAMPLES_SCHEMA.names], schema=SAMPLES_SCHEMA)
    parts = write_samples(store, attempt, [table])
    vocabulary = write_parquet(store, f"vocabulary/{attempt}.parquet", VOCABULARY_SCHEMA.empty_table())
    commit_plan(store, PlanRecord(num_shards, 2 * num_shards, num_shards, (1,) * num_shards, {}, parts, vocabulary))
    (Path(folder) / "commits").mkdir()
    for shard in range(num_shards - num_left):
        write_commit(Path(folder), shard)


def write_commit(folder: Path, shard: int) -> None:
    """A commit record as `commit_shard` writes one, without its durable write: that is no part of a resume."""
    attempt = new_attempt()
    item = ObjectRecord(f"{shard_prefix(shard, attempt)}.arrow", 100, (0,))
    statistics = {"entropy_sum": 1.0, "kept_mass_sum": 1.0, "label_log_prob_sum": -1.0, "num_kept_sum": 9.0}
    created = "2026-01-01T00:00:00+00:00"
    record = ShardRecord(shard, attempt, 1, item.size, (item,), statistics, 1.0, "made:1", created)
    (folder / commit_path(shard)).write_bytes(dump_record(record))


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
