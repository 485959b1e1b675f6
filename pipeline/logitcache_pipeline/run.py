"""The driver's loop: hands shards to Ray actors until each is committed or has used up its attempts.

    what comes back                          the actor            the shard
    its rows are there                       takes the next       is written meanwhile
    its outcome                                                   committed
    an exception of the task                 takes the next       another attempt
    `max_attempts` of those in a row         is replaced          another attempt
    TeacherLostError                         is replaced          another attempt
    WorkerStoppingError (SIGTERM)            is replaced          given back, at no cost
    StoreUnavailableError                    waits for the store  is asked for again, at no cost, for a while
    RayError (the actor is gone)             is replaced          another attempt; given back if it was leaving
    nothing until the deadline               is killed, replaced  another attempt
    no start until its deadline              is killed, replaced

An actor has at most one shard in the teacher and one behind it, whose rows are on their way into the store. When it
dies, the one in the teacher has failed, and the other is given back. What becomes of a failed shard, `attempts` says.

An actor whose node is being drained takes no further shard and is replaced when it has nothing in hand. A shard's clock
starts when its actor has answered that it has started, so that waiting for a node or for the teacher's weights costs no
attempt; that of a start, when Ray has found room for the actor. An actor that fails to start is replaced as often as a
shard is attempted, then done without; what is wrong with the teacher everywhere ends the run at once, as long as
nothing is committed.

What an event costs does not grow with the number of shards, and memory holds nothing of a shard that is committed: with
shards of a second, one driver keeps hundreds of workers busy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from logitcache_pipeline.actors import NOT_STARTED, Call, Slot, draining_nodes, is_preempted, kill_actor, reason_of
from logitcache_pipeline.attempts import AttemptObserver, Attempts
from logitcache_pipeline.engines.base import TeacherLostError
from logitcache_pipeline.worker import ShardOutcome, ShardTask, WorkerStoppingError
from logitcache_storage.errors import BuildError, InputError, StoreError, StoreUnavailableError
from logitcache_storage.patience import STORE_PATIENCE_SECONDS
from logitcache_storage.terminal import counted

POLL_SECONDS = 1.0
FIRST_DEADLINE_SECONDS = 3600.0
DEADLINE_FACTOR = 20.0
LEAST_DEADLINE_SECONDS = 600.0
WAITING_NOTE_SECONDS = 60.0
START_DEADLINE_SECONDS = 7200.0


@dataclass(frozen=True)
class RunSettings:
    """How many workers there are, and how patient the driver is with them."""

    num_workers: int = 1
    max_attempts: int = 3
    """Attempts at a shard before it is searched for bad samples, failed ones in a row before the worker is replaced,
    and attempts at starting a worker before the run goes on without it."""
    shard_deadline: float | None = None
    """Seconds an attempt may take; None: 20 times the slowest shard so far, at least 10 minutes, an hour at first."""
    start_deadline: float | None = None
    """Seconds that loading the teacher may take; None: START_DEADLINE_SECONDS."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("shard_deadline", "start_deadline"):
            if (seconds := getattr(self, name)) is not None and seconds <= 0:
                raise InputError(f"{name} must be above 0 seconds, got {seconds}")


class Observer(AttemptObserver, Protocol):
    """Who is told what happens. Workers are numbered from 0; one that is replaced hands its number on."""

    def worker_started(self, worker: int, name: str) -> None:
        """A worker has loaded its teacher; `name` is what its actor calls itself."""

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        """A shard is in the store."""

    def worker_failed(self, reason: str) -> None:
        """A worker could not start."""

    def worker_leaves(self, worker: int, reason: str) -> None:
        """A worker takes no further shard, and another will start in its place."""

    def waiting(self, seconds: float) -> None:
        """No worker has scored anything for so long, because none has started."""

    def store_waits(self, seconds: float, reason: str) -> None:
        """A worker has waited for the store for so long."""


def run_shards(
    tasks: Iterable[ShardTask],
    make_worker: Callable[[], Any],
    settings: RunSettings,
    observer: Observer,
    kill_worker: Callable[[Any], None] = kill_actor,
) -> None:
    """Score every shard, or report why not.

    Args:
        tasks: the shards that are left; those with most tokens are scored first.
        make_worker: makes a Ray actor with the methods of `worker.ScoringWorker`.
        settings: number of workers, attempts, deadline.
        observer: told of every commit, failed attempt and quarantine, from this thread.
        kill_worker: ends what `make_worker` made.

    Raises:
        InputError: what a worker said of the teacher when it started, before anything was committed; another attempt
            would say the same.
        BuildError: no worker can start.
    """
    loop = _Loop(Attempts(tasks, settings.max_attempts, observer), make_worker, settings, observer, kill_worker)
    try:
        loop.run()
    finally:
        loop.stop()


class _Loop:
    def __init__(
        self,
        shards: Attempts,
        make_worker: Callable[[], Any],
        settings: RunSettings,
        observer: Observer,
        kill_worker: Callable[[Any], None],
    ) -> None:
        self._shards = shards
        self._make_worker = make_worker
        self._settings = settings
        self._observer = observer
        self._kill = kill_worker
        self._busy: dict[Any, Call] = {}
        self._has_committed = False
        self._slowest = 0.0
        self._last_sign = self._last_note = self._last_look = time.monotonic()
        self._last_store_note = -math.inf

    def run(self) -> None:
        for number in range(min(self._settings.num_workers, len(self._shards))):
            self._start(Slot(number, self._make_worker()))
        # Nobody waits for workers that start when there is nothing left for them to do.
        while len(self._shards) or self._has_work_in_hand():
            for ref in self._ready():
                if ref in self._busy:  # else its actor has been lost since
                    self._receive(ref, self._busy.pop(ref))
            if time.monotonic() - self._last_look >= POLL_SECONDS:
                self._last_look = time.monotonic()
                self._enforce_deadlines()
                self._leave_draining_nodes()
                self._say_waiting()

    def _ready(self) -> list[Any]:
        """All answers there are, once there is one: a call of `ray.wait` costs as much as its list is long.

        Scores come first: their teachers have nothing to do.
        """
        refs = list(self._busy)
        first, _ = ray.wait(refs, num_returns=1, timeout=POLL_SECONDS)
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if first else []
        return sorted(ready, key=lambda ref: self._busy[ref].kind != "score")

    def stop(self) -> None:
        for slot in {call.slot.number: call.slot for call in self._busy.values()}.values():
            self._kill(slot.actor)

    def _has_work_in_hand(self) -> bool:
        return any(not call.is_of_start for call in self._busy.values())

    def _call(self, slot: Slot, kind: Literal["place", "start", "score", "commit"]) -> None:
        match kind:
            case "place":
                ref = slot.actor.__ray_ready__.remote()
            case "start":
                ref = slot.actor.start.remote()
            case "score":
                ref = slot.actor.score.remote(slot.scoring)
            case "commit":
                assert slot.writing is not None
                ref = slot.actor.commit.remote(slot.writing.shard)
        self._busy[ref] = Call(slot, kind, time.monotonic())

    def _start(self, slot: Slot) -> None:
        slot.scoring = slot.scored = slot.writing = slot.unavailable_since = None
        slot.info, slot.is_leaving, slot.failed_in_row = NOT_STARTED, False, 0
        self._call(slot, "place")

    def _replace(self, slot: Slot) -> None:
        self._kill(slot.actor)
        slot.actor = self._make_worker()
        self._start(slot)

    def _go_on(self, slot: Slot) -> None:
        """Score the next shard, and write what is scored, as far as this actor may."""
        may_write = slot.scored is not None and slot.writing is None
        if may_write:
            slot.writing, slot.scored = slot.scored, None
        if slot.scoring is None and slot.scored is None:
            self._score_next(slot)
        if may_write:
            self._call(slot, "commit")

    def _score_next(self, slot: Slot) -> None:
        if len(self._shards) and not slot.is_leaving:
            in_hand = [] if slot.writing is None else [slot.writing, self._shards.peek()]
            if not any(map(self._shards.is_suspect, in_hand)):
                slot.scoring = self._shards.take()
                self._call(slot, "score")
        elif slot.writing is None:
            # One for which there is nothing left is let go: its place may be wanted by one that must be replaced.
            if len(self._shards):
                self._replace(slot)
            else:
                self._kill(slot.actor)

    def _receive(self, ref: Any, call: Call) -> None:
        slot = call.slot
        try:
            answer = ray.get(ref)
        except RayTaskError as e:
            self._receive_error(call, e.cause)
        except RayError as e:
            if call.is_of_start:
                self._fail_start(slot, reason_of(e), is_blameless=is_preempted(e))
            else:
                self._lose(slot, e)
        else:
            slot.unavailable_since = None
            if call.kind == "place":
                self._call(slot, "start")
            else:
                self._receive_answer(call, answer)
                self._go_on(slot)

    def _receive_answer(self, call: Call, answer: Any) -> None:
        slot = call.slot
        if call.kind == "start":
            slot.info, slot.failed_starts = answer, 0
            self._observer.worker_started(slot.number, slot.info.name)
        elif call.kind == "commit":
            slot.writing = None
            self._committed(answer, slot)
        else:
            assert slot.scoring is not None
            task, slot.scoring, slot.failed_in_row = slot.scoring, None, 0
            self._slowest = max(self._slowest, time.monotonic() - call.since)
            if answer is not None:
                self._committed(answer, slot)
            elif task.is_probe:
                self._shards.passed(task)
            else:
                slot.scored = task

    def _committed(self, outcome: ShardOutcome, slot: Slot) -> None:
        self._has_committed = True
        self._shards.committed(outcome.shard)
        self._observer.committed(outcome, slot.number)

    def _receive_error(self, call: Call, cause: Exception) -> None:
        """What the actor's own code has raised; the actor lives."""
        slot = call.slot
        if isinstance(cause, StoreUnavailableError) and self._is_patient(slot, str(cause)):
            self._call(slot, call.kind)
        elif call.kind == "start":
            if isinstance(cause, InputError) and not self._has_committed:
                raise cause from None
            self._fail_start(slot, reason_of(cause), is_blameless=isinstance(cause, WorkerStoppingError))
        else:
            self._fail_attempt(call, cause)
            self._go_on(slot)

    def _fail_attempt(self, call: Call, cause: Exception) -> None:
        slot = call.slot
        task = slot.scoring if call.kind == "score" else slot.writing
        assert task is not None
        if call.kind == "score":
            slot.scoring = None
            slot.failed_in_row += 1
        else:
            slot.writing = None
        reason = f"{reason_of(cause)} (on {slot.info.name})"
        if isinstance(cause, WorkerStoppingError):
            self._leave(slot, str(cause))
            self._shards.give_back(task, reason)
            return
        self._shards.failed(task, reason, may_be_samples=not isinstance(cause, StoreError))
        if slot.is_leaving:
            return
        if isinstance(cause, TeacherLostError):
            self._leave(slot, "its teacher has failed")
        elif slot.failed_in_row >= self._settings.max_attempts:
            # It may be the process: an error of CUDA stays, and one worker would go through all shards with it.
            self._leave(slot, f"{counted(slot.failed_in_row, 'attempt')} in a row failed")

    def _is_patient(self, slot: Slot, reason: str) -> bool:
        """Whether to wait longer for the store before it costs the shard an attempt; says so now and then."""
        now = time.monotonic()
        slot.unavailable_since = slot.unavailable_since or now
        waited = now - slot.unavailable_since
        if now - self._last_store_note >= WAITING_NOTE_SECONDS:
            self._last_store_note = now
            self._observer.store_waits(waited, reason)
        if waited <= STORE_PATIENCE_SECONDS:
            return True
        slot.unavailable_since = None
        return False

    def _lose(self, slot: Slot, error: RayError) -> None:
        """The actor has died, with all that it had in hand."""
        for ref in [ref for ref, call in self._busy.items() if call.slot is slot and call.kind == "commit"]:
            # One that was answered before holds.
            with suppress(RayError):
                if ray.wait([ref], timeout=0)[0]:
                    self._receive_answer(self._busy[ref], ray.get(ref))
        reason = f"{reason_of(error)} (on {slot.info.name})"
        is_blameless = slot.is_leaving or is_preempted(error)
        self._take_back(slot, None if is_blameless else slot.scoring or slot.writing, reason)
        self._replace(slot)

    def _take_back(self, slot: Slot, blamed: ShardTask | None, reason: str) -> None:
        """Shards that an actor no longer has in hand; one of them has failed, perhaps."""
        for ref in [ref for ref, call in self._busy.items() if call.slot is slot]:
            del self._busy[ref]
        for task in (slot.scored, slot.writing, slot.scoring):
            if task is not None and task is not blamed:
                self._shards.give_back(task, reason)
        if blamed is not None:
            self._shards.failed(blamed, reason, lost_worker=True)

    def _fail_start(self, slot: Slot, reason: str, *, is_blameless: bool) -> None:
        """Another actor, or go on without: one bad node must not end a run on a hundred."""
        if is_blameless:
            self._leave(slot, reason)
            self._replace(slot)
            return
        slot.failed_starts += 1
        self._observer.worker_failed(reason)
        if slot.failed_starts < self._settings.max_attempts:
            self._replace(slot)
            return
        self._kill(slot.actor)
        if not self._busy:
            raise BuildError(f"no worker can start, {slot.failed_starts} attempts in a row failed: {reason}")

    def _enforce_deadlines(self) -> None:
        to_score, now = self._deadline(), time.monotonic()
        to_start = self._settings.start_deadline or START_DEADLINE_SECONDS
        # Clients of stores have patience, and end on their own.
        to_commit = max(to_score, LEAST_DEADLINE_SECONDS)
        deadlines = {"place": math.inf, "start": to_start, "score": to_score, "commit": to_commit}
        for call in [call for call in self._busy.values() if now - call.since > deadlines[call.kind]]:
            slot, within = call.slot, f"within {deadlines[call.kind]:.0f} s; allow more with"
            if call not in self._busy.values():
                continue  # its actor has gone with the call before
            if call.kind == "start":
                self._take_back(slot, None, "")
                self._fail_start(slot, f"it has not loaded the teacher {within} --start-deadline", is_blameless=False)
            else:
                reason = f"no answer {within} --shard-deadline (on {slot.info.name})"
                self._take_back(slot, slot.scoring if call.kind == "score" else slot.writing, reason)
                self._replace(slot)

    def _deadline(self) -> float:
        """Seconds that a score may take."""
        if self._settings.shard_deadline is not None:
            return self._settings.shard_deadline
        if not self._slowest:
            return FIRST_DEADLINE_SECONDS
        return max(LEAST_DEADLINE_SECONDS, DEADLINE_FACTOR * self._slowest)

    def _leave_draining_nodes(self) -> None:
        nodes = draining_nodes()
        for slot in {call.slot.number: call.slot for call in self._busy.values()}.values():
            is_drained = any(node in nodes for node in (slot.info.node, *slot.info.other_nodes))
            if is_drained and not slot.is_leaving:
                self._leave(slot, "its node is being drained")

    def _leave(self, slot: Slot, reason: str) -> None:
        slot.is_leaving = True
        self._observer.worker_leaves(slot.number, reason)

    def _say_waiting(self) -> None:
        now = time.monotonic()
        if self._has_work_in_hand():
            self._last_sign = self._last_note = now
        elif now - self._last_note >= WAITING_NOTE_SECONDS:
            self._last_note = now
            self._observer.waiting(now - self._last_sign)
