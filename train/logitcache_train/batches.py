"""Which sample is trained on when and by whom: pure functions of (seed, epoch, sizes), the same on every rank.

    epoch_order      all samples of the cache, once each, shuffled within windows of shards
    window_starts    where the windows of that order begin
    global_batches   cuts that order into optimizer steps of about equal tokens, equally many in every epoch
    micro_batches    cuts one step into world_size * accumulation parts of about equal padded tokens

Only the choice among those parts knows a rank, so a run can be resumed at any step with any number of ranks.

Shapes: S samples in order, B samples of one global batch, n global batches of an epoch.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import InputError

Integers = npt.NDArray[np.integer]
Indices = npt.NDArray[np.int64]


def epoch_order(shard_of_sample: Integers, *, seed: int, epoch: int, window_shards: int) -> Indices:
    """Every sample once, [S]: shards are permuted, and samples shuffled within windows of consecutive shards.

    A reader that goes along this order has `window_shards` shards in use at a time.

    Args:
        shard_of_sample: shard of each sample, [S].
        seed: of the shuffle, >= 0.
        epoch: counted from 0; each has its own order.
        window_shards: shards of a window, >= 1; as many as there are shards make it one whole shuffle.

    Raises:
        InputError: a negative seed or epoch, or a window below 1.
    """
    if seed < 0 or epoch < 0 or window_shards < 1:
        raise InputError(
            "an epoch's order needs seed >= 0, epoch >= 0 and window_shards >= 1,"
            f" got {seed}, {epoch} and {window_shards}"
        )
    # numpy promises the raw stream of a bit generator for ever, the methods built upon it only for a release.
    stream = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    shards, shard_S = np.unique(shard_of_sample, return_inverse=True)
    place_of_shard = np.argsort(np.argsort(stream.random_raw(len(shards)), kind="stable"))
    window_S = place_of_shard[shard_S] // window_shards
    return np.lexsort((stream.random_raw(len(shard_S)), window_S)).astype(np.int64)


def window_starts(shard_S: Integers, window_shards: int) -> Indices:
    """Where each window of an epoch's order starts, ascending, and at last where the order ends.

    Args:
        shard_S: shard of each sample in the order of the epoch, [S].
        window_shards: shards of a window, >= 1.
    """
    # Every sample of a window stands before the first of the next, so a window begins with a shard not seen before.
    _, first_of_shard = np.unique(shard_S, return_index=True)
    starts = np.sort(first_of_shard)[::window_shards]
    return np.append(starts, len(shard_S)).astype(np.int64)


def num_global_batches(total_tokens: int, longest: int, batch_tokens: int) -> int:
    """Optimizer steps of an epoch: a mean of at most `batch_tokens` tokens each, where samples are not too long.

    Args:
        total_tokens: tokens of all samples.
        longest: tokens of the longest sample.
        batch_tokens: tokens of a global batch, >= 1.

    Raises:
        InputError: there are no tokens, or `batch_tokens` is below 1.
    """
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if total_tokens < 1:
        raise InputError(f"samples must have at least one token in all, got {total_tokens}")
    return max(1, min(-(-total_tokens // batch_tokens), total_tokens // longest))


def global_batches(num_tokens_S: Integers, batch_tokens: int) -> Indices:
    """Where each global batch starts in an order, [n + 1] ascending; batch j is [starts[j], starts[j + 1]).

    n depends on the sum and the maximum of the lengths only, so every order of the same samples has as many batches.

    Args:
        num_tokens_S: tokens of each sample in the order of the epoch, [S], each >= 1.
        batch_tokens: see `num_global_batches`.
    """
    ends_S = np.cumsum(num_tokens_S, dtype=np.int64)
    total = int(ends_S[-1]) if len(ends_S) else 0
    n = num_global_batches(total, int(np.max(num_tokens_S, initial=0)), batch_tokens)
    # Sample i belongs to batch j if its midpoint lies in [j, j + 1) * total / n. None is empty: neighbouring
    # midpoints are (l_i + l_{i+1}) / 2 <= longest apart, and longest <= total / n because n <= total // longest;
    # the first midpoint is below, and the last at most, longest / 2 from its end. Twice the midpoint is an integer,
    # and ceil(2 j total / n) is taken in two parts because j * total overflows.
    twice_midpoint_S = 2 * ends_S - num_tokens_S
    j = np.arange(n + 1, dtype=np.int64)
    quotient, remainder = divmod(2 * total, n)
    borders = j * quotient + -(-j * remainder // n)
    return np.searchsorted(twice_midpoint_S, borders, side="left").astype(np.int64)


def micro_batches(batch_B: Indices, num_tokens_B: Integers, num_parts: int) -> list[Indices]:
    """Split a global batch into parts of similar lengths, so that the largest has as few padded tokens as can be.

    Args:
        batch_B: samples of the batch, [B].
        num_tokens_B: tokens of each, [B], each >= 1.
        num_parts: world_size * accumulation steps; rank r's part in accumulation step a is `a * world_size + r`.

    Returns:
        `num_parts` parts, longest samples first; parts are empty only where there are fewer samples than parts.
    """
    order = np.lexsort((batch_B, -np.asarray(num_tokens_B, dtype=np.int64)))
    lengths = np.asarray(num_tokens_B, dtype=np.int64)[order]
    low = int(lengths.max(initial=0))
    high = low * len(lengths)
    while low < high:
        cap = (low + high) // 2
        low, high = (low, cap) if _cut(lengths, cap, num_parts)[-1] == len(lengths) else (cap + 1, high)
    starts = _cut(lengths, low, num_parts)
    return [batch_B[order[start:stop]] for start, stop in pairwise(starts)]


def _cut(lengths_B: Indices, cap: int, num_parts: int) -> list[int]:
    """Starts of the parts if each takes as many samples as fit `cap` padded tokens, [num_parts + 1]."""
    size, starts = len(lengths_B), [0]
    for part in range(num_parts):
        start = starts[-1]
        fits = cap // int(lengths_B[start]) if start < size else 0
        # One sample is left for each later part: idle ranks help nobody.
        left = max(size - start - (num_parts - part - 1), 1)
        starts.append(min(size, start + min(fits, left)))
    return starts
