"""Labels that are probably wrong: the teacher is sure, and the label is not among its choices."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError
from logitcache_storage.inspect.data import token_text
from logitcache_storage.inspect.doubtful_reading import DoubtfulPosition, DoubtfulPositions, Reading
from logitcache_storage.progress import Meter
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.samples import ROWS_PER_GROUP
from logitcache_storage.visible import printable

DEFAULT_MIN_PROBABILITY = 0.9
DEFAULT_LIMIT = 1000
LINES_AT_ONCE = 1000
"""Of a CSV that somebody waits for."""

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
    reading = Reading(cache, table, min_probability, meter)
    if limit is not None:
        return reading.first(limit)
    for _ in reading.steps():
        pass
    return reading.found()


def csv_lines(positions: Iterable[DoubtfulPosition]) -> Iterator[str]:
    """A line of names and one for each position, with its end.

    Tokens are written as `visible` shows them, and what a spreadsheet would take for a formula behind an apostrophe;
    the ids beside them are exact.
    """
    return map(_csv_line, itertools.chain([CSV_COLUMNS], map(_csv_row, positions)))


def write_csv(positions: Iterable[DoubtfulPosition], file: IO[str]) -> None:
    """`csv_lines` into a file."""
    file.writelines(csv_lines(positions))


def csv_parts(reading: Reading) -> Iterator[str]:
    """The CSV of all positions for whoever waits: its first line at once, "" while samples are read, then the others.

    What could not be read stands in lines of its own at the end: nothing else would say it.
    """
    yield _csv_line(CSV_COLUMNS)
    for _ in reading.steps():
        yield ""
    found = reading.found()
    lines = map(_csv_line, map(_csv_row, found.positions))
    yield from iter(lambda: "".join(itertools.islice(lines, LINES_AT_ONCE)), "")
    yield from (_csv_line([f"NOT READ: {printable(problem)}"]) for problem in found.problems)


def write_columns(
    cache: Cache,
    table: SampleTable,
    path: str | Path,
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
        path: of the file.
        min_probability: as in `doubtful_positions`.
        name: of the column.
        meter: told of every sample that is read, and of their number.

    Returns:
        How many positions have the weight 0, shared ones counted for each sample.

    Raises:
        InputError: `min_probability` outside (0, 1].
        CorruptionError: a shard is damaged, or has no statistics.
    """
    reading = Reading(cache, table, min_probability, meter)
    with Path(path).open("wb") as file:
        file.writelines(parquet_parts(reading, name))
    return len(reading.found().positions)


def parquet_parts(reading: Reading, name: str = "critical") -> Iterator[bytes]:
    """The file of `write_columns` for whoever waits: b"" while samples are read, then its bytes.

    Raises:
        CorruptionError: as there, at the first step if it is known by then.
    """
    _check_whole(reading)
    for _ in reading.steps():
        yield b""
    _check_whole(reading)
    schema = pa.schema([pa.field("key", pa.binary(16)), pa.field(name, pa.list_(pa.int8()))])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for keys, weights in _weights(reading.cache, reading.found().positions.columns):
            writer.write_table(pa.table([keys, weights], schema=schema), row_group_size=ROWS_PER_GROUP)
            yield _taken(sink)
    yield _taken(sink)


def _weights(cache: Cache, columns: npt.NDArray[Any]) -> Iterator[tuple[pa.ChunkedArray, pa.ListArray]]:
    """(keys, weights of the targets) of run after run of samples."""
    columns = columns[np.argsort(columns["index"])]
    for start, part in cache.scan(["key"]):
        stop = start + len(part)
        ends = np.cumsum(cache.index.num_targets[start:stop], dtype=np.int32)
        starts = np.append(np.int32(0), ends)
        weights = np.ones(starts[-1], np.int8)
        here = slice(*np.searchsorted(columns["index"], [start, stop]).tolist())
        weights[starts[columns["index"][here] - start] + columns["row"][here]] = 0
        yield part.column("key"), pa.ListArray.from_arrays(pa.array(starts), pa.array(weights))


def _check_whole(reading: Reading) -> None:
    if reading.problems:
        raise CorruptionError(f"not every sample is known: {reading.problems[0]}")


def _taken(sink: io.BytesIO) -> bytes:
    """What has been written to it since the last time; whoever writes counts for himself how much that was."""
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def _csv_line(row: Sequence[Any]) -> str:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerow(row)
    return sink.getvalue()


def _csv_row(found: DoubtfulPosition) -> tuple[Any, ...]:
    return (
        found.index,
        found.key,
        _harmless(printable(found.source_id)),
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
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text
