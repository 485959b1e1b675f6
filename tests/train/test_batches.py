"""The pure order: every sample once, equally many batches in every epoch, the same batches for any world size."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_train.batches import epoch_order, global_batches, micro_batches, num_global_batches, window_starts

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)
shards = st.lists(st.integers(0, 9), min_size=1, max_size=80).map(np.array)


@given(shards, st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 12))
def test_an_epoch_visits_every_sample_once_within_windows_of_shards(shard, seed, epoch, window):
    order = epoch_order(shard, seed=seed, epoch=epoch, window_shards=window)
    assert sorted(order) == list(range(len(shard)))
    visited = shard[order]
    first = {s: int(np.flatnonzero(visited == s)[0]) for s in set(visited)}
    last = {s: int(np.flatnonzero(visited == s)[-1]) for s in set(visited)}
    for place in range(len(order)):
        in_use = [s for s in first if first[s] <= place <= last[s]]
        assert len(in_use) <= window


@given(shards, st.integers(0, 2**40), st.integers(1, 12))
def test_windows_are_cut_where_their_shards_change(shard, seed, window):
    visited = shard[epoch_order(shard, seed=seed, epoch=0, window_shards=window)]
    starts = window_starts(visited, window)
    parts = [set(visited[a:b]) for a, b in pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == len(shard)
    assert all(len(part) == window for part in parts[:-1]) and 1 <= len(parts[-1]) <= window
    assert sum(map(len, parts)) == len(set(shard)) == len(set().union(*parts))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), min_size=1, max_size=60).map(np.array),
    st.integers(0, 2**40),
    st.integers(1, 5),
    st.integers(1, 200),
    st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4)),
    st.floats(0, 1),
)
def test_a_run_resumed_with_another_topology_sees_each_sample_once(
    shard_and_length, seed, window, batch_tokens, before, after, at
):
    """Each side as an own process computes it: rank by rank, worker by worker, from the pure functions alone."""
    shard, num_tokens = shard_and_length.T

    def seen_by(topology, first, last):
        world_size, accumulation, num_workers = topology
        steps = [[] for _ in range(last - first)]
        for rank in range(world_size):
            order = epoch_order(shard, seed=seed, epoch=3, window_shards=window)
            starts = global_batches(num_tokens[order], batch_tokens)
            jobs = [(j, a) for j in range(first, last) for a in range(accumulation)]
            for worker in range(num_workers):
                for j, a in jobs[worker::num_workers]:
                    batch = order[starts[j] : starts[j + 1]]
                    parts = micro_batches(batch, num_tokens[batch], world_size * accumulation)
                    steps[j - first] += parts[a * world_size + rank].tolist()
        return [sorted(step) for step in steps]

    num_steps = num_global_batches(int(num_tokens.sum()), int(num_tokens.max()), batch_tokens)
    stop = round(at * num_steps)
    resumed = seen_by(before, 0, stop) + seen_by(after, stop, num_steps)
    assert resumed == seen_by((1, 1, 1), 0, num_steps)
    assert sorted(sample for step in resumed for sample in step) == list(range(len(shard)))


def test_the_order_is_pinned():
    """Another order in another release would break every resumed run."""
    shard = np.array([0, 0, 1, 1, 1, 2, 2, 3])
    assert epoch_order(shard, seed=1, epoch=0, window_shards=2).tolist() == PINNED[0]
    assert epoch_order(shard, seed=1, epoch=1, window_shards=2).tolist() == PINNED[1]


PINNED = ([5, 0, 1, 6, 3, 7, 4, 2], [1, 7, 0, 2, 6, 3, 5, 4])


def test_seed_and_epoch_change_the_order():
    shard = np.arange(200) // 10
    orders = [epoch_order(shard, seed=s, epoch=e, window_shards=4) for s, e in ((0, 0), (0, 1), (1, 0))]
    for a, b in combinations(orders, 2):
        assert not np.array_equal(a, b)


def test_shards_of_a_window_are_mixed():
    shard = np.arange(1000) // 100
    visited = shard[epoch_order(shard, seed=0, epoch=0, window_shards=5)]
    # 100 of the first 500 belong to each of five shards; in any fifth of them about 20 do (sd 3.6).
    for start in range(0, 500, 100):
        assert np.unique(visited[start : start + 100], return_counts=True)[1].min() >= 5


@settings(max_examples=300)
@given(lengths, st.integers(1, 400), st.randoms())
def test_every_epoch_has_as_many_batches_and_none_is_empty(num_tokens, batch_tokens, random):
    shuffled = num_tokens.tolist()
    random.shuffle(shuffled)
    starts, again = (global_batches(np.array(n), batch_tokens) for n in (num_tokens, shuffled))
    n = num_global_batches(int(num_tokens.sum()), int(num_tokens.max()), batch_tokens)
    assert len(starts) == len(again) == n + 1
    for found in (starts, again):
        assert found[0] == 0 and found[-1] == len(num_tokens)
        assert (np.diff(found) >= 1).all()


@given(lengths, st.integers(1, 400))
def test_batches_are_as_large_as_asked(num_tokens, batch_tokens):
    starts = global_batches(num_tokens, batch_tokens)
    total, longest = int(num_tokens.sum()), int(num_tokens.max())
    sizes = np.add.reduceat(num_tokens, starts[:-1])
    mean = total / len(sizes)
    # A cut is off its place by half a sample at most, so a batch by one sample.
    assert (abs(sizes - mean) <= longest).all()
    assert mean <= max(batch_tokens, 2 * longest)


def test_cuts_survive_a_trillion_tokens():
    num_tokens = np.full(1000, 10**9)
    starts = global_batches(num_tokens, 4 * 10**9)
    assert np.diff(starts).tolist() == [4] * 250


def test_the_cut_follows_the_midpoint():
    # Total 20 in 2 batches: the midpoints are 3, 8, 13 and 18, the border is at 10.
    assert global_batches(np.array([6, 4, 6, 4]), 10).tolist() == [0, 2, 4]


@settings(max_examples=300)
@given(lengths, st.integers(1, 12))
def test_parts_hold_the_batch_and_are_empty_only_where_they_must(num_tokens, num_parts):
    batch = np.arange(len(num_tokens)) + 100
    parts = micro_batches(batch, num_tokens, num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts)) == batch.tolist()
    assert sum(len(p) == 0 for p in parts) == max(0, num_parts - len(batch))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9).map(np.array), st.integers(1, 4))
def test_the_largest_part_is_as_small_as_any_cut_of_the_sorted_batch_allows(num_tokens, num_parts):
    batch = np.arange(len(num_tokens))
    parts = micro_batches(batch, num_tokens, num_parts)
    found = max(len(p) * num_tokens[p].max() for p in parts if len(p))
    ordered = np.sort(num_tokens)[::-1]
    best = min(
        max((b - a) * ordered[a:b].max(initial=0) for a, b in zip((0, *cuts), (*cuts, len(ordered)), strict=True))
        for size in range(num_parts)
        for cuts in combinations(range(1, len(ordered)), size)
    )
    assert found == best


def test_parts_do_not_depend_on_the_order_of_the_batch():
    num_tokens = np.array([5, 3, 5, 8, 1, 3])
    shuffle = np.array([3, 1, 5, 0, 2, 4])
    for a, b in zip(
        micro_batches(np.arange(6), num_tokens, 3), micro_batches(shuffle, num_tokens[shuffle], 3), strict=True
    ):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize(
    ("seed", "epoch", "window"), [(-1, 0, 1), (0, -1, 1), (0, 0, 0)], ids=["seed", "epoch", "window"]
)
def test_an_order_out_of_range_is_refused(seed, epoch, window):
    with pytest.raises(InputError, match="seed >= 0, epoch >= 0 and window_shards >= 1"):
        epoch_order(np.zeros(3, int), seed=seed, epoch=epoch, window_shards=window)


def test_batches_out_of_range_are_refused():
    with pytest.raises(InputError, match="batch_tokens must be at least 1, got 0"):
        global_batches(np.array([3, 4]), 0)
    with pytest.raises(InputError, match="at least one token in all, got 0"):
        global_batches(np.array([], int), 8)
