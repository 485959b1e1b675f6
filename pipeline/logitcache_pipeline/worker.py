"""The Ray actor: loads the teacher once, then scores shards, writes them and commits them.

The teacher has a thread of its own, so that a shard is encoded and written while the next one is scored. A worker that
is told to stop (SIGTERM: its machine is wanted back) hands the shard that it is scoring back and takes no other; what
is being written is finished.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_pipeline.engines.base import ScoringRequest, Teacher, load_teacher
from logitcache_storage.commit import commit_shard, load_commit, load_identity
from logitcache_storage.errors import (
    CacheNotFoundError,
    InputError,
    LogitCacheError,
    MismatchError,
    ObjectNotFoundError,
    StoreUnavailableError,
)
from logitcache_storage.invariants import check_rows
from logitcache_storage.objects import open_store
from logitcache_storage.patience import patiently
from logitcache_storage.plans import load_plan
from logitcache_storage.samples import SamplesTable
from logitcache_storage.schema import CacheIdentity, ExcludedSample, PlanRecord, ShardRecord
from logitcache_storage.topk import TopKLogProbs

STORE_SECONDS = 5.0
"""How long a call tries again while the store is unavailable, before it says so to the driver."""


class WorkerStoppingError(LogitCacheError):
    """This worker was told to stop; what it was asked for is for another one."""


@dataclass(frozen=True)
class TeacherSettings:
    """How a worker loads its teacher."""

    engine: str
    path: str
    dtype: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the engine takes besides."""


@dataclass(frozen=True, eq=False)
class ShardTask:
    """A shard to score and the samples of the plan whose targets are its rows, in the order of the rows."""

    shard: int
    samples: npt.NDArray[np.int64]
    num_rows: int
    """Of the whole shard; the same for tokens."""
    num_tokens: int
    """How much work it is."""
    excluded: tuple[tuple[int, str], ...] = ()
    """Samples of the shard that `samples` lacks because they cannot be scored, and why not."""
    is_probe: bool = False
    """Whether it is only asked if `samples`, some of the shard's, can be scored."""


@dataclass(frozen=True)
class WorkerInfo:
    """A worker that has started."""

    name: str
    """For people."""
    node: str = ""
    """Ray's id of the node it runs on; empty outside of Ray."""
    other_nodes: tuple[str, ...] = ()
    """Of those where else its teacher has GPUs."""


@dataclass(frozen=True)
class ShardOutcome:
    """A committed shard; `scored` is False where an earlier attempt had committed it already."""

    shard: int
    num_rows: int
    num_bytes: int
    seconds: float
    """Of scoring."""
    scored: bool
    num_tokens: int = 0
    """That the teacher read; 0 where nothing was scored."""
    store_seconds: float = 0.0
    """Of checking, encoding, writing and committing."""
    excluded: tuple[ExcludedSample, ...] = ()
    """Samples that the shard is committed without."""
    warnings: tuple[str, ...] = ()
    """What the engine has warned of since the worker's last shard, e.g. that it makes smaller batches."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """What the teacher says of the samples of a task, until it is committed."""

    topk: TopKLogProbs
    labels: npt.NDArray[np.int32]
    sample_rows: Sequence[int]
    """How many of the rows are each sample's."""
    num_tokens: int
    seconds: float
    excluded: tuple[ExcludedSample, ...]


class ScoringWorker:
    """Scores shards of one cache with one teacher. `build` makes it a Ray actor of two threads."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None, settings: TeacherSettings) -> None:
        self._store = open_store(url, storage_options)
        self._settings = settings
        self._scored: dict[int, _Rows] = {}
        self._warnings = _Warnings()
        self._teacher_thread = ThreadPoolExecutor(1, "teacher")
        self._stopping: Future[None] = Future()
        name, (node, *others) = f"{socket.gethostname()}:{os.getpid()}", _ray_nodes()
        self.info = WorkerInfo(name, node, tuple(others))
        if node and threading.current_thread() is threading.main_thread():  # which does nothing else in an actor
            signal.signal(signal.SIGTERM, lambda *_: self.stop())

    def start(self) -> WorkerInfo:
        """Load the teacher; returns who this is.

        Raises:
            CacheNotFoundError: this node does not see the cache.
            InputError: the teacher cannot be loaded or scored exactly, or takes less than the longest sample.
            MismatchError: the teacher is not the one of the cache's identity.
            StoreUnavailableError: the store does not answer; ask again.
            WorkerStoppingError: see `stop`.
        """
        patiently(lambda: (self._identity, self._samples), seconds=STORE_SECONDS)
        self._unless_stopping(self._teacher_thread.submit(lambda: self._teacher))
        return self.info

    def score(self, task: ShardTask) -> ShardOutcome | None:
        """Score a shard; its rows stay here until `commit`. Of a probe nothing stays.

        Returns:
            What is committed, if somebody was faster.

        Raises:
            StoreUnavailableError: the store does not answer, and nothing was scored; ask again.
            WorkerStoppingError: see `stop`.
            Exception: whatever the teacher raises.
        """
        found = patiently(lambda: self._committed(task.shard), seconds=STORE_SECONDS)
        if found is not None:
            return found
        tokens = patiently(lambda: [self._samples.tokens(int(i)) for i in task.samples], seconds=STORE_SECONDS)
        rows = self._unless_stopping(self._teacher_thread.submit(self._rows, tokens))
        if task.is_probe:
            check_rows(rows.topk, rows.labels, self._identity.vocab_size, where=f"shard {task.shard}")
        else:
            self._scored[task.shard] = replace(rows, excluded=self._excluded(task))
        return None

    def commit(self, shard: int) -> ShardOutcome:
        """Check, encode, write and commit the rows of a shard that `score` has just scored.

        Raises:
            StoreUnavailableError: the store does not answer; the rows are still here, ask again.
            CorruptionError: the rows break an invariant.
            StoreError: the store refuses them.
        """
        rows, start = self._scored.pop(shard), time.perf_counter()
        try:
            record = patiently(lambda: self._commit(shard, rows), seconds=STORE_SECONDS)
        except StoreUnavailableError:
            self._scored[shard] = rows
            raise
        return ShardOutcome(
            shard,
            record.num_rows,
            record.num_bytes,
            rows.seconds,
            scored=True,
            num_tokens=rows.num_tokens,
            store_seconds=time.perf_counter() - start,
            excluded=record.excluded or (),
            warnings=self._warnings.taken(),
        )

    def stop(self) -> None:
        """Take no further shard, and let go of the one that is being scored."""
        if not self._stopping.done():
            self._stopping.set_result(None)

    def _unless_stopping(self, work: Future[Any]) -> Any:
        wait([work, self._stopping], return_when=FIRST_COMPLETED)
        if self._stopping.done():
            raise WorkerStoppingError("told to stop (SIGTERM)")
        return work.result()

    def _rows(self, tokens: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]) -> _Rows:
        start = time.perf_counter()
        requests = [ScoringRequest(input_ids, positions) for input_ids, positions in tokens]
        with self._warnings:
            topk = TopKLogProbs.concatenate(self._teacher.score(requests, self._identity.k))
        if self._identity.kept_mass < 1.0:
            topk = topk.keep_mass(self._identity.kept_mass)
        return _Rows(
            topk=topk,
            labels=np.concatenate([input_ids[positions] for input_ids, positions in tokens]),
            sample_rows=[len(positions) for _, positions in tokens],
            num_tokens=sum(len(input_ids) for input_ids, _ in tokens),
            seconds=time.perf_counter() - start,
            excluded=(),
        )

    def _commit(self, shard: int, rows: _Rows) -> ShardRecord:
        return commit_shard(
            self._store,
            self._identity,
            shard,
            rows.topk,
            rows.labels,
            seconds=rows.seconds,
            worker=self.info.name,
            sample_rows=rows.sample_rows,
            excluded=rows.excluded,
        )

    def _committed(self, shard: int) -> ShardOutcome | None:
        try:
            record = load_commit(self._store, shard)
        except ObjectNotFoundError:
            return None
        excluded = record.excluded or ()
        return ShardOutcome(shard, record.num_rows, record.num_bytes, 0.0, scored=False, excluded=excluded)

    def _excluded(self, task: ShardTask) -> tuple[ExcludedSample, ...]:
        """What the commit record says of the samples that are left out."""
        if not task.excluded:
            return ()
        places, found = self._samples.places(), []
        for sample, reason in task.excluded:
            shard, first_row = places.shard[sample], places.first_row[sample]
            sharing = np.flatnonzero((places.shard == shard) & (places.first_row == first_row))
            described = self._samples.describe(sharing.tolist())
            found.append(
                ExcludedSample(
                    first_row=int(first_row),
                    num_rows=int(places.num_targets[sample]),
                    key=described[0]["key"].hex(),
                    source_ids=tuple(about["source_id"] for about in described),
                    reason=reason,
                )
            )
        return tuple(sorted(found, key=lambda sample: sample.first_row))

    @cached_property
    def _identity(self) -> CacheIdentity:
        try:
            return load_identity(self._store)
        except CacheNotFoundError as e:
            raise CacheNotFoundError(
                f"{socket.gethostname()} does not see the cache at {self._store.url}; put it where every node of the"
                " Ray cluster reaches it: a bucket, or a folder that all of them mount"
            ) from e

    @cached_property
    def _plan(self) -> PlanRecord:
        plan = load_plan(self._store)
        assert plan is not None, "the driver writes the plan before it starts workers"
        return plan

    @cached_property
    def _samples(self) -> SamplesTable:
        return SamplesTable(self._store, self._plan)

    @cached_property
    def _teacher(self) -> Teacher:
        settings = self._settings
        teacher = load_teacher(settings.engine, settings.path, settings.dtype, **settings.options)
        _check_same_teacher(teacher, self._identity)
        _check_length(teacher, self._plan)
        return teacher


class _Warnings(logging.Handler):
    """What is warned of in this package within its `with` blocks: here it would stand in a log of this node alone."""

    MOST = 20

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._found = [*self._found[1 - self.MOST :], record.getMessage()]

    def taken(self) -> tuple[str, ...]:
        """The last of them, since the last call."""
        found, self._found = self._found, []
        return tuple(found)

    def __enter__(self) -> None:
        logging.getLogger(__package__).addHandler(self)

    def __exit__(self, *exception: object) -> None:
        logging.getLogger(__package__).removeHandler(self)


def _check_same_teacher(teacher: Teacher, identity: CacheIdentity) -> None:
    """A node may hold another checkpoint under the same path."""
    for name in ("weights", "config", "dtype", "engine"):
        found, expected = getattr(teacher.identity, name), getattr(identity.teacher, name)
        if found != expected:
            raise MismatchError(
                f"{teacher.identity.id} on {socket.gethostname()} has another {name} than the cache's teacher:"
                f" found {found[:16]}, expected {expected[:16]}; give every node the same checkpoint"
            )
    if teacher.vocab_size != identity.vocab_size:
        raise MismatchError(
            f"{teacher.identity.id}: its head has {teacher.vocab_size} rows, its config says"
            f" {identity.vocab_size}; correct vocab_size in the config"
        )


def _check_length(teacher: Teacher, plan: PlanRecord) -> None:
    """An engine may take less than the config says."""
    longest = max(report["tokens_per_sample"]["max"] for report in plan.report.get("plans", [plan.report]))
    if teacher.max_length is not None and longest > teacher.max_length:
        raise InputError(
            f"the longest sample has {longest:,} tokens, and {teacher.identity.id} takes {teacher.max_length:,} in the"
            f" engine {teacher.identity.engine}; build another cache with --max-length {teacher.max_length}, or let the"
            " engine take more (vllm: max_model_len in --engine-options)"
        )


def _ray_nodes() -> list[str]:
    """Ray's ids of this node and the others of its placement group, if this process is a Ray actor's."""
    if "ray" not in sys.modules:
        return [""]
    import ray

    context = ray.get_runtime_context() if ray.is_initialized() else None
    if context is None or not context.get_actor_id():
        return [""]
    node, group = str(context.get_node_id()), ray.util.get_current_placement_group()
    nodes = set() if group is None else set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
    return [node, *sorted(nodes - {node})]
