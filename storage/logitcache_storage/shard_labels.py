"""The observed token of every row of a shard, from the samples table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.errors import CorruptionError

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""(input_ids [L], target_positions [M]) of one sample."""


class ShardLabels:
    """Labels of whole shards. Samples of equal key share rows, so a row may belong to many samples."""

    def __init__(self, samples: pa.Table, read_tokens: Callable[[Sequence[int]], list[Tokens]]) -> None:
        """`samples` has key, shard, first_row and num_targets; `read_tokens` takes its row numbers."""
        self._read_tokens = read_tokens
        self._keys = samples.column("key")
        self._first_row = samples.column("first_row").to_numpy()
        self._num_targets = samples.column("num_targets").to_numpy()
        shard = samples.column("shard").to_numpy()
        self._order = np.lexsort((self._first_row, shard))
        self._shard = shard[self._order]

    def of(self, shard: int, num_rows: int) -> npt.NDArray[np.int32]:
        """Labels of a shard's rows, [num_rows].

        Raises:
            CorruptionError: the samples of the shard do not cover its rows exactly once, or share rows
                without being equal.
        """
        start, stop = np.searchsorted(self._shard, [shard, shard + 1])
        samples = self._order[start:stop]
        first_rows, firsts, which = np.unique(self._first_row[samples], return_index=True, return_inverse=True)
        owners = samples[firsts]
        if len(owners) < len(samples):
            self._check_equal(shard, samples, owners[which])
        ends = np.cumsum(self._num_targets[owners])
        if not np.array_equal(first_rows, ends - self._num_targets[owners]) or (ends[-1:] != num_rows).any():
            raise CorruptionError(f"shard {shard}: the samples table does not cover its {num_rows} rows exactly once")
        if not len(owners) and num_rows:
            raise CorruptionError(f"shard {shard}: has {num_rows} rows, and no sample stands in it")
        labels = [ids[positions] for ids, positions in self._read_tokens(owners.tolist())]
        found = np.concatenate([np.zeros(0, np.int32), *labels])
        if len(found) != num_rows:
            raise CorruptionError(f"shard {shard}: samples with {len(found)} target tokens for {num_rows} rows")
        return found

    def _check_equal(self, shard: int, samples: npt.NDArray[np.int64], owners: npt.NDArray[np.int64]) -> None:
        differ = samples != owners
        ours, theirs = samples[differ], owners[differ]
        if not self._keys.take(ours).equals(self._keys.take(theirs)):
            raise CorruptionError(f"shard {shard}: samples of different keys stand at the same row")
