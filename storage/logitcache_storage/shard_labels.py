"""Whose rows a shard holds, and the observed token of every one of them, from the samples table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.errors import CorruptionError

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""(input_ids [L], target_positions [M]) of one sample."""


def row_owners(
    shard: npt.NDArray[np.integer], first_row: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The sample that stands first in the plan at each place, in order of shard and row; and that of every sample.

    A sample that is not its own owner shares the rows of an equal one.

    Args:
        shard: of every sample, [n].
        first_row: its first row within the shard, [n].

    Returns:
        Owners [R], and the owner of each sample [n].
    """
    place = shard.astype(np.int64) << 32 | first_row.astype(np.int64)
    _, owners, which = np.unique(place, return_index=True, return_inverse=True)
    return owners, owners[which]


class ShardLabels:
    """Labels of whole shards. Samples of equal key share rows, so a row may belong to many samples."""

    def __init__(self, samples: pa.Table, read_tokens: Callable[[Sequence[int]], list[Tokens]]) -> None:
        """`samples` has key, shard, first_row and num_targets; `read_tokens` takes its row numbers."""
        self._read_tokens = read_tokens
        self._keys = samples.column("key")
        self._shard = samples.column("shard").to_numpy()
        self._first_row = samples.column("first_row").to_numpy()
        self._num_targets = samples.column("num_targets").to_numpy()
        self._owners, self._owner_of = row_owners(self._shard, self._first_row)
        self._owner_shard = self._shard[self._owners]
        self._sharing = np.flatnonzero(self._owner_of != np.arange(len(self._owner_of)))

    def of(self, shard: int, num_rows: int) -> npt.NDArray[np.int32]:
        """Labels of a shard's rows, [num_rows].

        Raises:
            CorruptionError: the samples of the shard do not cover its rows exactly once, or share rows
                without being equal.
        """
        self._check_sharing(shard)
        start, stop = np.searchsorted(self._owner_shard, [shard, shard + 1])
        owners = self._owners[start:stop]
        ends = np.cumsum(self._num_targets[owners])
        is_gapless = np.array_equal(self._first_row[owners], ends - self._num_targets[owners])
        if not is_gapless or (ends[-1:] != num_rows).any():
            raise CorruptionError(f"shard {shard}: the samples table does not cover its {num_rows} rows exactly once")
        if not len(owners) and num_rows:
            raise CorruptionError(f"shard {shard}: has {num_rows} rows, and no sample stands in it")
        labels = [ids[positions] for ids, positions in self._read_tokens(owners.tolist())]
        found = np.concatenate([np.zeros(0, np.int32), *labels])
        if len(found) != num_rows:
            raise CorruptionError(f"shard {shard}: samples with {len(found)} target tokens for {num_rows} rows")
        return found

    def _check_sharing(self, shard: int) -> None:
        ours = self._sharing[self._shard[self._sharing] == shard]
        if not self._keys.take(ours).equals(self._keys.take(self._owner_of[ours])):
            raise CorruptionError(f"shard {shard}: samples of different keys stand at the same row")
