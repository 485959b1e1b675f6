"""How far apart two caches of one corpus are, token by token and sample by sample.

Samples are joined by key, so the caches may differ in order, shards, container, precision and k. `divergence.py` says
what is measured at a token and in which sense it is a bound. Rows are read a bounded number at a time. Where one of the
caches keeps no ids (k = 0), the label's log-prob is all that can be compared.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
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
    """Means over the target tokens of one sample; what is None in a `Comparison` is None here."""

    key: str
    source_id: str
    """In A."""
    index_a: int
    index_b: int
    num_rows: int
    kl_ab: float | None
    kl_ba: float | None
    js: float | None
    top_1_agreement: float | None
    label_difference: float
    label_distance: float


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
    """Means over the target tokens of all samples that both caches hold, each counted once.

    What is said of distributions is None where a cache keeps no ids.
    """

    url_a: str
    url_b: str
    settings: tuple[str, ...]
    """Fields of the two identities that differ, as "field: in A, in B"."""
    num_samples: int
    num_rows: int
    only_a: Unmatched
    only_b: Unmatched
    kl_ab: float | None
    kl_ba: float | None
    js: float | None
    top_1_agreement: float | None
    top_k_overlap: float | None
    label_difference: float
    """Mean of B minus A, nats."""
    label_distance: float
    """Mean of |B minus A|, nats."""
    rest_mass_a: float
    rest_mass_b: float
    histogram: tuple[Bin, ...]
    """Of KL(A || B) by row; empty where it is None."""
    most_different: tuple[SampleComparison, ...]
    """The samples with the largest mean KL(A || B), or else |B minus A| of the label, the largest first."""


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
    comparing = Comparing(a, b, top=top)
    with progress("comparing", total=comparing.num_rows, unit="rows", quiet=quiet) as meter:
        while num_rows := comparing.advance():
            meter.advance(num_rows)
    return comparing.result()


class Comparing:
    """A comparison that goes on step by step, and tells at any time what it has found so far."""

    def __init__(
        self, a: Cache, b: Cache, *, top: int = 10, rows_at_once: int | None = None, spread: bool = False
    ) -> None:
        """Find out which samples belong together; arguments and errors as in `compare_caches`.

        Args:
            a: the first cache.
            b: the second.
            top: how many of the most different samples to name.
            rows_at_once: of each step; None: as many as memory allows.
            spread: begin all over the cache and not at its beginning, so that a part of it stands for the whole.
        """
        check_same_ids(a, b)
        pairs = _pair(a, b)
        if not len(pairs.index_a):
            raise InputError(
                f"{a.store.url} and {b.store.url} have no sample in common ({len(a):,} and {len(b):,} committed"
                " samples); caches can be compared where tokens and targets of a sample are the same in both"
            )
        self._a, self._b, self._pairs = a, b, pairs
        self._has_ids = min(a.identity.k, b.identity.k) > 0
        self._total = _Totals(top, "kl_ab" if self._has_ids else "label_distance")
        most = max(1, ENTRIES_AT_ONCE // max(1, a.identity.k + b.identity.k))
        self._edges = pairs.edges(min(most, rows_at_once or most))
        if spread:  # within a shard each, so that a damaged one takes no other with it
            self._edges = np.union1d(self._edges, 1 + np.flatnonzero(np.diff(a.index.shard[pairs.index_a])))
        self._order = np.arange(len(self._edges) - 1)
        if spread:  # those whose multiple of the golden ratio is near a whole number lie evenly among all
            self._order = np.argsort(self._order * ((5**0.5 - 1) / 2) % 1)
        self._next = 0
        self.num_samples = len(pairs.index_a)
        """That both caches hold."""
        self.num_rows = int(pairs.num_rows.sum())
        """Their target tokens."""

    @property
    def num_compared(self) -> int:
        """Target tokens so far."""
        return self._total.num_rows

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to compare."""
        return self._next == len(self._order)

    def advance(self) -> int:
        """Compare the next samples; how many rows that were, 0 at the end.

        Raises:
            CorruptionError: one of them is damaged; the next call goes on behind them.
        """
        if self.is_done:
            return 0
        step = self._order[self._next]
        self._next += 1
        window = self._pairs.part(*self._edges[step : step + 2].tolist())
        rows_a = _read_samples(self._a, window.index_a, window.num_rows)
        rows = compare_rows(rows_a, _read_samples(self._b, window.index_b, window.num_rows))
        self._total.add(rows, window)
        return len(rows.kl_ab)

    def result(self) -> Comparison:
        """Of what has been compared so far, at least one step."""
        a, b, total = self._a, self._b, self._total
        means = total.means()
        of_distributions = means if self._has_ids else {}
        return Comparison(
            url_a=a.store.url,
            url_b=b.store.url,
            settings=tuple(a.identity.differences(b.identity)),
            num_samples=total.num_samples,
            num_rows=total.num_rows,
            only_a=self._pairs.only_a,
            only_b=self._pairs.only_b,
            kl_ab=of_distributions.get("kl_ab"),
            kl_ba=of_distributions.get("kl_ba"),
            js=of_distributions.get("js"),
            top_1_agreement=of_distributions.get("top_1_agrees"),
            top_k_overlap=of_distributions.get("top_k_overlap"),
            label_difference=means["label_difference"],
            label_distance=means["label_distance"],
            rest_mass_a=means["rest_mass_a"],
            rest_mass_b=means["rest_mass_b"],
            histogram=total.histogram() if self._has_ids else (),
            most_different=total.most_different(a, has_ids=self._has_ids),
        )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Samples of A and of B that belong together, in the order of A's rows."""

    index_a: Integers
    index_b: Integers
    num_rows: Integers
    only_a: Unmatched
    only_b: Unmatched

    def edges(self, max_rows: int) -> Integers:
        """Where to cut them into consecutive parts of about so many rows; at least one sample each."""
        window = (np.cumsum(self.num_rows) - 1) // max_rows
        return np.concatenate([[0], np.flatnonzero(np.diff(window)) + 1, [len(window)]])

    def part(self, start: int, stop: int) -> _Pairs:
        """Some of them."""
        part = slice(start, stop)
        return _Pairs(self.index_a[part], self.index_b[part], self.num_rows[part], self.only_a, self.only_b)


class _Totals:
    """Sums over all rows seen so far, and the samples that differ most."""

    def __init__(self, top: int, by: str) -> None:
        self._top, self._by = top, by
        self._sums: dict[str, float] = {}
        self._counts = np.zeros(len(KL_EDGES) + 1, dtype=np.int64)
        self._worst: list[tuple[float, int, int, dict[str, float]]] = []
        self.num_rows = self.num_samples = 0

    def add(self, rows: RowComparison, window: _Pairs) -> None:
        columns = {f.name: getattr(rows, f.name) for f in fields(rows)}
        columns["label_distance"] = np.abs(rows.label_difference)
        for name, values in columns.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())
        self._counts += np.bincount(np.searchsorted(KL_EDGES, rows.kl_ab, side="right"), minlength=len(self._counts))
        self.num_rows += len(rows.kl_ab)
        self.num_samples += len(window.index_a)
        starts = np.cumsum(window.num_rows) - window.num_rows
        means = {name: np.add.reduceat(values, starts) / window.num_rows for name, values in columns.items()}
        for i in np.argsort(-means[self._by], kind="stable")[: self._top]:
            about = {"num_rows": int(window.num_rows[i]), **{name: float(values[i]) for name, values in means.items()}}
            self._worst.append((-about[self._by], int(window.index_a[i]), int(window.index_b[i]), about))
        self._worst = heapq.nsmallest(self._top, self._worst, key=lambda found: found[:2])

    def means(self) -> dict[str, float]:
        return {name: value / self.num_rows for name, value in self._sums.items()}

    def histogram(self) -> tuple[Bin, ...]:
        lows, highs = (0.0, *KL_EDGES), (*KL_EDGES, None)
        return tuple(Bin(low, high, int(n)) for low, high, n in zip(lows, highs, self._counts, strict=True))

    def most_different(self, a: Cache, *, has_ids: bool) -> tuple[SampleComparison, ...]:
        described = a.describe([index for _, index, _, _ in self._worst])
        return tuple(
            SampleComparison(
                key=sample["key"].hex(),
                source_id=sample["source_id"],
                index_a=index_a,
                index_b=index_b,
                num_rows=int(about["num_rows"]),
                kl_ab=about["kl_ab"] if has_ids else None,
                kl_ba=about["kl_ba"] if has_ids else None,
                js=about["js"] if has_ids else None,
                top_1_agreement=about["top_1_agrees"] if has_ids else None,
                label_difference=about["label_difference"],
                label_distance=about["label_distance"],
            )
            for sample, (_, index_a, index_b, about) in zip(described, self._worst, strict=True)
        )


def check_same_ids(a: Cache, b: Cache) -> None:
    """Ids of two caches mean the same; MismatchError where they do not."""
    for part in ("vocabulary", "special_tokens"):
        ours, theirs = getattr(a.identity.tokenizer, part), getattr(b.identity.tokenizer, part)
        if ours != theirs:
            raise MismatchError(
                f"{a.store.url} and {b.store.url} were made with tokenizers of another {part.replace('_', ' ')}"
                f" ({ours[:12]} and {theirs[:12]}): their token ids do not mean the same and cannot be compared"
            )


def _pair(a: Cache, b: Cache) -> _Pairs:
    """Join by key; of samples with equal keys within one cache the first counts."""
    keys_a, keys_b = _keys(a), _keys(b)
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


def _keys(cache: Cache) -> pa.FixedSizeBinaryArray:
    keys = np.ascontiguousarray(cache.keys())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.view(np.uint8))])


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
