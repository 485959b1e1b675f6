"""The search for the samples that a shard cannot be scored with: what is lost, and how many tries it takes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from logitcache_pipeline.attempts import MOST_GIVEN_BACK, Attempts
from logitcache_pipeline.bisection import MOST_BAD, Bisection, most_bad
from logitcache_pipeline.worker import ShardTask

OTHERS = "other samples of the shard fail alone, too"


def shard(num_samples: int, number: int = 0) -> ShardTask:
    first = 1000 * number
    return ShardTask(number, np.arange(first, first + num_samples), 10 * num_samples, 20 * num_samples)


def search(num_samples: int, is_good: Callable[[list[int]], bool]) -> tuple[dict[int, str] | str, int]:
    """What is left out, or why the whole shard is given up; and the number of tries."""
    bisection = Bisection(shard(num_samples))
    for num_tries in itertools.count():
        task = bisection.next_task()
        if task is None:
            return bisection.verdict, num_tries
        samples = task.samples.tolist()
        assert samples == sorted(set(samples)) and set(samples) <= set(range(num_samples))
        if is_good(samples):
            if not task.is_probe:
                assert sorted(samples + [sample for sample, _ in task.excluded]) == list(range(num_samples))
                return dict(task.excluded), num_tries + 1
            bisection.passed()
        else:
            bisection.failed(f"bad with {samples}")
    raise AssertionError


def without(*bad: int) -> Callable[[list[int]], bool]:
    return lambda samples: not set(bad) & set(samples)


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 7, 8, 31, 64, 100])
def test_one_bad_sample_is_found_wherever_it_is(num_samples):
    """In log2(n) tries, one that shows that it fails alone or that others do not, and that of the rest."""
    for bad in range(num_samples):
        excluded, num_tries = search(num_samples, without(bad))
        assert excluded == {bad: f"bad with [{bad}]"}
        assert num_tries <= math.ceil(math.log2(num_samples)) + 2


def test_several_bad_samples_are_found():
    rng = np.random.default_rng(0)
    for _ in range(200):
        num_samples = int(rng.integers(8, 120))
        bad = rng.choice(num_samples, rng.integers(1, most_bad(num_samples) + 1), replace=False).tolist()
        excluded, num_tries = search(num_samples, without(*bad))
        # Two that are tried besides the first bad one may both be bad: then the engine seems to be.
        assert excluded == OTHERS or sorted(excluded) == sorted(bad)
        assert num_tries <= len(bad) * (math.ceil(math.log2(num_samples)) + 3)


def test_most_of_several_are_found():
    found = [search(64, without(*pair))[0] for pair in itertools.combinations(range(0, 64, 3), 2)]
    assert all(excluded != OTHERS and len(excluded) == 2 for excluded in found)


def test_a_broken_engine_costs_few_tries():
    assert search(64, lambda samples: False) == (OTHERS, 6 + 2)


def test_more_bad_samples_than_a_few_lose_the_shard():
    assert search(100, without(*range(0, 100, 11)))[0] == "more than 8 of its samples fail"
    assert most_bad(100) == MOST_BAD
    excluded, _ = search(100, without(*range(0, 100, 13)))
    assert len(excluded) == 8


def test_samples_that_are_bad_together_alone_lose_the_shard():
    """Too many at once: nothing can be held against any of them."""
    excluded, num_tries = search(64, lambda samples: len(samples) < 40)
    assert excluded == "its samples can be scored alone, and fail together" and num_tries < 20


def test_a_fault_that_has_passed_loses_nothing():
    assert search(64, lambda samples: True) == ({}, 8)


def test_an_innocent_sample_is_not_held_back():
    """A worker is lost while good samples are tried: what it leads to is tried alone, and found good."""
    for lost in range(12):
        tries = iter(range(1000))
        excluded, _ = search(32, lambda samples, tries=tries, lost=lost: next(tries) != lost and 20 not in samples)
        assert list(excluded) == [20]


class Events:
    """An observer of what becomes of shards."""

    def __init__(self) -> None:
        self.num_failed = 0
        self.given_back_shards: list[int] = []
        self.quarantined: dict[int, list[str]] = {}

    def failed(self, shard: int, attempt: int, reason: str) -> None:
        self.num_failed += 1

    def given_back(self, shard: int, reason: str) -> None:
        self.given_back_shards.append(shard)

    def quarantine(self, shard: int, reasons: list[str]) -> None:
        self.quarantined[shard] = reasons


def run(tasks: Iterable[ShardTask], bad: set[int], events: Events) -> dict[int, tuple[tuple[int, str], ...]]:
    """Try everything in order; a bad sample takes its worker down."""
    attempts, committed = Attempts(tasks, 2, events), {}
    while len(attempts):
        task = attempts.take()
        if bad & set(task.samples.tolist()):
            attempts.failed(task, "died", lost_worker=True)
        elif task.is_probe:
            attempts.passed(task)
        else:
            committed[task.shard] = task.excluded
            attempts.committed(task.shard)
    return committed


def test_shards_that_take_workers_down_go_last():
    events = Events()
    committed = run([shard(16, number) for number in range(4)], {1003, 2004, 2005, 2006, 2007, 2008}, events)
    assert list(committed) == [0, 3, 1]
    assert [sample for sample, _ in committed[1]] == [1003]
    assert list(events.quarantined) == [2] and events.quarantined[2][:2] == ["died", "died"]
    assert events.quarantined[2][-1].endswith("samples: died; more than 4 of its samples fail")


def test_a_shard_that_is_given_back_costs_nothing_for_a_while():
    events = Events()
    attempts = Attempts([shard(1)], 1, events)
    for _ in range(MOST_GIVEN_BACK):
        attempts.give_back(attempts.take(), "told to stop")
    assert (len(attempts), events.num_failed, len(events.given_back_shards)) == (1, 0, MOST_GIVEN_BACK)
    assert attempts.is_suspect(attempts.peek())
    attempts.give_back(attempts.take(), "told to stop")
    assert (len(attempts), events.quarantined) == (0, {0: ["told to stop"]})


def test_nearly_equal_shards_keep_their_order_and_much_longer_ones_come_first():
    tasks = [ShardTask(shard, np.arange(1), 10, tokens) for shard, tokens in enumerate([1000, 960, 300, 980, 4000])]
    attempts = Attempts(tasks, 2, Events())
    assert [attempts.take().shard for _ in tasks] == [4, 0, 1, 3, 2]


def test_two_builds_that_begin_in_orders_of_their_own_score_few_shards_twice():
    """In step, which is the worst; each knows what is committed when it takes a shard."""
    num_shards, num_scored = 200, 0
    committed: set[int] = set()
    tasks = [ShardTask(shard, np.arange(1), 10, 10_000 + shard * 37 % 400) for shard in range(num_shards)]
    builds = [Attempts(random.Random(seed).sample(tasks, num_shards), 2, Events()) for seed in range(2)]

    def next_shards(build: Attempts) -> list[int]:
        found: list[int] = []
        while len(build) and len(found) < 4:
            if (number := build.take().shard) not in committed:
                found.append(number)
        return found

    while taken := [number for build in builds for number in next_shards(build)]:
        num_scored += len(taken)
        committed.update(taken)
    assert len(committed) == num_shards and num_scored < 1.15 * num_shards


def test_what_the_store_refuses_in_a_search_is_given_back_for_a_while():
    events = Events()
    attempts = Attempts([shard(8)], 1, events)
    attempts.failed(attempts.take(), "bad")
    for num_left in range(MOST_GIVEN_BACK, 0, -1):
        probe = attempts.take()
        assert probe.is_probe and probe.samples.tolist() == [0, 1, 2, 3]
        attempts.failed(probe, f"the disk is full {num_left}", may_be_samples=False)
    assert (events.num_failed, events.given_back_shards, events.quarantined) == (1, [0] * MOST_GIVEN_BACK, {})
    attempts.passed(attempts.take())
    assert attempts.peek().samples.tolist() == [4, 5]
    attempts.failed(attempts.take(), "the disk is full", may_be_samples=False)
    assert list(events.quarantined) == [0] and not len(attempts)


def test_what_the_store_refuses_is_not_searched():
    events = Events()
    attempts = Attempts([shard(8)], 2, events)
    for _ in range(2):
        attempts.failed(attempts.take(), "the disk is full", may_be_samples=False)
    assert events.quarantined == {0: ["the disk is full"] * 2}
