"""A teacher on a Ray cluster that another process asks: for a dry run of one that spans nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from logitcache_pipeline.cluster import Cluster
from logitcache_pipeline.engines.base import ScoringRequest, Teacher, load_teacher
from logitcache_storage.errors import LogitCacheError
from logitcache_storage.topk import TopKLogProbs


class RemoteTeacher:
    """Scores as the `Teacher` does that its actor loads when it is first asked."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        """See `Teacher.score`.

        Raises:
            LogitCacheError: the actor has died.
        """
        import ray

        from logitcache_pipeline.actors import reason_of

        try:
            answers: list[TopKLogProbs] = ray.get(self._actor.score.remote(list(requests), k))
        except ray.exceptions.RayTaskError as e:
            raise e.cause from None
        except ray.exceptions.RayError as e:
            raise LogitCacheError(f"the teacher cannot be asked: {reason_of(e)}") from e
        return answers


@contextmanager
def teacher_on_cluster(cluster: Cluster, *arguments: Any, **options: Any) -> Iterator[RemoteTeacher]:
    """One worker of the cluster we are connected to, with the teacher of `load_teacher`'s arguments."""
    maker = cluster.actor_maker(_TeacherActor, arguments, options)
    maker = replace(maker, options={**maker.options, "max_concurrency": 1})
    actor = maker()
    try:
        yield RemoteTeacher(actor)
    finally:
        maker.kill(actor)


class _TeacherActor:
    def __init__(self, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        self._arguments, self._options = arguments, options

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        return self._teacher.score(requests, k)

    @cached_property
    def _teacher(self) -> Teacher:
        return load_teacher(*self._arguments, **self._options)
