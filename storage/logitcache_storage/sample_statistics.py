"""What the teacher thought of every sample, in a few numbers each: to sort by, to filter by, to draw histograms from.

Of a shard that was committed with its statistics (`statistics_object`) one small object is read. Of others, which early
writers made, the rows are, and the result is kept on the local disk.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.cache import Cache
from logitcache_storage.committed import CommittedObjects, shard_prefix
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.row_bins import HISTOGRAMS, NUM_BINS
from logitcache_storage.schema import ShardRecord
from logitcache_storage.statistics_object import (
    COLUMNS,
    ShardStatistics,
    dump_statistics,
    parse_statistics,
    shard_statistics,
)
from logitcache_storage.stats import total

Mask = npt.NDArray[np.bool_]
"""Which samples of a cache, [n]."""

SORTABLE = (
    "index",
    "num_tokens",
    "num_targets",
    "mean_label_log_prob",
    "min_label_log_prob",
    "mean_entropy",
    "max_entropy",
    "mean_kept_mass",
    "top_1_rate",
    "top_k_rate",
    "doubt",
)
"""What `SampleTable.column`, `order` and `between` know.

index                          of the sample in the cache
num_tokens, num_targets        L and M
mean_label_log_prob            nats
min_label_log_prob             of its most surprising label, nats; `surprising_row` says where
mean_entropy, max_entropy      nats
mean_kept_mass                 in (0, 1]
top_1_rate, top_k_rate         share of its labels that are the teacher's first choice, or among the kept ids
doubt                          largest probability of the teacher's first choice where the label is not among the kept
                               ids, 0 where every label is; `doubtful_row` says where
"""

SHARDS_AT_ONCE = 64
"""Whose statistics are fetched together."""
ORDERS_KEPT = 4
FEW = 8
"""Up to one sample in so many is sorted by itself, more are picked from the order of all."""
LOCAL_BYTES = 1 << 30
"""Bound of what is kept on the local disk."""

log = logging.getLogger(__name__)


class SampleTable:
    """Statistics of all committed samples of a cache, as of when they were loaded; 56 bytes a sample.

    Every array has one entry for each sample of the cache, [n], in its order. Several threads may use it.
    """

    def __init__(self, cache: Cache) -> None:
        """A table in which no sample is known yet; `load_statistics` makes one that is filled."""
        self._index = cache.index
        self._columns = {name: np.zeros(len(cache), dtype) for name, dtype in COLUMNS.items() if name != "num_rows"}
        self._counts = np.zeros((len(HISTOGRAMS), NUM_BINS), np.int64)
        self._orders: dict[tuple[str, bool], npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()
        self.known: Mask = np.zeros(len(cache), dtype=bool)
        """Which samples have statistics. Those of the shards in `problems` have none: their columns are 0, no filter
        lets them through, and no order lists them."""
        self.problems: dict[int, str] = {}
        """Shards that could not be read, and why; empty where all is well."""

    def __len__(self) -> int:
        """Number of samples, as `len(cache)`."""
        return len(self.known)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of `SORTABLE`, [n]; integers or float32.

        Raises:
            InputError: no such column.
        """
        if name not in SORTABLE:
            raise InputError(f"unknown column {name!r}; choose from {', '.join(SORTABLE)}")
        if name == "index":
            return np.arange(len(self))
        if name in ("num_tokens", "num_targets"):
            return np.asarray(getattr(self._index, name))
        if name in ("top_1_rate", "top_k_rate"):
            counts = self._columns[f"num_{name.removesuffix('_rate')}"]
            return np.asarray(counts / self._index.num_targets, dtype=np.float32)
        return self._columns[name]

    def surprising_row(self, index: int) -> int:
        """The target position of a sample (row of its `topk`) whose label has the least log-prob."""
        return int(self._columns["surprising_row"][index])

    def doubtful_row(self, index: int) -> int | None:
        """The target position of a sample where it has its `doubt`; None where it has none."""
        has_doubt = self._columns["doubt"][index] > 0
        return int(self._columns["doubtful_row"][index]) if has_doubt else None

    def facts(self, index: int) -> dict[str, Any]:
        """Every column of one sample, with `surprising_row` and `doubtful_row`; None where the sample is not known."""
        is_known = bool(self.known[index])
        always = {"index": index, "num_tokens": int(self._index.num_tokens[index])}
        always["num_targets"] = int(self._index.num_targets[index])
        found = {name: self._columns[name][index].item() for name in SORTABLE if name in self._columns}
        for name in ("top_1", "top_k"):
            found[f"{name}_rate"] = int(self._columns[f"num_{name}"][index]) / always["num_targets"]
        found |= {"surprising_row": self.surprising_row(index), "doubtful_row": self.doubtful_row(index)}
        return {**always, **(found if is_known else dict.fromkeys(found))}

    def order(self, by: str, *, descending: bool = False, among: Mask | None = None) -> npt.NDArray[np.int64]:
        """Indices of the known samples, of those of a mask, in order of a column; of equal ones in order of index."""
        if among is not None and np.count_nonzero(among) * FEW < len(self):
            few = np.flatnonzero(among & self.known)
            return few[_sorted(self.column(by)[few], descending)]
        with self._lock:
            found = self._orders.pop((by, descending), None)
            if found is None:
                found = _sorted(self.column(by), descending)
                found = found if self.known.all() else found[self.known[found]]
            self._orders[by, descending] = found
            while len(self._orders) > ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
        return found if among is None else found[among[found]]

    def in_bin(self, histogram: str, number: int) -> Mask:
        """Samples that have a row in a bin of a histogram (`row_bins.HISTOGRAMS`, `row_bins.Bin.number`).

        Raises:
            InputError: no such histogram or bin.
        """
        if histogram not in HISTOGRAMS or not 0 <= number < NUM_BINS:
            names = ", ".join(HISTOGRAMS)
            raise InputError(f"no bin {number} of {histogram!r}; histograms are {names}, bins 0 to {NUM_BINS - 1}")
        return np.asarray(self._columns[f"{histogram}_bins"] >> np.uint32(number) & np.uint32(1), dtype=bool)

    def between(self, name: str, low: float | None = None, high: float | None = None) -> Mask:
        """Known samples whose column is in [low, high]: `between("doubt", 0.9)`, `between("num_tokens", 100, 200)`."""
        column, found = self.column(name), self.known.copy()
        if low is not None:
            found &= column >= low
        if high is not None:
            found &= column <= high
        return found

    def counts(self, histogram: str) -> npt.NDArray[np.int64]:
        """Rows of the cache in each bin, [NUM_BINS]; rows that equal samples share count once."""
        counts: npt.NDArray[np.int64] = self._counts[list(HISTOGRAMS).index(histogram)]
        return counts

    def _add(self, shard: int, samples: npt.NDArray[np.integer], found: ShardStatistics) -> None:
        """Take in the statistics of a shard; `samples` are all those of the cache that stand in it.

        Raises:
            CorruptionError: they are those of other samples.
        """
        rows = found.columns["num_rows"].astype(np.int64)
        starts = np.cumsum(rows) - rows
        first_row = self._index.first_row[samples].astype(np.int64)
        at = np.minimum(np.searchsorted(starts, first_row), max(len(starts) - 1, 0))
        if len(samples) and not (
            len(starts)
            and np.array_equal(starts[at], first_row)
            and (rows[at] == self._index.num_targets[samples]).all()
        ):
            raise CorruptionError(f"shard {shard}: its statistics are of other samples than stand in it")
        for name, column in self._columns.items():
            column[samples] = found.columns[name][at]
        self._counts += found.counts
        self.known[samples] = True


def load_statistics(cache: Cache, *, progress: Callable[[int, int], None] | None = None) -> SampleTable:
    """The statistics of all samples; a shard that is damaged is a line in `SampleTable.problems` and no error.

    Args:
        cache: whose samples.
        progress: called now and then with the rows whose statistics are there, and all committed rows.

    Raises:
        StoreError: the store refused or could not be reached.
    """
    table, samples = SampleTable(cache), _samples_by_shard(cache)
    kept = _LocalStatistics(cache)
    done, num_rows = 0, total(cache.shards).num_rows
    for records in _batches(cache):
        stored = _stored(cache, records)
        for record in records:
            ours = samples(record.shard)
            try:
                found = stored.get(record.shard) or kept.statistics(record, ours)
                table._add(record.shard, ours, found)
            except CorruptionError as e:
                table.problems[record.shard] = str(e)
            done += record.num_rows
            if progress is not None:
                progress(done, num_rows)
    return table


def read_statistics(cache: Cache, record: ShardRecord) -> ShardStatistics | None:
    """What stands on the store; None where the shard was committed without.

    Raises:
        CorruptionError: it is damaged.
    """
    item = record.statistics_object
    if item is None:
        return None
    data = CommittedObjects(cache.store, [item]).get(item.path)
    return parse_statistics(data, record.num_rows, where=f"{cache.store.url}/{item.path}")


def compute_statistics(cache: Cache, record: ShardRecord, samples: npt.NDArray[np.integer]) -> ShardStatistics:
    """The statistics of a shard from its rows; `samples` are all those of the cache that stand in it.

    Raises:
        CorruptionError: the shard is damaged, or its samples do not cover it.
    """
    _, at = np.unique(cache.index.first_row[samples], return_index=True)
    owners = samples[at]  # samples of equal tokens share rows
    tokens = cache.read_tokens(owners.tolist())
    labels = np.concatenate([np.zeros(0, np.int32), *(ids[positions] for ids, positions in tokens)])
    topk = cache.read_shard(record.shard)
    if len(labels) != len(topk):
        raise CorruptionError(f"shard {record.shard}: samples with {len(labels)} target tokens for {len(topk)} rows")
    return shard_statistics(topk, labels, cache.index.num_targets[owners])


def _sorted(column: npt.NDArray[Any], descending: bool) -> npt.NDArray[np.int64]:
    if descending:
        column = -column if column.dtype.kind == "f" else column.max(initial=0) - column
    return np.argsort(column, kind="stable")


def _samples_by_shard(cache: Cache) -> Callable[[int], npt.NDArray[np.int64]]:
    """Which samples of the cache stand in a shard."""
    shard = cache.index.shard
    order = np.argsort(shard, kind="stable")
    edges = np.searchsorted(shard[order], np.arange(len(cache.plan.shard_num_rows) + 1))
    return lambda number: order[edges[number] : edges[number + 1]]


def _batches(cache: Cache) -> Iterator[list[ShardRecord]]:
    numbers = sorted(cache.shards)
    for start in range(0, len(numbers), SHARDS_AT_ONCE):
        yield [cache.shards[number] for number in numbers[start : start + SHARDS_AT_ONCE]]


def _stored(cache: Cache, records: list[ShardRecord]) -> Mapping[int, ShardStatistics]:
    """The statistics that stand on the store, fetched side by side; without those that are damaged."""
    objects = [item for record in records if (item := record.statistics_object) is not None]
    held = CommittedObjects(cache.store, objects)
    try:
        held.fetch_all()
    except CorruptionError:
        held = CommittedObjects(cache.store, objects)  # one by one, then
    found = {}
    for record in records:
        item = record.statistics_object
        if item is None:
            continue
        where = f"{cache.store.url}/{item.path}"
        try:
            found[record.shard] = parse_statistics(held.get(item.path), record.num_rows, where=where)
        except CorruptionError as e:
            log.warning("%s; its rows are read instead, and 'logitcache verify --repair' writes it again", e)
    return found


class _LocalStatistics:
    """Statistics that were computed from rows, kept on the local disk."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._disk: DiskCache | None = None
        self._is_open = False

    def statistics(self, record: ShardRecord, samples: npt.NDArray[np.integer]) -> ShardStatistics:
        """Of one shard.

        Raises:
            CorruptionError: the shard is damaged.
        """
        disk = self._opened()
        if disk is None:
            return compute_statistics(self._cache, record, samples)
        source = f"{self._cache.store.url}/{shard_prefix(record.shard, record.attempt)}"
        data = disk.get(
            f"{record.shard:05d}-{record.attempt}.statistics",
            lambda: [dump_statistics(compute_statistics(self._cache, record, samples))],
            source=source,
        )
        return parse_statistics(bytes(data), record.num_rows, where=source)

    def _opened(self) -> DiskCache | None:
        if not self._is_open:
            self._is_open = True
            try:
                self._disk = DiskCache(_local_folder(), LOCAL_BYTES)
            except InputError as e:
                log.warning("statistics are not kept: %s", e)
        return self._disk


def _local_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "logitcache" / "statistics"
