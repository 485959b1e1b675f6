"""The Ray actor: loads the teacher once, then scores shards, writes them and commits them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_pipeline.engines.base import ScoringRequest, Teacher, load_teacher
from logitcache_storage.commit import commit_shard, load_commit, load_identity
from logitcache_storage.errors import CacheNotFoundError, MismatchError, ObjectNotFoundError
from logitcache_storage.objects import open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.samples import SamplesTable
from logitcache_storage.schema import CacheIdentity
from logitcache_storage.topk import TopKLogProbs


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
    num_tokens: int
    """Of these samples: how much work it is."""


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


class ScoringWorker:
    """Scores shards of one cache with one teacher. `build` makes it a Ray actor."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None, settings: TeacherSettings) -> None:
        self._store = open_store(url, storage_options)
        self._settings = settings
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def start(self) -> str:
        """Load the teacher; returns who this is. Called again after Ray has restarted the process.

        Raises:
            CacheNotFoundError: this node does not see the cache.
            InputError: the teacher cannot be loaded or scored exactly.
            MismatchError: the teacher is not the one of the cache's identity.
        """
        _ = self._identity, self._samples, self._teacher
        return self.name

    def score(self, task: ShardTask) -> ShardOutcome:
        """Score, write and commit a shard, unless it is committed already."""
        try:
            done = load_commit(self._store, task.shard)
            return ShardOutcome(task.shard, done.num_rows, done.num_bytes, 0.0, scored=False)
        except ObjectNotFoundError:
            pass
        start = time.perf_counter()
        tokens = [self._samples.tokens(int(sample)) for sample in task.samples]
        requests = [ScoringRequest(input_ids, positions) for input_ids, positions in tokens]
        topk = TopKLogProbs.concatenate(self._teacher.score(requests, self._identity.k))
        if self._identity.kept_mass < 1.0:
            topk = topk.keep_mass(self._identity.kept_mass)
        labels = np.concatenate([input_ids[positions] for input_ids, positions in tokens])
        seconds = time.perf_counter() - start
        record = commit_shard(self._store, self._identity, task.shard, topk, labels, seconds=seconds, worker=self.name)
        return ShardOutcome(
            task.shard,
            record.num_rows,
            record.num_bytes,
            seconds,
            scored=True,
            num_tokens=sum(len(input_ids) for input_ids, _ in tokens),
            store_seconds=time.perf_counter() - start - seconds,
        )

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
    def _samples(self) -> SamplesTable:
        plan = load_plan(self._store)
        assert plan is not None, "the driver writes the plan before it starts workers"
        return SamplesTable(self._store, plan)

    @cached_property
    def _teacher(self) -> Teacher:
        settings = self._settings
        teacher = load_teacher(settings.engine, settings.path, settings.dtype, **settings.options)
        _check_same_teacher(teacher, self._identity)
        return teacher


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
