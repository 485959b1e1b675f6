"""What the driver knows of its actors, and what Ray says of them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from logitcache_pipeline.worker import ShardTask, WorkerInfo
from logitcache_storage.errors import LogitCacheError

NOT_STARTED = WorkerInfo("?")
"""A worker that has not started."""


@dataclass(eq=False)
class Slot:
    """One actor and what it has in hand."""

    number: int
    actor: Any
    info: WorkerInfo = NOT_STARTED
    scoring: ShardTask | None = None
    scored: ShardTask | None = None
    """Its rows wait until what was scored before is written; meanwhile nothing is scored."""
    writing: ShardTask | None = None
    is_leaving: bool = False
    failed_starts: int = 0
    failed_in_row: int = 0
    """Shards and probes that it could not score, since it could score one."""
    unavailable_since: float | None = None
    """When the store began not to answer it."""


@dataclass(frozen=True, eq=False)
class Call:
    """What an actor has been asked for, and has not answered."""

    slot: Slot
    kind: Literal["place", "start", "score", "commit"]
    """"place": to say when Ray has found room for it."""
    since: float

    @property
    def is_of_start(self) -> bool:
        """Whether the actor has not started yet."""
        return self.kind in ("place", "start")


@dataclass(frozen=True, eq=False)
class ActorMaker:
    """Makes actors; each in a placement group of its own, which goes when it is killed, where there are bundles.

    Groups that are left when the driver ends, in whatever way, Ray removes with its job.
    """

    actor_class: Any
    """That `ray.remote` has made one."""
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    """Ray's, for each actor."""
    bundles: Sequence[Mapping[str, float]] = ()
    """Resources; the actor lies in the first, and so may what it starts, there and in the others."""
    _groups: dict[Any, PlacementGroup] = field(default_factory=dict)
    """By actor."""

    def __call__(self) -> Any:
        """Ask for one more actor; it starts when there is room for it."""
        if not self.bundles:
            return self.actor_class.options(**self.options).remote(*self.arguments)
        group = placement_group([dict(bundle) for bundle in self.bundles], strategy="PACK")
        place = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        actor = self.actor_class.options(**self.options, scheduling_strategy=place).remote(*self.arguments)
        self._groups[actor] = group
        return actor

    def kill(self, actor: Any) -> None:
        """End an actor that was made here, and all that runs in its group."""
        kill_actor(actor)
        if (group := self._groups.pop(actor, None)) is not None:
            remove_placement_group(group)


def kill_actor(actor: Any) -> None:
    """End an actor's process; Ray starts no other in its place."""
    ray.kill(actor, no_restart=True)


def draining_nodes() -> Container[str]:
    """Nodes that are about to go: preempted, or no longer wanted by the autoscaler."""
    try:
        found: dict[str, int] = ray._private.state.state.get_draining_nodes()  # as Ray's own libraries ask, too
    except (RayError, RuntimeError):  # through a Ray client, or while the cluster's head is started again
        return ()
    return found


def is_preempted(error: RayError) -> bool:
    """Whether an actor died because its node was taken away."""
    return isinstance(error, RayActorError) and bool(error.preempted)


def reason_of(cause: Exception) -> str:
    """What a person needs to know of an error that came back from an actor, in a line."""
    if isinstance(cause, LogitCacheError):
        return str(cause)
    if not isinstance(cause, RayError):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:1000]
    # Of Ray's own words those that say why: not which actor it was, nor what might be the cause of such things.
    lines = (line for line in str(cause).splitlines() if not line.startswith("\t"))
    text = " ".join(" ".join(lines).split()).partition(" Some common causes include")[0]
    return f"its worker died or cannot be reached: {(text.partition('Worker exit detail: ')[2] or text)[:1000]}"
