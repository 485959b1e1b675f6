"""The samples table: what the plan says of every sample, and how one sample's tokens are read from it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage.arrow_shard import VerifiedFile
from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import CorruptionError, LogitCacheError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.schema import ObjectRecord, PlanPart, PlanRecord

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),  # logitcache_storage.fingerprints.sample_key
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("first_row", pa.int32(), nullable=False),  # row of the first target within the shard
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_targets", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("target_ranges", pa.list_(pa.int32()), nullable=False),  # start, stop, start, stop, ...
    ]
)
"""The fixed columns, in order; a corpus's own columns follow."""

TOKEN_COLUMNS = ("input_ids", "target_ranges")
"""The columns that are read per sample, never for the whole cache at once."""

ROWS_PER_GROUP = 1024
"""Samples in a parquet row group: the i-th sample of a part stands in row group i // ROWS_PER_GROUP."""

TOKEN_GROUPS_KEPT = 256
"""Row groups of token ids that stay in memory: 256 * 1,024 samples of 1,000 tokens are 1 GB."""


class SamplesTable:
    """The samples of a plan, in its order, whether or not their shards are committed."""

    def __init__(self, store: ObjectStore, plan: PlanRecord) -> None:
        self._store = store
        self._plan = plan
        self._first_samples = [part.first_sample for part in plan.parts]
        self._token_groups: dict[tuple[int, int], pa.Table] = {}

    def index(self) -> pa.Table:
        """All samples, without their tokens: the fixed columns and the corpus's own.

        Raises:
            CorruptionError: a part is damaged, lacks a column, or points outside the plan's shards.
        """
        fixed = pa.schema([f for f in SAMPLES_SCHEMA if f.name not in TOKEN_COLUMNS])
        tables = [self._read_index(part) for part in self._plan.parts]
        try:
            table = pa.concat_tables(tables) if tables else fixed.empty_table()
        except pa.ArrowInvalid as e:
            raise CorruptionError(f"{self._store.url}: the parts of the samples table differ: {e}") from e
        for f in fixed:
            if f.name not in table.column_names or table.schema.field(f.name).type != f.type:
                raise CorruptionError(f"{self._store.url}: samples table without a column {f.name!r} of {f.type}")
        self._check_inside_shards(table)
        return table

    def tokens(self, sample: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(input_ids [L], target_positions [M]) of one sample of the plan."""
        if not 0 <= sample < self._plan.num_samples:
            raise IndexError(f"sample {sample} of a plan with {self._plan.num_samples}")
        part = bisect.bisect_right(self._first_samples, sample) - 1
        group, row = divmod(sample - self._first_samples[part], ROWS_PER_GROUP)
        table = self._token_group(part, group)
        ids, ranges = (table.column(name)[row].values.to_numpy() for name in TOKEN_COLUMNS)
        return ids, target_positions(ranges)

    def __getstate__(self) -> dict[str, Any]:
        # What is kept in memory can be read again; a worker process need not be sent it.
        return {**self.__dict__, "_token_groups": {}}

    def _token_group(self, part: int, group: int) -> pa.Table:
        """Tokens of one row group of a part, kept in memory while they are in use."""
        if (part, group) in self._token_groups:
            table = self._token_groups.pop((part, group))
        else:
            record = self._plan.parts[part]
            expected = min(ROWS_PER_GROUP, record.num_samples - group * ROWS_PER_GROUP)
            with _decoding(self._store, record.object.path):
                file = read_parquet_object(self._store, record.object)
                table = file.read_row_group(group, columns=list(TOKEN_COLUMNS)).combine_chunks()
                if table.num_rows != expected:
                    raise CorruptionError(
                        f"{self._store.url}/{record.object.path}: {table.num_rows} samples in row group {group},"
                        f" expected {expected}"
                    )
        self._token_groups[part, group] = table
        while len(self._token_groups) > TOKEN_GROUPS_KEPT:
            self._token_groups.pop(next(iter(self._token_groups)))
        return table

    def _read_index(self, part: PlanPart) -> pa.Table:
        with _decoding(self._store, part.object.path):
            file = read_parquet_object(self._store, part.object)
            table = file.read([name for name in file.schema_arrow.names if name not in TOKEN_COLUMNS])
        if table.num_rows != part.num_samples:
            raise CorruptionError(
                f"{self._store.url}/{part.object.path}: {table.num_rows} samples, the plan says {part.num_samples}"
            )
        return table

    def _check_inside_shards(self, table: pa.Table) -> None:
        sizes = np.asarray(self._plan.shard_num_rows, dtype=np.int64)
        shard = table.column("shard").to_numpy()
        first = table.column("first_row").to_numpy().astype(np.int64)
        count = table.column("num_targets").to_numpy()
        inside = (shard >= 0) & (shard < len(sizes)) & (first >= 0) & (count >= 1)
        if not inside.all() or (len(shard) and (first + count > sizes[shard]).any()):
            raise CorruptionError(f"{self._store.url}: the samples table points outside the shards of the plan")


def read_parquet_object(store: ObjectStore, record: ObjectRecord) -> pq.ParquetFile:
    """A committed parquet object, opened; every byte read from it is verified."""
    with _decoding(store, record.path):
        return pq.ParquetFile(pa.PythonFile(VerifiedFile(CommittedObjects(store, (record,)), record.path), mode="r"))


def target_positions(target_ranges: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Where the target tokens stand, [M], from flattened half-open ranges, [2R]."""
    starts, stops = target_ranges[0::2], target_ranges[1::2]
    lengths = stops - starts
    before = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.asarray(np.repeat(starts, lengths) + np.arange(lengths.sum()) - before, dtype=np.int32)


@contextmanager
def _decoding(store: ObjectStore, path: str) -> Iterator[None]:
    """What Parquet makes of bytes that are as committed but no samples or vocabulary table."""
    try:
        yield
    except LogitCacheError:
        raise
    except (pa.ArrowException, OSError, LookupError) as e:
        raise CorruptionError(f"{store.url}/{path}: not the Parquet file it should be: {e}") from e
