"""Rows of samples, read shard by shard: what is decoded stays in memory for one shuffle window."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from logitcache_storage.cache import Cache
from logitcache_storage.errors import MismatchError
from logitcache_storage.topk import TopKLogProbs


class RowReader:
    """Rows of the primary cache's samples in one cache; the least recently used shards are forgotten."""

    def __init__(self, cache: Cache, primary: Cache, role: str, window_shards: int) -> None:
        self._cache, self._max_rows = cache, _rows_of_window(cache, window_shards)
        self._shards: OrderedDict[int, TopKLogProbs] = OrderedDict()
        found = None if cache is primary else _join(cache, primary, role)
        columns = (cache.samples.column(name).to_numpy() for name in ("shard", "first_row", "num_targets"))
        self._shard, self._first_row, self._num_targets = (c if found is None else c[found] for c in columns)

    def rows(self, index: int) -> TopKLogProbs:
        """The rows of a sample of the primary cache."""
        first = int(self._first_row[index])
        return self._decoded(int(self._shard[index]))[first : first + int(self._num_targets[index])]

    def reading_order(self, index: int) -> tuple[bool, int]:
        """Sorts samples by shard, those of decoded shards first."""
        shard = int(self._shard[index])
        return shard not in self._shards, shard

    def _decoded(self, shard: int) -> TopKLogProbs:
        if shard in self._shards:
            self._shards.move_to_end(shard)
        else:
            self._shards[shard] = self._cache.read_shard(shard)
            while sum(map(len, self._shards.values())) > self._max_rows and len(self._shards) > 1:
                self._shards.popitem(last=False)
        return self._shards[shard]


def _rows_of_window(cache: Cache, window_shards: int) -> int:
    """Target rows of the largest `window_shards + 1` shards: a window, and where the next one begins."""
    sizes = sorted((record.num_rows for record in cache.shards.values()), reverse=True)
    return sum(sizes[: window_shards + 1])


def _join(cache: Cache, primary: Cache, role: str) -> npt.NDArray[np.int64]:
    """Where each sample of `primary` stands in `cache`, [S]."""
    ours, theirs = (c.samples.column("key") for c in (primary, cache))
    found = pc.index_in(ours, value_set=theirs)
    if found.null_count:
        missing = ours.filter(found.is_null())
        raise MismatchError(
            f"the {role} cache {cache.store.url} lacks {found.null_count} of the {len(ours)} samples of"
            f" {primary.store.url}, the first with key {missing[0].as_py().hex()};"
            " build both caches from the same corpus with the same tokenizer, to their end"
        )
    return np.asarray(found.to_numpy(), dtype=np.int64)
