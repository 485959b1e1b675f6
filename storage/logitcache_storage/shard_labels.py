"""Whose rows a shard holds, and the observed token of every one of them, from the samples table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.errors import CorruptionError
from logitcache_storage.schema import ExcludedSample

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

    def of(self, shard: int, num_rows: int, excluded: Sequence[ExcludedSample] = ()) -> npt.NDArray[np.int32]:
        """Labels of a shard's rows, [num_rows]; it lacks those of the `excluded` samples. See `by_sample`."""
        return np.concatenate([np.zeros(0, np.int32), *self.by_sample(shard, num_rows, excluded)])

    def by_sample(
        self, shard: int, num_rows: int, excluded: Sequence[ExcludedSample] = ()
    ) -> list[npt.NDArray[np.int32]]:
        """The same for each sample, in the order of their rows; samples that share rows count once.

        Raises:
            CorruptionError: the samples of the shard do not cover its rows exactly once, or share rows
                without being equal.
        """
        self._check_sharing(shard)
        start, stop = np.searchsorted(self._owner_shard, [shard, shard + 1])
        owners = self._owners[start:stop]
        ends = np.cumsum(self._num_targets[owners])
        is_gapless = np.array_equal(self._first_row[owners], ends - self._num_targets[owners])
        num_planned = num_rows + sum(sample.num_rows for sample in excluded)
        if not is_gapless or (ends[-1:] != num_planned).any():
            raise CorruptionError(
                f"shard {shard}: the samples table does not cover its {num_planned} rows exactly once"
            )
        owners = owners[~self._is_excluded(shard, owners, excluded)]
        if not len(owners) and num_rows:
            raise CorruptionError(f"shard {shard}: has {num_rows} rows, and no sample stands in it")
        labels = [ids[positions] for ids, positions in self._read_tokens(owners.tolist())]
        if (found := sum(map(len, labels))) != num_rows:
            raise CorruptionError(f"shard {shard}: samples with {found} target tokens for {num_rows} rows")
        return labels

    def _is_excluded(
        self, shard: int, owners: npt.NDArray[np.int64], excluded: Sequence[ExcludedSample]
    ) -> npt.NDArray[np.bool_]:
        planned = {
            (int(self._first_row[owner]), int(self._num_targets[owner]), self._keys[owner].as_py().hex()): place
            for place, owner in enumerate(owners.tolist() if excluded else [])
        }
        is_excluded = np.zeros(len(owners), dtype=bool)
        for sample in excluded:
            place = planned.get((sample.first_row, sample.num_rows, sample.key))
            if place is None:
                raise CorruptionError(
                    f"shard {shard}: lacks a sample {sample.key}, and the samples table has none there"
                )
            is_excluded[place] = True
        return is_excluded

    def _check_sharing(self, shard: int) -> None:
        ours = self._sharing[self._shard[self._sharing] == shard]
        if not self._keys.take(ours).equals(self._keys.take(self._owner_of[ours])):
            raise CorruptionError(f"shard {shard}: samples of different keys stand at the same row")
