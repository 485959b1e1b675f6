"""What a cache is and holds, at a glance, as plain values: the first page of every view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from logitcache_storage.cache import Cache
from logitcache_storage.row_bins import HISTOGRAMS, Bin
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.schema import CacheIdentity
from logitcache_storage.stats import Totals, total


@dataclass(frozen=True)
class Histogram:
    """How many rows (target tokens) have which value."""

    name: str
    """`entropy`, `kept_mass`, `label_rank` or `label_log_prob`; with a bin's number it leads to samples
    (`SampleTable.in_bin`)."""
    title: str
    """For people, e.g. "label log-prob"."""
    unit: str
    """"nats", or "" where there is none."""
    bins: tuple[Bin, ...]
    """One for each bar, in ascending order of values; only those that rows of this cache can fall in."""
    counts: tuple[int, ...]
    """Rows in each bar."""

    @property
    def num_rows(self) -> int:
        """In all bars."""
        return sum(self.counts)


@dataclass(frozen=True)
class Overview:
    """A cache at a glance."""

    url: str
    identity: CacheIdentity
    is_complete: bool
    """Whether every planned shard is committed."""
    num_shards: int
    num_samples: int
    num_tokens: int
    """Of the committed samples, prompts and all."""
    planned_shards: int
    planned_samples: int
    planned_rows: int
    totals: Totals
    """Rows, bytes and means over all committed rows, from the commit records alone."""
    histograms: tuple[Histogram, ...]
    """Of entropy, kept mass, label rank and label log-prob, of the last alone where k = 0; none without a table."""


def overview(cache: Cache, table: SampleTable | None = None) -> Overview:
    """Look at a cache as a whole; reads nothing but what is in memory.

    Args:
        cache: what to look at.
        table: of `load_statistics`, for the histograms.
    """
    return Overview(
        url=cache.store.url,
        identity=cache.identity,
        is_complete=cache.is_complete,
        num_shards=len(cache.shards),
        num_samples=len(cache),
        num_tokens=int(cache.index.num_tokens.sum(dtype=np.int64)),
        planned_shards=len(cache.plan.shard_num_rows),
        planned_samples=cache.plan.num_samples,
        planned_rows=cache.plan.num_rows,
        totals=total(cache.shards),
        histograms=() if table is None else histograms(table, cache.identity.k),
    )


def histograms(table: SampleTable, k: int) -> tuple[Histogram, ...]:
    """Over the rows of all known samples; k is the cache's. Without ids (k = 0) nothing is known but the label."""
    return tuple(_histogram(name, table, k) for name in HISTOGRAMS if k or name == "label_log_prob")


def _histogram(name: str, table: SampleTable, k: int) -> Histogram:
    binning, counts = HISTOGRAMS[name], table.counts(name)
    bins = binning.bins_for(k)
    return Histogram(name, binning.title, binning.unit, bins, tuple(int(counts[found.number]) for found in bins))
