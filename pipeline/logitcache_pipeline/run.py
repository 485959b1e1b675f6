"""The driver's loop: hands shards to Ray actors until each is committed or has used up its attempts.

    what comes back                          the actor            the shard
    its outcome                              takes the next       committed
    an exception of the task                 takes the next       another attempt
    ActorUnavailableError (it restarts)      is started again     another attempt
    another RayError (the actor is gone)     is replaced          another attempt
    nothing until the deadline               is killed, replaced  another attempt

A shard that has used up its attempts is reported to `quarantine` with the reason of each. A shard's clock starts when
its actor has answered that it has started, so that waiting for a node or for the teacher's weights costs no attempt.
An actor that fails to start is replaced as often as a shard is attempted, then done without.

What an event costs does not grow with the number of shards, and memory holds nothing of a shard that is committed: with
shards of a second, one driver keeps hundreds of workers busy.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from logitcache_pipeline.worker import ShardOutcome, ShardTask
from logitcache_storage.errors import BuildError, InputError, LogitCacheError

POLL_SECONDS = 1.0
FIRST_DEADLINE_SECONDS = 3600.0
DEADLINE_FACTOR = 20.0
LEAST_DEADLINE_SECONDS = 600.0
WAITING_NOTE_SECONDS = 60.0


@dataclass(frozen=True)
class RunSettings:
    """How many workers there are, and how patient the driver is with them."""

    num_workers: int = 1
    max_attempts: int = 3
    """Attempts at a shard before it is quarantined, and at starting a worker before the run goes on without it."""
    shard_deadline: float | None = None
    """Seconds an attempt may take; None: 20 times the slowest shard so far, at least 10 minutes, an hour at first."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard_deadline is not None and self.shard_deadline <= 0:
            raise InputError(f"shard_deadline must be above 0 seconds, got {self.shard_deadline}")


class Observer(Protocol):
    """Who is told what happens. Workers are numbered from 0; one that is replaced hands its number on."""

    def worker_started(self, worker: int, name: str) -> None:
        """A worker has loaded its teacher; `name` is what its actor calls itself."""

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        """A shard is in the store."""

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        """An attempt at a shard has failed."""

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        """A shard has used up its attempts."""

    def worker_failed(self, reason: str) -> None:
        """A worker could not start."""

    def waiting(self, seconds: float) -> None:
        """No worker has scored anything for so long, because none has started."""


@dataclass(eq=False)
class _Slot:
    """One actor and what it is doing: starting (no task) or scoring a task since `started`."""

    number: int
    actor: Any
    name: str = ""
    """What it called itself when it had started, for people."""
    task: ShardTask | None = None
    started: float = 0.0
    failed_starts: int = 0


def kill_actor(actor: Any) -> None:
    """End an actor's process; Ray starts no other in its place."""
    ray.kill(actor, no_restart=True)


def run_shards(
    tasks: Iterable[ShardTask],
    make_worker: Callable[[], Any],
    settings: RunSettings,
    observer: Observer,
    kill_worker: Callable[[Any], None] = kill_actor,
) -> None:
    """Score every shard, or report why not.

    Args:
        tasks: the shards that are left; those with most tokens are scored first, because the last ones decide how long
            some workers wait for the others.
        make_worker: makes a Ray actor with the methods of `worker.ScoringWorker`.
        settings: number of workers, attempts, deadline.
        observer: told of every commit, failed attempt and quarantine, from this thread.
        kill_worker: ends what `make_worker` made.

    Raises:
        InputError: what a worker said of the teacher when it started; another attempt would say the same.
        BuildError: no worker can start.
    """
    longest_first = deque(sorted(tasks, key=lambda task: (-task.num_tokens, task.shard)))
    loop = _Loop(longest_first, make_worker, settings, observer, kill_worker)
    try:
        loop.run()
    finally:
        loop.stop()


class _Loop:
    def __init__(
        self,
        tasks: deque[ShardTask],
        make_worker: Callable[[], Any],
        settings: RunSettings,
        observer: Observer,
        kill_worker: Callable[[Any], None],
    ) -> None:
        self._tasks = tasks
        self._make_worker = make_worker
        self._settings = settings
        self._observer = observer
        self._kill = kill_worker
        self._busy: dict[Any, _Slot] = {}
        self._reasons: dict[int, list[str]] = defaultdict(list)
        self._slowest = 0.0
        self._last_sign = self._last_note = self._last_look = time.monotonic()

    def run(self) -> None:
        for number in range(min(self._settings.num_workers, len(self._tasks))):
            self._start(_Slot(number, self._make_worker()))
        # Nobody waits for workers that start when there is nothing left for them to do.
        while self._tasks or self._is_scoring():
            for ref in self._ready():
                self._receive(ref, self._busy.pop(ref))
            if time.monotonic() - self._last_look >= POLL_SECONDS:
                self._last_look = time.monotonic()
                self._enforce_deadlines()
                self._say_waiting()

    def _ready(self) -> list[Any]:
        """All answers there are, once there is one: a call of `ray.wait` costs as much as its list is long."""
        refs = list(self._busy)
        first, _ = ray.wait(refs, num_returns=1, timeout=POLL_SECONDS)
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if first else []

    def stop(self) -> None:
        for slot in self._busy.values():
            self._kill(slot.actor)

    def _is_scoring(self) -> bool:
        return any(slot.task is not None for slot in self._busy.values())

    def _start(self, slot: _Slot) -> None:
        slot.task = None
        self._busy[slot.actor.start.remote()] = slot

    def _replace(self, slot: _Slot) -> None:
        self._kill(slot.actor)
        slot.actor = self._make_worker()
        self._start(slot)

    def _give_work(self, slot: _Slot) -> None:
        """The next shard; an actor for which there is none is let go."""
        if not self._tasks:
            self._kill(slot.actor)
            return
        slot.task, slot.started = self._tasks.popleft(), time.monotonic()
        self._busy[slot.actor.score.remote(slot.task)] = slot

    def _receive(self, ref: Any, slot: _Slot) -> None:
        try:
            answer = ray.get(ref)
        except RayError as e:
            cause = e.cause if isinstance(e, RayTaskError) else e
            if slot.task is None:
                if isinstance(cause, InputError):
                    raise cause from None
                self._fail_start(slot, _reason(cause))
            elif isinstance(e, RayTaskError):
                self._fail_task(slot, _reason(cause))
                self._give_work(slot)
            else:
                self._fail_task(slot, _reason(cause), worker_lost=True)
                (self._start if isinstance(e, ActorUnavailableError) else self._replace)(slot)
        else:
            if slot.task is None:
                slot.name, slot.failed_starts = answer, 0
                self._observer.worker_started(slot.number, slot.name)
            else:
                self._slowest = max(self._slowest, time.monotonic() - slot.started)
                self._reasons.pop(slot.task.shard, None)
                self._observer.committed(answer, slot.number)
            self._give_work(slot)

    def _fail_task(self, slot: _Slot, reason: str, *, worker_lost: bool = False) -> None:
        assert slot.task is not None
        task, reasons = slot.task, self._reasons[slot.task.shard]
        reason = f"{reason} (on {slot.name})"
        reasons.append(reason)
        self._observer.failed(task.shard, len(reasons), reason)
        if len(reasons) < self._settings.max_attempts:
            # A shard that took its worker down goes last, so that it cannot hold up the others.
            (self._tasks.append if worker_lost else self._tasks.appendleft)(task)
        else:
            self._observer.quarantine(task.shard, self._reasons.pop(task.shard))

    def _fail_start(self, slot: _Slot, reason: str) -> None:
        """Another actor, or go on without: one bad node must not end a run on a hundred."""
        slot.failed_starts += 1
        self._observer.worker_failed(reason)
        if slot.failed_starts < self._settings.max_attempts:
            self._replace(slot)
            return
        self._kill(slot.actor)
        if not self._busy:
            raise BuildError(f"no worker can start, {slot.failed_starts} attempts in a row failed: {reason}")

    def _enforce_deadlines(self) -> None:
        deadline = self._deadline()
        for ref, slot in list(self._busy.items()):
            if slot.task is not None and time.monotonic() - slot.started > deadline:
                del self._busy[ref]
                reason = f"no answer within {deadline:.0f} s; allow more with --shard-deadline"
                self._fail_task(slot, reason, worker_lost=True)
                self._replace(slot)

    def _deadline(self) -> float:
        if self._settings.shard_deadline is not None:
            return self._settings.shard_deadline
        if not self._slowest:
            return FIRST_DEADLINE_SECONDS
        return max(LEAST_DEADLINE_SECONDS, DEADLINE_FACTOR * self._slowest)

    def _say_waiting(self) -> None:
        now = time.monotonic()
        if self._is_scoring():
            self._last_sign = self._last_note = now
        elif now - self._last_note >= WAITING_NOTE_SECONDS:
            self._last_note = now
            self._observer.waiting(now - self._last_sign)


def _reason(cause: Exception) -> str:
    """What a person needs to know of an error that came back from an actor, in a line."""
    if isinstance(cause, LogitCacheError):
        return str(cause)
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:1000]
    return f"its worker died or cannot be reached: {text}" if isinstance(cause, RayError) else text
