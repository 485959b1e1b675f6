"""Which samples of a shard make its attempts fail, so that the others can be committed without them.

A shard that has used up its attempts is halved: of samples that fail together, the first half is tried; if that goes
well, the fault is in the second. One bad sample of n is found in log2(n) tries, and one more shows that it fails alone:
without that nothing is held against it. Then the rest of the shard is attempted; if that fails, the search goes on
among the samples that have not gone well yet.

The whole shard is given up where the fault is not of a few samples: where others fail alone, too, and none goes well
(the engine is broken), where more are bad than `most_bad`, or where each goes well alone and all together do not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from logitcache_pipeline.worker import ShardTask

MOST_BAD = 8
"""Samples of one shard that are left out, and at most a quarter of it: where more fail, it is not they."""
MOST_OTHERS = 2
"""Samples tried besides, before the engine is held to be broken."""

Samples = npt.NDArray[np.int64]


def most_bad(num_samples: int) -> int:
    """How many bad samples a shard of so many may have."""
    return min(MOST_BAD, max(1, num_samples // 4))


class Bisection:
    """The search in one shard: ask `next_task`, try it, say how it went with `passed` or `failed`, and so on."""

    def __init__(self, task: ShardTask) -> None:
        """`task` is the whole shard, which has failed; it has two samples at least."""
        self._whole = task
        self._bad: dict[int, str] = {}
        self._good: set[int] = set()
        self._suspects: Samples = task.samples
        """Fail together, or must be at fault because their siblings are not."""
        self._others: list[int] = []
        self._trying: Samples = task.samples
        self._num_rounds = 0
        self.verdict = ""
        """Why the shard is given up; empty as long as it is not."""

    def next_task(self) -> ShardTask | None:
        """What to try next: a probe, or the shard without its bad samples; None: give the shard up."""
        if self.verdict:
            return None
        if self._others:
            return self._probe(np.array(self._others[-1:]))
        if len(self._suspects):
            return self._probe(self._suspects[: (len(self._suspects) + 1) // 2])
        rest = [sample for sample in self._whole.samples.tolist() if sample not in self._bad]
        self._trying = np.array(rest, dtype=np.int64)
        excluded = tuple(sorted(self._bad.items()))
        return replace(self._whole, samples=self._trying, excluded=excluded)

    def passed(self) -> None:
        """The last task, a probe, went well."""
        self._good.update(self._trying.tolist())
        if self._others:
            self._others.clear()  # the engine works
        else:
            self._suspects = self._suspects[len(self._trying) :]

    def failed(self, reason: str) -> None:
        """The last task did not go well."""
        trying = self._trying.tolist()
        if self._others:
            self._bad[self._others.pop()] = reason
            if not self._others:
                self.verdict = "other samples of the shard fail alone, too"
        elif not len(self._suspects):
            self._begin_again()
        elif len(trying) > 1:
            self._suspects = self._trying
        else:
            self._bad[trying[0]] = reason
            self._suspects = self._suspects[:0]
            self._others = [] if self._good else self._not_tried()[-MOST_OTHERS:]

    def _begin_again(self) -> None:
        """The shard failed without its bad samples: there are more, or it is not the samples."""
        self._num_rounds += 1
        self._suspects = np.array(self._not_tried(), dtype=np.int64)
        enough = most_bad(len(self._whole.samples))
        if len(self._bad) >= enough or self._num_rounds > enough:
            self.verdict = f"more than {enough} of its samples fail"
        elif not len(self._suspects):
            self.verdict = "its samples can be scored alone, and fail together"

    def _not_tried(self) -> list[int]:
        return [s for s in self._whole.samples.tolist() if s not in self._good and s not in self._bad]

    def _probe(self, samples: Samples) -> ShardTask:
        self._trying = samples
        return replace(self._whole, samples=samples, is_probe=True)
