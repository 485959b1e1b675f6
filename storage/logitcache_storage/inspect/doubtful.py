"""Labels that are probably wrong: the teacher is sure, and the label is not among its choices."""

from __future__ import annotations

import csv
import functools
import io
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.inspect.data import token_data, token_text
from logitcache_storage.progress import Meter
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.samples import ROWS_PER_GROUP
from logitcache_storage.statistics import row_statistics
from logitcache_storage.visible import visible
from logitcache_storage.zarr_shard import CHUNK_ROWS

DEFAULT_MIN_PROBABILITY = 0.9
DEFAULT_LIMIT = 1000

SAMPLES_AT_ONCE = 32
NUM_READERS = 8
"""Reads side by side: samples stand anywhere, and a remote store answers slowly."""
ROWS_AT_ONCE = 2 * CHUNK_ROWS
"""Of a shard: samples that begin within so many rows are read together where all are wanted."""

CSV_COLUMNS = (
    "sample",
    "key",
    "source_id",
    "row",
    "position",
    "label_id",
    "label",
    "label_log_prob",
    "choice_id",
    "choice",
    "choice_probability",
    "entropy",
)


@dataclass(frozen=True, slots=True)
class DoubtfulPosition:
    """A target whose label is not among the teacher's kept ids, while its first choice has a large probability."""

    index: int
    """Of the sample in its cache."""
    key: str
    source_id: str
    row: int
    """Of the sample's `topk`: its target positions, counted from 0."""
    position: int
    """Where the token stands in `input_ids`."""
    label: dict[str, Any]
    """The observed token, as `inspect.data.token_data` gives it: `id`, `text`, `bytes`."""
    label_log_prob: float
    """Nats."""
    choice: dict[str, Any]
    """The teacher's first choice."""
    choice_probability: float
    entropy: float
    """Nats."""


@dataclass(frozen=True)
class DoubtfulPositions:
    """The most doubtful positions of a cache."""

    positions: tuple[DoubtfulPosition, ...]
    """By `choice_probability` descending, then by `label_log_prob` ascending. Which of equally sure ones `limit` leaves
    out is left open."""
    num_samples: int
    """Samples with at least one such position, in the whole cache."""
    is_complete: bool
    """Whether these are all; False where `limit` cut the list."""
    problems: tuple[str, ...]
    """What could not be read, and why."""


def doubtful_positions(
    cache: Cache,
    table: SampleTable,
    *,
    min_probability: float = DEFAULT_MIN_PROBABILITY,
    limit: int | None = DEFAULT_LIMIT,
    meter: Meter | None = None,
) -> DoubtfulPositions:
    """Positions where the first choice has at least this probability and the label is not kept, the surest first.

    Reads the rows of as few samples as it takes to know the first `limit` positions.

    Args:
        cache: what to look at.
        table: of `load_statistics`.
        min_probability: in (0, 1].
        limit: how many to name; None: all.
        meter: told of every sample that is read, and of their number where all are.

    Raises:
        InputError: `min_probability` outside (0, 1].
    """
    samples = doubtful_samples(table, min_probability)
    doubt = table.column("doubt")[samples]
    reading = _Reading(cache, min_probability, meter, list(table.problems.values()))
    found: list[DoubtfulPosition] = []
    is_complete = True
    if limit is None:
        if meter is not None:
            meter.set_total(len(samples))
        found = sorted(reading.positions(_neighbours(cache, samples)), key=_rank)
    else:
        for start in range(0, len(samples), SAMPLES_AT_ONCE):
            # No position of a sample is surer than its strongest doubt.
            if len(found) >= limit and (not limit or found[-1].choice_probability >= doubt[start]):
                is_complete = False
                break
            found += reading.positions([index] for index in samples[start : start + SAMPLES_AT_ONCE].tolist())
            found.sort(key=_rank)
            is_complete &= len(found) <= limit
            found = found[:limit]
    return DoubtfulPositions(tuple(found), len(samples), is_complete, tuple(dict.fromkeys(reading.problems)))


def doubtful_samples(table: SampleTable, min_probability: float) -> npt.NDArray[np.int64]:
    """Indices of the samples with such a position, the strongest doubt first.

    Raises:
        InputError: `min_probability` outside (0, 1].
    """
    if not 0 < min_probability <= 1:
        raise InputError(f"a probability of {min_probability:g}; give one above 0 and up to 1")
    return table.order("doubt", descending=True, among=table.column("doubt") >= np.float32(min_probability))


def csv_lines(positions: Iterable[DoubtfulPosition]) -> Iterator[str]:
    """A line of names and one for each position, with its end.

    Tokens and sources are written as `visible` shows them, those that a spreadsheet would take for a formula behind an
    apostrophe; the ids beside them are exact.
    """
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    for row in (CSV_COLUMNS, *map(_csv_row, positions)):
        writer.writerow(row)
        yield sink.getvalue()
        sink.seek(0)
        sink.truncate()


def write_csv(positions: Iterable[DoubtfulPosition], file: IO[str]) -> None:
    """`csv_lines` into a file."""
    for line in csv_lines(positions):
        file.write(line)


def write_columns(
    cache: Cache,
    table: SampleTable,
    path: str | Path | IO[bytes],
    *,
    min_probability: float = DEFAULT_MIN_PROBABILITY,
    name: str = "critical",
    meter: Meter | None = None,
) -> int:
    """A Parquet file for `logitcache train --columns`: of every sample its key, and a weight for each target token.

    The weight is 0 at doubtful positions and 1 everywhere else, so that

        logitcache train --student S --cache C --objective critical_tokens --columns FILE.parquet --output DIR

    trains on all labels but the doubtful ones. A row of one's own reads it as `column('critical')`.

    Args:
        cache: whose samples.
        table: of `load_statistics`.
        path: of the file, or a file to write to.
        min_probability: as in `doubtful_positions`.
        name: of the column.
        meter: told of every sample.

    Returns:
        How many positions have the weight 0, shared ones counted for each sample.

    Raises:
        InputError: `min_probability` outside (0, 1], or a shard has no statistics.
        CorruptionError: a shard is damaged.
    """
    if table.problems:
        raise CorruptionError(f"not every sample is known: {next(iter(table.problems.values()))}")
    is_doubtful = np.zeros(len(table), dtype=bool)
    is_doubtful[doubtful_samples(table, min_probability)] = True
    schema = pa.schema([pa.field("key", pa.binary(16)), pa.field(name, pa.list_(pa.int8()))])
    num_doubtful = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start, part in cache.scan(["key"]):
            stop = start + len(part)
            sizes = table.column("num_targets")[start:stop].astype(np.int64)
            weights = np.ones(int(sizes.sum()), np.int8)
            ends = np.cumsum(sizes)
            for run in _neighbours(cache, start + np.flatnonzero(is_doubtful[start:stop])):
                for index, sample in zip(run, cache.read(run), strict=True):
                    rows, _ = _doubtful_rows(sample, min_probability)
                    weights[ends[index - start] - sizes[index - start] + rows] = 0
            offsets = np.concatenate([[0], ends]).astype(np.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(weights))
            writer.write_table(pa.table([part.column("key"), lists], schema=schema), row_group_size=ROWS_PER_GROUP)
            num_doubtful += int((weights == 0).sum())
            if meter is not None:
                meter.advance(len(part))
    return num_doubtful


class _Reading:
    """Doubtful positions of the samples that can be read; what is wrong with others stands in `problems`."""

    def __init__(self, cache: Cache, min_probability: float, meter: Meter | None, problems: list[str]) -> None:
        self._cache, self._min_probability, self._meter = cache, min_probability, meter
        self._token = functools.cache(lambda token: token_data(cache.vocabulary, token))  # one for all positions
        self.problems = problems

    def positions(self, runs: Iterable[list[int]]) -> list[DoubtfulPosition]:
        """Of these samples; each run of them is read together, several runs side by side."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            found = list(itertools.chain.from_iterable(pool.map(self._of_run, runs)))
        self.problems += [item for item in found if isinstance(item, str)]
        return [item for item in found if not isinstance(item, str)]

    def _of_run(self, run: list[int]) -> list[DoubtfulPosition | str]:
        """What was found, and why the rest was not."""
        found: list[DoubtfulPosition | str] = []
        try:
            samples = self._cache.read(run)
        except CorruptionError as e:
            if len(run) > 1:  # not all of them need be damaged
                return [item for index in run for item in self._of_run([index])]
            samples, found = [], [str(e)]
        for sample, index in zip(samples, run, strict=False):
            found += self._of_sample(sample, index)
        if self._meter is not None:
            self._meter.advance(len(run))
        return found

    def _of_sample(self, sample: Sample, index: int) -> list[DoubtfulPosition]:
        rows, statistics = _doubtful_rows(sample, self._min_probability)
        return [
            DoubtfulPosition(
                index=index,
                key=sample.key,
                source_id=sample.source_id,
                row=row,
                position=int(sample.target_positions[row]),
                label=self._token(int(sample.labels[row])),
                label_log_prob=float(sample.topk.label_log_prob[row]),
                choice=self._token(int(sample.topk.ids[row, 0])),
                choice_probability=float(np.float32(statistics.top_1_probability[row])),
                entropy=float(statistics.entropy[row]),
            )
            for row in rows.tolist()
        ]


def _neighbours(cache: Cache, samples: npt.NDArray[np.int64]) -> list[list[int]]:
    """The same samples in the order of their rows, cut into runs that are read together."""
    shard, window = cache.index.shard[samples], cache.index.first_row[samples] // ROWS_AT_ONCE
    order = np.lexsort((cache.index.first_row[samples], shard))
    is_next = (np.diff(shard[order]) != 0) | (np.diff(window[order]) != 0)
    return [run.tolist() for run in np.split(samples[order], np.flatnonzero(is_next) + 1) if len(run)]


def _rank(found: DoubtfulPosition) -> tuple[float, float, int, int]:
    return (-found.choice_probability, found.label_log_prob, found.index, found.row)


def _doubtful_rows(sample: Sample, min_probability: float) -> tuple[npt.NDArray[np.int64], Any]:
    """Rows of a sample that are doubtful, and the statistics of all of them."""
    found = row_statistics(sample.topk, sample.labels)
    # As float32, as the table has them.
    is_sure = found.top_1_probability.astype(np.float32) >= np.float32(min_probability)
    return np.flatnonzero(is_sure & (found.label_rank == 0)), found


def _csv_row(found: DoubtfulPosition) -> tuple[Any, ...]:
    return (
        found.index,
        found.key,
        _harmless(visible(found.source_id)),
        found.row,
        found.position,
        found.label["id"],
        _harmless(token_text(found.label)),
        f"{found.label_log_prob:.6g}",
        found.choice["id"],
        _harmless(token_text(found.choice)),
        f"{found.choice_probability:.6g}",
        f"{found.entropy:.6g}",
    )


def _harmless(text: str) -> str:
    """A spreadsheet computes what begins so, whatever it is quoted with."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
