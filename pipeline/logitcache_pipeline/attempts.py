"""Which shards are left, and what becomes of one whose attempt has failed.

    its first attempts                the shard is tried again, so often as the settings say
    all of them                       it is searched for bad samples (`bisection`), and committed without those
    the search leads nowhere          it is quarantined
    an attempt that nobody failed     it is given back and counts for nothing, up to `MOST_GIVEN_BACK` times

A shard that has failed, or has been lost while another one failed, is a suspect: a worker has nothing else in hand
while it is tried, so that a worker that dies leaves no doubt about what it died of.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Protocol

from logitcache_pipeline.bisection import Bisection
from logitcache_pipeline.worker import ShardTask

MOST_GIVEN_BACK = 10
"""For one shard; a machine may be taken away so often before it is held against what ran on it."""


class AttemptObserver(Protocol):
    """Who is told what becomes of shards."""

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        """An attempt at a shard, or at some of its samples, has failed."""

    def given_back(self, shard: int, reason: str) -> None:
        """An attempt at a shard has ended through no fault of it; it is tried again."""

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        """A shard has used up its attempts."""


class Attempts:
    """The shards of a run that are not committed; memory holds nothing more of one that is."""

    def __init__(self, tasks: Iterable[ShardTask], max_attempts: int, observer: AttemptObserver) -> None:
        """Those with most tokens come first, because the last ones decide how long some workers wait for others.

        Among those of nearly the same number, the order is that of `tasks`.
        """
        self._left = deque(sorted(tasks, key=lambda task: -round(math.log(max(task.num_tokens, 1), 1.1))))
        self._max_attempts, self._observer = max_attempts, observer
        self._reasons: dict[int, list[str]] = defaultdict(list)
        self._searches: dict[int, Bisection] = {}
        self._given_back: Counter[int] = Counter()

    def __len__(self) -> int:
        """How many wait for a worker."""
        return len(self._left)

    def peek(self) -> ShardTask:
        """What comes next."""
        return self._left[0]

    def take(self) -> ShardTask:
        """What comes next; it is the caller's now."""
        return self._left.popleft()

    def is_suspect(self, task: ShardTask) -> bool:
        """Whether a worker must have nothing else in hand while it tries this."""
        return task.shard in self._reasons or task.shard in self._given_back

    def committed(self, shard: int) -> None:
        """A shard is in the store."""
        for about in (self._reasons, self._searches, self._given_back):
            about.pop(shard, None)

    def passed(self, probe: ShardTask) -> None:
        """The samples of a probe can be scored."""
        search = self._searches[probe.shard]
        search.passed()
        self._go_on(probe.shard, search)

    def give_back(self, task: ShardTask, reason: str) -> None:
        """The attempt says nothing of the shard; it is tried again soon."""
        self._given_back[task.shard] += 1
        if self._given_back[task.shard] > MOST_GIVEN_BACK:
            self.failed(task, reason)
            return
        self._observer.given_back(task.shard, reason)
        self._left.appendleft(task)

    def failed(self, task: ShardTask, reason: str, *, lost_worker: bool = False, may_be_samples: bool = True) -> None:
        """The attempt has failed.

        Args:
            task: what was attempted.
            reason: for people.
            lost_worker: it took its worker down: then it goes last, so that it cannot hold up the others.
            may_be_samples: whether another choice of samples may do better; in a search, which asks nothing else, an
                attempt of which that is not so is given back.
        """
        reasons, search = self._reasons[task.shard], self._searches.get(task.shard)
        if search is not None and not may_be_samples and self._given_back[task.shard] < MOST_GIVEN_BACK:
            self.give_back(task, reason)
            return
        some = f"{len(task.samples)} of its samples: " if search is not None else ""
        reasons.append(some + reason)
        self._observer.failed(task.shard, len(reasons), reasons[-1])
        if search is None and len(reasons) < self._max_attempts:
            (self._left.append if lost_worker else self._left.appendleft)(task)
            return
        if search is not None:
            search.failed(reason)
        elif may_be_samples and len(task.samples) > 1:
            search = self._searches[task.shard] = Bisection(task)
        search = search if may_be_samples else None
        self._go_on(task.shard, search, lost_worker=lost_worker)

    def _go_on(self, shard: int, search: Bisection | None, *, lost_worker: bool = False) -> None:
        task = None if search is None else search.next_task()
        if task is None:
            reasons = self._reasons[shard]
            if search is not None:
                reasons[-1] += f"; {search.verdict}"
            self.committed(shard)
            self._observer.quarantine(shard, reasons)
        else:
            (self._left.append if lost_worker else self._left.appendleft)(task)
