"""What a cache holds, in numbers: sums from the commit records, distributions from the rows.

Sums cost one read for the whole cache. Quantiles need the rows themselves, of some or all shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError
from logitcache_storage.manifest import Manifest
from logitcache_storage.progress import progress
from logitcache_storage.schema import ShardRecord
from logitcache_storage.shard_labels import ShardLabels
from logitcache_storage.statistics import SUMS, row_statistics

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DEFAULT_SAMPLED_ROWS = 1_000_000
"""Shards are read until about so many rows, where nobody says how many shards."""
MAX_ROWS_IN_MEMORY = 4_000_000
"""Of more rows than this, every n-th goes into the quantiles."""


@dataclass(frozen=True)
class Totals:
    """Means over the rows of some shards; all None where there is no row, and those of the ids where k is 0."""

    num_shards: int
    num_rows: int
    num_bytes: int
    seconds: float
    """Spent on scoring, summed over workers."""
    bytes_per_row: float | None
    entropy: float | None
    """Mean entropy, nats; the tail counts as one outcome."""
    kept_mass: float | None
    num_kept: float | None
    label_log_prob: float | None
    """Mean log-prob of the observed token, nats."""
    perplexity: float | None
    """exp(-label_log_prob)."""
    top_1_rate: float | None
    """How often the label is the teacher's first choice."""
    top_k_rate: float | None
    """How often the label is among the kept ids."""


@dataclass(frozen=True)
class Distributions:
    """Quantiles over the rows of the shards that were read, and how often the label has which rank."""

    shards: tuple[int, ...]
    num_rows: int
    quantiles: dict[str, dict[str, float]]
    """Of label_log_prob, and unless k is 0 of entropy and kept_mass: "p50" -> value."""
    label_rank: dict[str, int]
    """Number of rows by rank: "1", "2", "3-4", "5-8", ..., and ">k" for labels outside the kept ids; empty at k = 0."""


def total(records: Iterable[ShardRecord] | Mapping[int, ShardRecord]) -> Totals:
    """Sums and means from commit records, without reading a row; of a manifest at once, whatever its size.

    Raises:
        CorruptionError: a record lacks a statistic.
    """
    sums = _sums_of_manifest(records) if isinstance(records, Manifest) else _sums(records)
    rows, num_bytes = int(sums.num_rows), int(sums.num_bytes)

    def mean(name: str) -> float | None:
        return sums.statistics[name] / rows if rows else None

    label_log_prob, num_kept = mean("label_log_prob_sum"), mean("num_kept_sum")
    mean_of_ids = mean if num_kept else lambda name: None
    return Totals(
        num_shards=sums.num_shards,
        num_rows=rows,
        num_bytes=num_bytes,
        seconds=sums.seconds,
        bytes_per_row=num_bytes / rows if rows else None,
        entropy=mean_of_ids("entropy_sum"),
        kept_mass=mean_of_ids("kept_mass_sum"),
        num_kept=num_kept,
        label_log_prob=label_log_prob,
        perplexity=None if label_log_prob is None else float(np.exp(np.float64(-label_log_prob))),
        top_1_rate=mean_of_ids("label_is_top_1"),
        top_k_rate=mean_of_ids("label_in_top_k"),
    )


def distributions(cache: Cache, shards: Sequence[int], *, quiet: bool = True) -> Distributions:
    """Quantiles and label ranks over all rows of these shards.

    Raises:
        CorruptionError: a shard is damaged.
    """
    num_rows = sum(cache.shards[shard].num_rows for shard in shards)
    stride = max(1, -(-num_rows // MAX_ROWS_IN_MEMORY))
    labels = ShardLabels(cache.index, cache.keys, cache.read_tokens)
    names = ("entropy", "kept_mass", "label_log_prob") if cache.identity.k else ("label_log_prob",)
    columns: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
    rank_counts = np.zeros(cache.identity.k + 1, dtype=np.int64)
    with progress("reading rows", total=num_rows, unit="rows", quiet=quiet) as p:
        for shard in shards:
            rows = cache.shards[shard].num_rows
            found = row_statistics(cache.read_shard(shard), labels.of(shard, rows))
            rank_counts += np.bincount(found.label_rank, minlength=len(rank_counts))
            for name, parts in columns.items():
                parts.append(getattr(found, name)[::stride].astype(np.float32))
            p.advance(rows)
    quantiles = {name: _quantiles(np.concatenate(parts)) for name, parts in columns.items() if num_rows}
    return Distributions(tuple(shards), num_rows, quantiles, _rank_histogram(rank_counts))


def choose_shards(records: Mapping[int, ShardRecord], num_shards: int | None = None) -> list[int]:
    """Shards to read, evenly spaced: so many, or as many as have `DEFAULT_SAMPLED_ROWS` rows."""
    numbers = sorted(records)
    rows = sum(record.num_rows for record in records.values())
    if num_shards is None:
        num_shards = len(numbers) if not rows else max(1, round(len(numbers) * DEFAULT_SAMPLED_ROWS / rows))
    wanted = min(num_shards, len(numbers))
    return [numbers[i * len(numbers) // wanted] for i in range(wanted)]


def _quantiles(values: npt.NDArray[np.float32]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES)
    return {f"p{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def _rank_histogram(counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """Ranks 1 .. k in bins that double; `counts[0]` are the labels outside."""
    k, histogram, first = len(counts) - 1, {}, 1
    if not k:
        return {}
    while first <= k:
        last = min(k, max(first, 2 * first - 2))
        histogram[f"{first}" if first == last else f"{first}-{last}"] = int(counts[first : last + 1].sum())
        first = last + 1
    histogram[f">{k}"] = int(counts[0])
    return histogram


@dataclass(frozen=True)
class _Sums:
    """Over some commit records."""

    num_shards: int
    num_rows: float
    num_bytes: float
    seconds: float
    statistics: Mapping[str, float]


def _sums_of_manifest(records: Manifest) -> _Sums:
    num_rows, num_bytes, seconds = (records.column(name).sum().item() for name in ("num_rows", "num_bytes", "seconds"))
    sums = records.sums()
    if missing := [name for name in SUMS if len(records) and name not in sums]:
        raise CorruptionError(f"the manifest lacks the statistic {missing[0]!r} of some shard; see 'logitcache verify'")
    return _Sums(len(records), num_rows, num_bytes, seconds, sums)


def _sums(records: Iterable[ShardRecord] | Mapping[int, ShardRecord]) -> _Sums:
    listed = list(records.values()) if isinstance(records, Mapping) else list(records)
    return _Sums(
        num_shards=len(listed),
        num_rows=sum(r.num_rows for r in listed),
        num_bytes=sum(r.num_bytes for r in listed),
        seconds=sum(r.seconds for r in listed),
        statistics={name: sum(_statistic(r, name) for r in listed) for name in SUMS},
    )


def _statistic(record: ShardRecord, name: str) -> float:
    value = record.statistics.get(name)
    if not isinstance(value, int | float):
        raise CorruptionError(f"commit record of shard {record.shard}: no statistic {name!r}, found {value!r}")
    return float(value)
