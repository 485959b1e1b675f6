"""Samples that could not be scored, of shards that are committed without them.

The plan gives every sample its rows; a commit record names those that its shard lacks (`schema.ExcludedSample`), and
the rows behind them move up. Whoever asks for the samples of a cache is not given them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError
from logitcache_storage.manifest import Manifest
from logitcache_storage.sample_index import SampleIndex
from logitcache_storage.schema import ExcludedSample, ShardRecord

Excluded = Mapping[int, Sequence[ExcludedSample]]
"""Shard to the samples it lacks, in the order of their rows; only shards that lack one."""


def excluded_samples(shards: Mapping[int, ShardRecord]) -> Excluded:
    """What these shards lack."""
    if isinstance(shards, Manifest):
        return shards.excluded
    return {shard: record.excluded for shard, record in shards.items() if record.excluded}


def num_excluded(excluded: Excluded) -> int:
    """How many samples of the plan that are: several of equal tokens may share their rows."""
    return sum(len(sample.source_ids) for samples in excluded.values() for sample in samples)


def committed_samples(
    planned: SampleIndex, committed: npt.NDArray[np.bool_], excluded: Excluded, *, where: str
) -> tuple[npt.NDArray[np.integer] | None, SampleIndex]:
    """The samples whose rows are there.

    Args:
        planned: all samples.
        committed: which shards are committed, [S].
        excluded: what these lack.
        where: the cache's URL, for errors.

    Returns:
        Where each stands in the plan (None: just where it stands), and their index, as their rows are stored.

    Raises:
        CorruptionError: an excluded sample is none of the plan.
    """
    if committed.all() and not excluded:
        return None, planned
    is_there = committed[planned.shard]
    if excluded:
        planned = _moved_up(planned, is_there, excluded, where)
    there = np.flatnonzero(is_there)
    there = there.astype(np.int32) if len(planned) < 1 << 31 else there
    return there, planned[there]


def _moved_up(planned: SampleIndex, is_there: npt.NDArray[np.bool_], excluded: Excluded, where: str) -> SampleIndex:
    """The index with first rows as they are stored; excluded samples are taken out of `is_there`."""
    first_row = planned.first_row.copy()
    near = np.flatnonzero(np.isin(planned.shard, list(excluded)))
    near = near[np.argsort(planned.shard[near], kind="stable")]
    for shard, samples in excluded.items():
        inside = near[slice(*np.searchsorted(planned.shard[near], [shard, shard + 1]))]
        starts = np.array([sample.first_row for sample in samples])
        lengths = np.array([sample.num_rows for sample in samples])
        rows, sizes = planned.first_row[inside].astype(np.int64), planned.num_targets[inside].astype(np.int64)
        # The last excluded sample that begins at or before each.
        last = np.searchsorted(starts, rows, side="right") - 1
        is_excluded = (last >= 0) & (starts[last] == rows)
        if not np.isin(starts, rows).all() or (lengths[last] != sizes)[is_excluded].any():
            raise CorruptionError(f"{where}: shard {shard} lacks samples that are none of the plan")
        is_there[inside[is_excluded]] = False
        moved = np.concatenate([[0], np.cumsum(lengths)])[last + 1]
        first_row[inside] = np.where(is_excluded, rows, rows - moved)
    return replace(planned, first_row=first_row)
