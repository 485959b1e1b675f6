"""Reads doubtful positions, many samples at a time, and holds them as columns: a cache may have millions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.inspect.data import token_data
from logitcache_storage.progress import Meter
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.statistics import row_statistics
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.zarr_shard import CHUNK_ROWS

SAMPLES_AT_ONCE = 32
NUM_READERS = 8
"""Reads side by side: samples stand anywhere, and a remote store answers slowly."""
ROWS_AT_ONCE = 2 * CHUNK_ROWS
"""Of a shard: samples that begin within so many rows are read together where all are wanted."""

COLUMNS = np.dtype(
    [
        ("index", np.int64),
        ("name", np.int64),  # where the key and the source of its sample stand
        ("row", np.int32),
        ("position", np.int32),
        ("label", np.int32),
        ("choice", np.int32),
        ("label_log_prob", np.float32),
        ("choice_probability", np.float32),
        ("entropy", np.float64),
    ]
)
"""What is held of a position, 48 bytes."""


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


class Positions(Sequence[DoubtfulPosition]):
    """Doubtful positions, held as columns; each is put together when it is asked for."""

    def __init__(
        self, cache: Cache, columns: npt.NDArray[Any], keys: npt.NDArray[np.void], sources: pa.ChunkedArray
    ) -> None:
        """`columns` are [n] of `COLUMNS`, `keys` and `sources` those of the samples that their `name` counts."""
        self._cache, self._keys, self._sources = cache, keys, sources
        self._token = functools.cache(lambda token: token_data(cache.vocabulary, token))  # one for all positions
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, at: int) -> DoubtfulPosition: ...

    @overload
    def __getitem__(self, at: slice) -> Positions: ...

    def __getitem__(self, at: int | slice) -> DoubtfulPosition | Positions:
        if isinstance(at, slice):
            return Positions(self._cache, self.columns[at], self._keys, self._sources)
        index, name, row, position, label, choice, label_log_prob, choice_probability, entropy = self.columns[at].item()
        return DoubtfulPosition(
            index=index,
            key=self._keys[name].tobytes().hex(),
            source_id=self._sources[name].as_py(),
            row=row,
            position=position,
            label=self._token(label),
            label_log_prob=label_log_prob,
            choice=self._token(choice),
            choice_probability=choice_probability,
            entropy=entropy,
        )


@dataclass(frozen=True)
class DoubtfulPositions:
    """The most doubtful positions of a cache."""

    positions: Positions
    """By `choice_probability` descending, then by `label_log_prob` ascending. Which of equally sure ones `limit` leaves
    out is left open."""
    num_samples: int
    """Samples with at least one such position, in the whole cache."""
    is_complete: bool
    """Whether these are all; False where `limit` cut the list."""
    problems: tuple[str, ...]
    """What could not be read, and why."""


def doubtful_samples(table: SampleTable, min_probability: float) -> npt.NDArray[np.int64]:
    """Indices of the samples with such a position, the strongest doubt first.

    Raises:
        InputError: `min_probability` outside (0, 1].
    """
    if not 0 < min_probability <= 1:
        raise InputError(f"a probability of {min_probability:g}; give one above 0 and up to 1")
    return table.order("doubt", descending=True, among=table.column("doubt") >= np.float32(min_probability))


class Reading:
    """Doubtful positions while they are being read; what is wrong with some samples stands in `problems`."""

    def __init__(self, cache: Cache, table: SampleTable, min_probability: float, meter: Meter | None = None) -> None:
        """Arguments and errors as in `doubtful.doubtful_positions`."""
        self.cache = cache
        self.problems = list(table.problems.values())
        self._samples = doubtful_samples(table, min_probability)
        self._doubt = table.column("doubt")[self._samples]
        self._min_probability, self._meter = min_probability, meter
        self._parts: list[_Part] = []

    def steps(self) -> Iterator[None]:
        """Read all samples with such a position, several runs of neighbours side by side; returns after each run."""
        if self._meter is not None:
            self._meter.set_total(len(self._samples))
        yield from self._read(_neighbours(self.cache, self._samples))

    def first(self, limit: int) -> DoubtfulPositions:
        """Read as many samples as it takes to know the first positions."""
        found, stop = self.found(), 0
        for start in range(0, len(self._samples), SAMPLES_AT_ONCE):
            surest = found.positions.columns["choice_probability"][:limit]
            # No position of a sample is surer than its strongest doubt.
            if len(surest) == limit and (not limit or surest[-1] >= self._doubt[start]):
                break
            stop = start + SAMPLES_AT_ONCE
            for _ in self._read([index] for index in self._samples[start:stop].tolist()):
                pass
            found = self.found()
        is_complete = stop >= len(self._samples) and len(found.positions) <= limit
        return replace(found, positions=found.positions[:limit], is_complete=is_complete)

    def found(self) -> DoubtfulPositions:
        """What has been read so far."""
        parts = [_Part(np.zeros(0, COLUMNS), np.zeros(0, "V16"), pa.array([], pa.string())), *self._parts]
        sizes = [len(part.keys) for part in parts]
        columns = np.concatenate([part.columns for part in parts])
        columns["name"] += np.repeat(np.cumsum(sizes) - sizes, [len(part.columns) for part in parts])
        order = (columns["row"], columns["index"], columns["label_log_prob"], -columns["choice_probability"])
        positions = Positions(
            self.cache,
            columns[np.lexsort(order)],
            np.concatenate([part.keys for part in parts]),
            pa.chunked_array([part.sources for part in parts]),
        )
        return DoubtfulPositions(positions, len(self._samples), True, tuple(dict.fromkeys(self.problems)))

    def _read(self, runs: Iterable[list[int]]) -> Iterator[None]:
        pool = ThreadPoolExecutor(NUM_READERS)
        try:
            for found in pool.map(self._of_run, runs):
                self._parts += [item for item in found if not isinstance(item, str)]
                self.problems += [item for item in found if isinstance(item, str)]
                yield
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever has waited may have left

    def _of_run(self, run: list[int]) -> list[_Part | str]:
        """What was found, and why the rest was not."""
        try:
            found: list[_Part | str] = [_part(self.cache.read(run), run, self._min_probability)]
        except CorruptionError as e:
            if len(run) > 1:  # not all of them need be damaged
                return [item for index in run for item in self._of_run([index])]
            found = [str(e)]
        if self._meter is not None:
            self._meter.advance(len(run))
        return found


class _Part(NamedTuple):
    """Doubtful positions of some samples; their `name` counts these samples."""

    columns: npt.NDArray[Any]
    keys: npt.NDArray[np.void]
    sources: pa.StringArray


def _part(samples: list[Sample], indices: list[int], min_probability: float) -> _Part:
    topk = TopKLogProbs.concatenate([sample.topk for sample in samples])
    labels = np.concatenate([sample.labels for sample in samples])
    statistics = row_statistics(topk, labels)
    # As float32, as the table has them.
    probability = statistics.top_1_probability.astype(np.float32)
    at = np.flatnonzero((probability >= np.float32(min_probability)) & (statistics.label_rank == 0))
    sizes = np.array([len(sample.topk) for sample in samples])
    sample_of = np.repeat(np.arange(len(samples)), sizes)[at]
    columns = np.zeros(len(at), COLUMNS)
    columns["index"], columns["name"] = np.array(indices)[sample_of], sample_of
    columns["row"] = at - (np.cumsum(sizes) - sizes)[sample_of]
    columns["position"] = np.concatenate([sample.target_positions for sample in samples])[at]
    columns["label"], columns["label_log_prob"] = labels[at], topk.label_log_prob[at]
    columns["choice"], columns["choice_probability"] = topk.ids[at, 0], probability[at]
    columns["entropy"] = statistics.entropy[at]
    keys = np.frombuffer(bytes.fromhex("".join(sample.key for sample in samples)), "V16")
    return _Part(columns, keys, pa.array([sample.source_id for sample in samples], pa.string()))


def _neighbours(cache: Cache, samples: npt.NDArray[np.int64]) -> list[list[int]]:
    """The same samples in the order of their rows, cut into runs that are read together."""
    shard, window = cache.index.shard[samples], cache.index.first_row[samples] // ROWS_AT_ONCE
    order = np.lexsort((cache.index.first_row[samples], shard))
    is_next = (np.diff(shard[order]) != 0) | (np.diff(window[order]) != 0)
    return [run.tolist() for run in np.split(samples[order], np.flatnonzero(is_next) + 1) if len(run)]
