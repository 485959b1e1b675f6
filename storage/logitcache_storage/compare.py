"""How far apart two caches of one corpus are, token by token and sample by sample.

Samples are joined by key, so the caches may differ in order, shards, container, precision and k. `divergence.py` says
what is measured at a token and in which sense it is a bound. Rows are read a bounded number at a time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import pyarrow.compute as pc

from logitcache_storage.cache import Cache
from logitcache_storage.commit import read_rows
from logitcache_storage.divergence import ENTRIES_AT_ONCE, Integers, RowComparison, compare_rows
from logitcache_storage.errors import CorruptionError, InputError, MismatchError
from logitcache_storage.progress import progress
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.zarr_shard import CHUNK_ROWS

KL_EDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Where the bins of the histogram meet, nats."""

MAX_EXAMPLES = 5
"""Samples of one cache only that are named."""


@dataclass(frozen=True)
class SampleComparison:
    """Means over the target tokens of one sample."""

    key: str
    source_id: str
    """In A."""
    index_a: int
    index_b: int
    num_rows: int
    kl_ab: float
    kl_ba: float
    js: float
    top_1_agreement: float
    label_difference: float


@dataclass(frozen=True)
class Bin:
    """Rows whose KL(A || B) is in [low, high) nats; `high` is None in the last bin."""

    low: float
    high: float | None
    num_rows: int


@dataclass(frozen=True)
class Unmatched:
    """Samples that one cache has and the other has not."""

    num_samples: int
    examples: tuple[str, ...]
    """Where the first few stood in the corpus."""


@dataclass(frozen=True)
class Comparison:
    """Means over the target tokens of all samples that both caches hold, each counted once."""

    url_a: str
    url_b: str
    settings: tuple[str, ...]
    """Fields of the two identities that differ, as "field: in A, in B"."""
    num_samples: int
    num_rows: int
    only_a: Unmatched
    only_b: Unmatched
    kl_ab: float
    kl_ba: float
    js: float
    top_1_agreement: float
    top_k_overlap: float
    label_difference: float
    """Mean of B minus A, nats."""
    label_distance: float
    """Mean of |B minus A|, nats."""
    rest_mass_a: float
    rest_mass_b: float
    histogram: tuple[Bin, ...]
    """Of KL(A || B) by row."""
    most_different: tuple[SampleComparison, ...]
    """The samples with the largest mean KL(A || B), the largest first."""


def compare_caches(a: Cache, b: Cache, *, top: int = 10, quiet: bool = True) -> Comparison:
    """Compare all samples that both caches hold, a bounded number of rows at a time.

    Args:
        a: the first cache; rows are read in its order.
        b: the second; fastest where its order is about the same.
        top: how many of the most different samples to name.
        quiet: show no progress.

    Raises:
        MismatchError: the token ids of the two do not mean the same.
        InputError: they have no sample in common.
        CorruptionError: an object is damaged.
    """
    _check_same_ids(a, b)
    pairs = _pair(a, b)
    if not len(pairs.index_a):
        raise InputError(
            f"{a.store.url} and {b.store.url} have no sample in common ({len(a):,} and {len(b):,} committed samples);"
            " caches can be compared where tokens and targets of a sample are the same in both"
        )
    total = _Totals(top)
    with progress("comparing", total=int(pairs.num_rows.sum()), unit="rows", quiet=quiet) as meter:
        for window in pairs.windows(max(1, ENTRIES_AT_ONCE // (a.identity.k + b.identity.k))):
            rows_a = _read_samples(a, window.index_a, window.num_rows)
            rows = compare_rows(rows_a, _read_samples(b, window.index_b, window.num_rows))
            total.add(rows, window)
            meter.advance(len(rows.kl_ab))
    means = total.means()
    return Comparison(
        url_a=a.store.url,
        url_b=b.store.url,
        settings=tuple(a.identity.differences(b.identity)),
        num_samples=len(pairs.index_a),
        num_rows=total.num_rows,
        only_a=pairs.only_a,
        only_b=pairs.only_b,
        kl_ab=means["kl_ab"],
        kl_ba=means["kl_ba"],
        js=means["js"],
        top_1_agreement=means["top_1_agrees"],
        top_k_overlap=means["top_k_overlap"],
        label_difference=means["label_difference"],
        label_distance=means["label_distance"],
        rest_mass_a=means["rest_mass_a"],
        rest_mass_b=means["rest_mass_b"],
        histogram=total.histogram(),
        most_different=total.most_different(a),
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Samples of A and of B that belong together, in the order of A's rows."""

    index_a: Integers
    index_b: Integers
    num_rows: Integers
    only_a: Unmatched
    only_b: Unmatched

    def windows(self, max_rows: int) -> Iterator[_Pairs]:
        """Consecutive parts of about so many rows; at least one sample each."""
        window = (np.cumsum(self.num_rows) - 1) // max_rows
        starts = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(window)]
        for start, stop in itertools.pairwise(starts):
            part = slice(start, stop)
            yield _Pairs(self.index_a[part], self.index_b[part], self.num_rows[part], self.only_a, self.only_b)


class _Totals:
    """Sums over all rows seen so far, and the samples that differ most."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._sums: dict[str, float] = {}
        self._counts = np.zeros(len(KL_EDGES) + 1, dtype=np.int64)
        self._worst: list[tuple[float, int, int, dict[str, float]]] = []
        self.num_rows = 0

    def add(self, rows: RowComparison, window: _Pairs) -> None:
        columns = {f.name: getattr(rows, f.name) for f in fields(rows)}
        columns["label_distance"] = np.abs(rows.label_difference)
        for name, values in columns.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())
        self._counts += np.bincount(np.searchsorted(KL_EDGES, rows.kl_ab, side="right"), minlength=len(self._counts))
        self.num_rows += len(rows.kl_ab)
        starts = np.cumsum(window.num_rows) - window.num_rows
        means = {name: np.add.reduceat(values, starts) / window.num_rows for name, values in columns.items()}
        for i in np.argsort(-means["kl_ab"], kind="stable")[: self._top]:
            about = {"num_rows": int(window.num_rows[i]), **{name: float(values[i]) for name, values in means.items()}}
            self._worst.append((-about["kl_ab"], int(window.index_a[i]), int(window.index_b[i]), about))
        self._worst = heapq.nsmallest(self._top, self._worst, key=lambda found: found[:2])

    def means(self) -> dict[str, float]:
        return {name: value / self.num_rows for name, value in self._sums.items()}

    def histogram(self) -> tuple[Bin, ...]:
        lows, highs = (0.0, *KL_EDGES), (*KL_EDGES, None)
        return tuple(Bin(low, high, int(n)) for low, high, n in zip(lows, highs, self._counts, strict=True))

    def most_different(self, a: Cache) -> tuple[SampleComparison, ...]:
        described = a.describe([index for _, index, _, _ in self._worst])
        return tuple(
            SampleComparison(
                key=sample["key"].hex(),
                source_id=sample["source_id"],
                index_a=index_a,
                index_b=index_b,
                num_rows=int(about["num_rows"]),
                kl_ab=about["kl_ab"],
                kl_ba=about["kl_ba"],
                js=about["js"],
                top_1_agreement=about["top_1_agrees"],
                label_difference=about["label_difference"],
            )
            for sample, (_, index_a, index_b, about) in zip(described, self._worst, strict=True)
        )


def _check_same_ids(a: Cache, b: Cache) -> None:
    for part in ("vocabulary", "special_tokens"):
        ours, theirs = getattr(a.identity.tokenizer, part), getattr(b.identity.tokenizer, part)
        if ours != theirs:
            raise MismatchError(
                f"{a.store.url} and {b.store.url} were made with tokenizers of another {part.replace('_', ' ')}"
                f" ({ours[:12]} and {theirs[:12]}): their token ids do not mean the same and cannot be compared"
            )


def _pair(a: Cache, b: Cache) -> _Pairs:
    """Join by key; of samples with equal keys within one cache the first counts."""
    keys_a, keys_b = (cache.samples.column("key").combine_chunks() for cache in (a, b))
    is_first = pc.index_in(keys_a, value_set=keys_a).to_numpy() == np.arange(len(keys_a))
    found = pc.index_in(keys_a, value_set=keys_b).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    index_a = np.flatnonzero(is_first & (found >= 0))
    index_a = index_a[np.lexsort((a.index.first_row[index_a], a.index.shard[index_a]))]
    num_rows = a.index.num_targets[index_a].astype(np.int64)
    index_b = found[index_a]
    if not np.array_equal(num_rows, b.index.num_targets[index_b]):
        raise CorruptionError(f"{a.store.url} and {b.store.url}: samples of equal keys with unequal numbers of targets")
    missing_b = np.flatnonzero(~pc.is_in(keys_b, value_set=keys_a).to_numpy(zero_copy_only=False))
    return _Pairs(index_a, index_b, num_rows, _unmatched(a, np.flatnonzero(found < 0)), _unmatched(b, missing_b))


def _unmatched(cache: Cache, indices: Integers) -> Unmatched:
    examples = cache.describe(indices[:MAX_EXAMPLES].tolist())
    return Unmatched(len(indices), tuple(sample["source_id"] for sample in examples))


def _read_samples(cache: Cache, samples: Integers, num_rows: Integers) -> TopKLogProbs:
    """The rows of these samples, one sample after the other; neighbours in the cache share one read."""
    places = cache.index[samples]
    shard, first_row = places.shard.astype(np.int64), places.first_row.astype(np.int64)
    order = np.lexsort((first_row, shard))
    stop_row = first_row + num_rows
    is_far = (np.diff(shard[order]) != 0) | (first_row[order][1:] - stop_row[order][:-1] >= CHUNK_ROWS)
    parts = []
    for run in np.split(order, np.flatnonzero(is_far) + 1):
        rows = slice(int(first_row[run].min()), int(stop_row[run].max()))
        topk = read_rows(cache.store, cache.identity, cache.shards[int(shard[run[0]])], rows)
        parts.append(topk[_ranges(first_row[run] - rows.start, num_rows[run])])
    starts = np.empty(len(samples), dtype=np.int64)
    starts[order] = np.cumsum(num_rows[order]) - num_rows[order]
    return TopKLogProbs.concatenate(parts)[_ranges(starts, num_rows)]


def _ranges(starts: Integers, lengths: Integers) -> Integers:
    """[start, start + length) of each pair, one after the other."""
    before = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.asarray(np.repeat(starts, lengths) + np.arange(lengths.sum()) - before)
