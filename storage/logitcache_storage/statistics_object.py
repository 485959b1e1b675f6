"""What a shard's statistics look like on the store: one small object beside its rows, written with them.

    counts      uint32 [4, 32]      rows of the shard in each bin of the four histograms (`row_bins`)
    columns     4 bytes each [S]    of `COLUMNS`, one after the other, of the S samples in the order of their rows

Without compression: 512 bytes and 60 a sample. They only repeat what the rows say, so a cache without them is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError
from logitcache_storage.row_bins import HISTOGRAMS, NUM_BINS, row_bins
from logitcache_storage.statistics import RowStatistics, row_statistics
from logitcache_storage.topk import TopKLogProbs

COLUMNS: dict[str, type[np.generic]] = {
    "num_rows": np.uint32,
    "mean_label_log_prob": np.float32,
    "min_label_log_prob": np.float32,
    "surprising_row": np.uint32,  # the first row of the sample with this log-prob
    "mean_entropy": np.float32,
    "max_entropy": np.float32,
    "mean_kept_mass": np.float32,
    "num_top_1": np.uint32,  # labels that are the first choice
    "num_top_k": np.uint32,  # labels among the kept ids
    "doubt": np.float32,  # largest probability of the first choice where the label is not kept; 0 where all are
    "doubtful_row": np.uint32,  # the first row of the sample where that is; 0 where all are
    **{f"{name}_bins": np.uint32 for name in HISTOGRAMS},  # bit b: the sample has a row in bin b
}
"""Of each sample; rows are counted from 0 within it, means are over them, nats."""

TOLERANCE = 1e-5
"""Of `check_statistics`, relative, or absolute below 1: another machine may sum in another order."""

COUNT_BYTES = 4 * len(HISTOGRAMS) * NUM_BINS
SAMPLE_BYTES = 4 * len(COLUMNS)


@dataclass(frozen=True, eq=False)
class ShardStatistics:
    """Statistics of one shard, of S samples."""

    counts: npt.NDArray[np.uint32]
    """Rows in each bin of each histogram, [4, NUM_BINS]."""
    columns: dict[str, npt.NDArray[Any]]
    """`COLUMNS`, [S] each."""


def shard_statistics(
    topk: TopKLogProbs, labels: npt.NDArray[np.int32], sample_rows: Sequence[int] | npt.NDArray[np.integer]
) -> ShardStatistics:
    """The statistics of a shard from its rows, as they are decoded.

    Args:
        topk: its rows.
        labels: the observed token of each, [N].
        sample_rows: how many rows each of its samples has, in their order, [S]; samples that share rows count once.

    Raises:
        CorruptionError: the samples do not cover the rows.
    """
    return summarise(row_statistics(topk, labels), topk, sample_rows)


def summarise(
    rows: RowStatistics, topk: TopKLogProbs, sample_rows: Sequence[int] | npt.NDArray[np.integer]
) -> ShardStatistics:
    """`shard_statistics` where those of the rows are known."""
    num_rows = np.asarray(sample_rows, dtype=np.int64)
    if num_rows.sum() != len(topk) or (num_rows < 1).any():
        raise CorruptionError(f"samples with {num_rows.sum()} target tokens for {len(topk)} rows")
    bins = row_bins(rows, topk.log_tail)
    counts = np.stack([np.bincount(bins[name], minlength=NUM_BINS) for name in HISTOGRAMS])
    by_sample = _BySample(num_rows)
    doubts = np.where(rows.label_rank == 0, rows.top_1_probability, 0.0).astype(np.float32)
    label_log_prob = rows.label_log_prob.astype(np.float32)
    min_label_log_prob, doubt = by_sample.of(np.minimum, label_log_prob), by_sample.of(np.maximum, doubts)
    columns = {
        "num_rows": num_rows,
        "mean_label_log_prob": by_sample.of(np.add, rows.label_log_prob) / num_rows,
        "min_label_log_prob": min_label_log_prob,
        "surprising_row": by_sample.first(label_log_prob, min_label_log_prob),
        "mean_entropy": by_sample.of(np.add, rows.entropy) / num_rows,
        "max_entropy": by_sample.of(np.maximum, rows.entropy),
        "mean_kept_mass": by_sample.of(np.add, rows.kept_mass) / num_rows,
        "num_top_1": by_sample.of(np.add, (rows.label_rank == 1).astype(np.int64)),
        "num_top_k": by_sample.of(np.add, (rows.label_rank > 0).astype(np.int64)),
        "doubt": doubt,
        "doubtful_row": by_sample.first(doubts, doubt),
        **{f"{name}_bins": by_sample.of(np.bitwise_or, np.uint32(1) << number) for name, number in bins.items()},
    }
    typed = {name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()}
    return ShardStatistics(counts.astype(np.uint32), typed)


def dump_statistics(found: ShardStatistics) -> bytes:
    """The bytes of the object."""
    parts = [
        found.counts.astype("<u4"),
        *(column.astype(column.dtype.newbyteorder("<")) for column in found.columns.values()),
    ]
    return b"".join(part.tobytes() for part in parts)


def parse_statistics(data: bytes, num_rows: int, *, where: str) -> ShardStatistics:
    """The statistics behind these bytes, which point into them.

    Args:
        data: all bytes of the object.
        num_rows: of its shard.
        where: names the object in errors.

    Raises:
        CorruptionError: they are no statistics of a shard with so many rows.
    """
    num_samples, rest = divmod(len(data) - COUNT_BYTES, SAMPLE_BYTES)
    if num_samples < 0 or rest:
        raise CorruptionError(f"{where}: {len(data)} bytes, expected {COUNT_BYTES} and {SAMPLE_BYTES} a sample")
    counts = np.frombuffer(data, "<u4", len(HISTOGRAMS) * NUM_BINS).reshape(len(HISTOGRAMS), NUM_BINS)
    stored = np.frombuffer(data, "<u4", offset=COUNT_BYTES).reshape(len(COLUMNS), num_samples)
    columns = {
        name: column.view(np.dtype(dtype).newbyteorder("<"))
        for (name, dtype), column in zip(COLUMNS.items(), stored, strict=True)
    }
    found = ShardStatistics(counts, columns)
    if problem := _problem(found, num_rows):
        raise CorruptionError(f"{where}: {problem}")
    return found


def check_statistics(found: ShardStatistics, expected: ShardStatistics, *, where: str) -> None:
    """Refuse statistics that are not those of the rows; a value at the edge of a bin may fall on either side.

    Raises:
        CorruptionError: names a column that differs.
    """
    if not np.array_equal(found.columns["num_rows"], expected.columns["num_rows"]):
        raise CorruptionError(f"{where}: its statistics are of other samples than stand in it")
    for name, dtype in COLUMNS.items():
        ours, theirs = found.columns[name], expected.columns[name]
        if dtype is np.float32:
            same = np.abs(ours - theirs) <= TOLERANCE * (1 + np.abs(theirs))
        elif name in ("entropy_bins", "kept_mass_bins"):
            same = (ours & ~_widened(theirs) | theirs & ~_widened(ours)) == 0
        else:
            # Of two first choices that are nearly as likely, another machine may find the other one more so.
            same = (ours == theirs) | (name == "doubtful_row")
        if not same.all():
            sample = int(np.flatnonzero(~same)[0])
            raise CorruptionError(f"{where}: {name} of its sample {sample} is {ours[sample]}, not {theirs[sample]}")
    for name, ours, theirs in zip(HISTOGRAMS, found.counts, expected.counts, strict=True):
        if name.startswith("label") and not np.array_equal(ours, theirs):
            raise CorruptionError(f"{where}: its histogram of {name} is not that of its rows")


class _BySample:
    """Reductions over the rows of each sample."""

    def __init__(self, num_rows: npt.NDArray[np.int64]) -> None:
        self._num_rows = num_rows
        self._starts = np.cumsum(num_rows) - num_rows

    def of(self, reduce: np.ufunc, values_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The reduction of each sample's values, [S]."""
        return np.asarray(reduce.reduceat(values_N, self._starts)) if len(self._starts) else values_N[:0]

    def first(self, values_N: npt.NDArray[Any], wanted_S: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The first row of each sample, from 0 within it, that has the wanted value, which one of its rows has."""
        rows = np.flatnonzero(values_N == np.repeat(wanted_S, self._num_rows))
        return np.asarray(rows[np.searchsorted(rows, self._starts)] - self._starts)


def _widened(bins: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """With their neighbours."""
    one = np.uint32(1)
    return np.asarray(bins | bins << one | bins >> one)


def _problem(found: ShardStatistics, num_rows: int) -> str | None:
    """What is wrong with statistics that were read; None where they can be those of a shard with so many rows."""
    columns, rows = found.columns, found.columns["num_rows"]
    if (rows < 1).any() or rows.sum(dtype=np.int64) != num_rows:
        return f"samples of {rows.sum(dtype=np.int64)} rows in a shard of {num_rows}"
    if (found.counts.sum(1, dtype=np.int64) != num_rows).any():
        return f"histograms of {found.counts.sum(1, dtype=np.int64).tolist()} rows in a shard of {num_rows}"
    for name in ("surprising_row", "doubtful_row"):
        if (columns[name] >= rows).any():
            return f"{name} outside the sample"
    for name in ("num_top_1", "num_top_k"):
        if (columns[name] > rows).any():
            return f"{name} above the sample's rows"
    for name, dtype in COLUMNS.items():
        sign = -1 if "log_prob" in name else 1
        with np.errstate(invalid="ignore"):  # any bytes may stand there
            is_good = dtype is not np.float32 or (np.isfinite(columns[name]) & (sign * columns[name] >= 0)).all()
        if not is_good:
            return f"{name} that is not finite, or has the wrong sign"
    return None
