"""Whose rows a shard holds, and the observed token of every one of them, from the samples table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError
from logitcache_storage.sample_index import SampleIndex
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

    def __init__(
        self,
        index: SampleIndex,
        keys: Callable[[], npt.NDArray[np.void]],
        read_tokens: Callable[[Sequence[int]], list[Tokens]],
    ) -> None:
        """Of the samples of an index, and 8 bytes more for each.

        Args:
            index: where they stand and how long they are.
            keys: gives the key of every one, [n]; asked where samples share rows, or are excluded, and not before.
            read_tokens: takes their numbers.
        """
        self._index, self._read_keys, self._read_tokens = index, keys, read_tokens
        self._order = np.argsort(index.shard, kind="stable")
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(index.shard))])

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
        owners = self._owners(shard)
        first_row, num_targets = (
            column[owners].astype(np.int64) for column in (self._index.first_row, self._index.num_targets)
        )
        ends = np.cumsum(num_targets)
        num_planned = num_rows + sum(sample.num_rows for sample in excluded)
        if not np.array_equal(first_row, ends - num_targets) or (ends[-1:] != num_planned).any():
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

    @cached_property
    def _keys(self) -> npt.NDArray[np.void]:
        return self._read_keys()

    def _owners(self, shard: int) -> npt.NDArray[np.int64]:
        """The first sample at each place of a shard, in order of rows; those that share one must be equal."""
        start, stop = self._edges[np.minimum([shard, shard + 1], len(self._edges) - 1)]
        inside = self._order[start:stop]
        owners, owner_of = row_owners(self._index.shard[inside], self._index.first_row[inside])
        sharing = np.flatnonzero(owner_of != np.arange(len(inside)))
        if len(sharing):
            ours, theirs = self._keys[inside[sharing]], self._keys[inside[owner_of[sharing]]]
            if ours.tobytes() != theirs.tobytes():
                raise CorruptionError(f"shard {shard}: samples of different keys stand at the same row")
        return inside[owners]

    def _is_excluded(
        self, shard: int, owners: npt.NDArray[np.int64], excluded: Sequence[ExcludedSample]
    ) -> npt.NDArray[np.bool_]:
        first_row, num_targets = self._index.first_row, self._index.num_targets
        planned = {
            (int(first_row[owner]), int(num_targets[owner]), self._keys[owner].tobytes().hex()): place
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
