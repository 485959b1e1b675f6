"""The samples table: what the plan says of every sample, and how one sample's tokens are read from it."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.arrow_shard import VerifiedFile
from logitcache_storage.bounded_parquet import (
    MAX_BYTES_AT_ONCE,
    MAX_BYTES_PER_BYTE,
    MAX_VALUES_PER_BYTE,
    BoundedParquet,
)
from logitcache_storage.committed import CommittedObjects
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, LogitCacheError
from logitcache_storage.fingerprints import fingerprint
from logitcache_storage.objects import ObjectStore
from logitcache_storage.sample_index import (
    PLACE_BYTES,
    PLACE_COLUMNS,
    Places,
    SampleIndex,
    check_inside_shards,
    find_key,
    load_index,
    parse_places,
)
from logitcache_storage.schema import ObjectRecord, PlanPart, PlanRecord
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA

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

KEPT_BYTES = 1 << 28
"""Of row groups that stay in memory: 64 groups of 1,024 samples of 1,000 tokens."""

SCAN_BYTES = 1 << 22
"""Of neighbouring row groups that a scan fetches in one request; one at least."""

FOOTERS_KEPT = 64
"""Parts whose Parquet footer stays in memory."""


class SamplesTable:
    """The samples of a plan, in its order, whether or not their shards are committed."""

    def __init__(self, store: ObjectStore, plan: PlanRecord, disk_cache: DiskCache | None = None) -> None:
        """With a `disk_cache`, row groups are kept there once they have been read."""
        self._store, self._plan, self._disk_cache = store, plan, disk_cache
        self._first_samples = [part.first_sample for part in plan.parts]
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._footers: dict[int, Any] = {}
        self._num_kept_bytes = 0
        self._lock = threading.Lock()  # for what is kept; groups are read side by side

    def places(self) -> SampleIndex:
        """Where all samples stand and how long they are.

        Raises:
            CorruptionError: an index or a part is damaged, or points outside the plan's shards.
        """
        for part in self._plan.parts:
            size = part.object.size
            if part.index is None and part.num_samples > MAX_VALUES_PER_BYTE * size:
                path = f"{self._store.url}/{part.object.path}"
                raise CorruptionError(f"{path}: {part.num_samples} samples in {size} bytes, which no writer makes")
        return load_index(self._plan, self._places, where=self._store.url)

    def find(self, wanted: str) -> list[tuple[int, bytes]]:
        """(sample, key) of the samples whose key begins with these lower-case hex digits; looks at every key."""
        return find_key(wanted, ((part.first_sample, self._keys(part)) for part in self._plan.parts))

    def keys(self) -> npt.NDArray[np.void]:
        """The key of every sample, 16 bytes each."""
        parts = [self._keys(part).view("V16")[:, 0] for part in self._plan.parts]
        return np.concatenate([np.zeros(0, "V16"), *parts])

    def index(self) -> pa.Table:
        """All samples, without their tokens: the fixed columns and the corpus's own.

        Raises:
            CorruptionError: a part is damaged, lacks a column, or points outside the plan's shards.
        """
        fixed = pa.schema([f for f in SAMPLES_SCHEMA if f.name not in TOKEN_COLUMNS])
        tables = []
        for part in self._plan.parts:
            names = dict.fromkeys([*self.column_names(part), *fixed.names])  # so that one that is not there is missed
            tables.append(self._read_part(part, list(names)))
        try:
            table = pa.concat_tables(tables) if tables else fixed.empty_table()
        except pa.ArrowInvalid as e:
            raise CorruptionError(f"{self._store.url}: the parts of the samples table differ: {e}") from e
        sizes = np.asarray(self._plan.shard_num_rows, dtype=np.int64)
        check_inside_shards(_places_of(table), sizes, self._store.url)
        return table

    def column_names(self, part: PlanPart | None = None) -> list[str]:
        """The columns of `index`; of a part, its own."""
        if not self._plan.parts:
            return [name for name in SAMPLES_SCHEMA.names if name not in TOKEN_COLUMNS]
        record = (part or self._plan.parts[0]).object
        return _without_tokens(read_parquet_object(self._store, record).schema_arrow.names)

    def describe(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """The columns of `index` for these samples, one after the other."""
        found = []
        for sample in samples:
            table, row = self._group_of(sample)
            found += table.select(_without_tokens(table.column_names)).slice(row, 1).to_pylist()
        return found

    def key(self, sample: int) -> bytes:
        """The key of one sample."""
        table, row = self._group_of(sample)
        return bytes(table.column("key")[row].as_py())

    def tokens(self, sample: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(input_ids [L], target_positions [M]) of one sample of the plan."""
        table, row = self._group_of(sample)
        ids, ranges = (table.column(name)[row].values.to_numpy() for name in TOKEN_COLUMNS)
        return ids, target_positions(ranges)

    def groups_of(self, samples: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
        """(part, row group) of each sample, each once, in the order in which they are first needed."""
        part = np.searchsorted(self._first_samples, samples, side="right") - 1
        group = (samples - np.asarray(self._first_samples)[part]) // ROWS_PER_GROUP
        return list(dict.fromkeys(zip(part.tolist(), group.tolist(), strict=True)))

    def scan(self, names: Sequence[str], first: int = 0) -> Iterator[tuple[int, pa.Table]]:
        """(its first sample, these columns) of each row group, from that of the sample `first` on; nothing is kept.

        Raises:
            CorruptionError: a part is damaged.
        """
        for part in self._plan.parts[max(0, bisect.bisect_right(self._first_samples, first) - 1) :]:
            yield from self.scan_part(part, names, max(0, first - part.first_sample))

    def scan_part(
        self, part: PlanPart, names: Sequence[str] | None = None, first: int = 0
    ) -> Iterator[tuple[int, pa.Table]]:
        """As `scan`, of one part, from that of its sample `first` on; without names every column.

        Raises:
            CorruptionError: it is damaged, or has another number of samples than the plan says.
        """
        path = part.object.path
        objects = CommittedObjects(self._store, (part.object,))
        with _decoding(self._store, path):
            file = _open_parquet(objects, path)
        if file.metadata.num_rows != part.num_samples:
            found = f"{file.metadata.num_rows} samples, the plan says {part.num_samples}"
            raise CorruptionError(f"{self._store.url}/{path}: {found}")
        fetched = start = first // ROWS_PER_GROUP
        for group in range(start, -(-part.num_samples // ROWS_PER_GROUP)):
            if group == fetched:
                fetched = self._fetch(objects, file, path, group)
            yield part.first_sample + group * ROWS_PER_GROUP, self._decoded_group(file, part, group, names)

    def read_ahead(self, part: int, group: int) -> memoryview | None:
        """A row group in the disk cache, kept there while somebody has it (`DiskCache.get_ahead`)."""
        assert self._disk_cache is not None
        name, source = self._local_name(part, group), self._plan.parts[part].object.path
        return self._disk_cache.get_ahead(name, lambda: self._group_bytes(part, group), source=source)

    def __getstate__(self) -> dict[str, Any]:
        # What is kept in memory can be read again; a worker process need not be sent it.
        state = {**self.__dict__, "_groups": OrderedDict(), "_footers": {}, "_num_kept_bytes": 0}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _group_of(self, sample: int) -> tuple[pa.Table, int]:
        """The row group that holds a sample, and its row there."""
        if not 0 <= sample < self._plan.num_samples:
            raise IndexError(f"sample {sample} of a plan with {self._plan.num_samples}")
        part = bisect.bisect_right(self._first_samples, sample) - 1
        group, row = divmod(sample - self._first_samples[part], ROWS_PER_GROUP)
        return self._group(part, group), row

    def _group(self, part: int, group: int) -> pa.Table:
        """One row group of a part with all its columns, kept in memory while it is in use."""
        with self._lock:
            if (found := self._groups.get((part, group))) is not None:
                self._groups.move_to_end((part, group))
                return found
        if self._disk_cache is None:
            table = self._read_group(part, group)
        else:
            name, source = self._local_name(part, group), self._plan.parts[part].object.path
            data = self._disk_cache.get(name, lambda: self._group_bytes(part, group), source=source)
            table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        with self._lock:
            if (part, group) not in self._groups:  # another thread may have read it as well
                self._groups[part, group] = table
                self._num_kept_bytes += table.nbytes
            while self._num_kept_bytes > KEPT_BYTES and len(self._groups) > 1:
                self._num_kept_bytes -= self._groups.popitem(last=False)[1].nbytes
        return table

    def _read_group(self, part: int, group: int) -> pa.Table:
        record = self._plan.parts[part]
        path = record.object.path
        objects = CommittedObjects(self._store, (record.object,))
        with _decoding(self._store, path):
            file = _open_parquet(objects, path, self._footers.get(part))
            self._check_group(file, record, group)
            objects.fetch(path, *file.byte_range(group))
        table = self._decoded_group(file, record, group, None)
        self._footers[part] = file.metadata
        for old in list(self._footers)[:-FOOTERS_KEPT]:  # other threads may do the same
            self._footers.pop(old, None)
        return table

    def _check_group(self, file: BoundedParquet, part: PlanPart, group: int) -> None:
        """Of the metadata alone: nothing is allocated for more samples than a group may have."""
        expected = min(ROWS_PER_GROUP, part.num_samples - group * ROWS_PER_GROUP)
        found = file.metadata.row_group(group).num_rows if group < file.metadata.num_row_groups else 0
        if found != expected:
            where = f"{self._store.url}/{part.object.path}"
            raise CorruptionError(f"{where}: {found} samples in row group {group}, expected {expected}")

    def _fetch(self, objects: CommittedObjects, file: BoundedParquet, path: str, group: int) -> int:
        """Fetch this row group and so many behind it as `SCAN_BYTES` hold; returns the first that is not fetched."""
        with _decoding(self._store, path):
            start, stop = file.byte_range(group)
            while (group := group + 1) < file.metadata.num_row_groups:
                further = max(stop, file.byte_range(group)[1])
                if further - start > SCAN_BYTES:
                    break
                stop = further
            objects.fetch(path, start, stop)
        return group

    def _decoded_group(self, file: BoundedParquet, part: PlanPart, group: int, names: Sequence[str] | None) -> pa.Table:
        with _decoding(self._store, part.object.path):
            self._check_group(file, part, group)
            table = file.read_group(group, names).combine_chunks()
        _check_schema(table, f"{self._store.url}/{part.object.path}", names or SAMPLES_SCHEMA.names)
        return table

    def _group_bytes(self, part: int, group: int) -> list[Any]:
        table, sink = self._read_group(part, group), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return [sink.getvalue()]

    def _local_name(self, part: int, group: int) -> str:
        # The CRCs tell two parts apart that have one name in two caches.
        record = self._plan.parts[part].object
        return f"{fingerprint([record.path, record.size, list(record.block_crc32c)])[:32]}-{group:05d}.samples"

    def _places(self, part: PlanPart) -> Places:
        if part.index is None:
            return _places_of(self._read_part(part, PLACE_COLUMNS))
        objects = CommittedObjects(self._store, (part.index,))
        return parse_places(objects.get_range(part.index.path, 0, PLACE_BYTES * part.num_samples))

    def _keys(self, part: PlanPart) -> npt.NDArray[np.uint64]:
        """[n, 2], big-endian."""
        if part.index is None:
            data = b"".join(self._read_part(part, ("key",)).column("key").to_pylist())
        else:
            objects = CommittedObjects(self._store, (part.index,))
            data = objects.get_range(part.index.path, PLACE_BYTES * part.num_samples, part.index.size)
        return np.frombuffer(data, ">u8").reshape(-1, 2)

    def _read_part(self, part: PlanPart, names: Sequence[str]) -> pa.Table:
        """These columns of a whole part."""
        tables, left = [], max(MAX_BYTES_AT_ONCE, MAX_BYTES_PER_BYTE * part.object.size)
        for _, table in self.scan_part(part, names):
            tables.append(table)
            left -= table.nbytes
            if left < 0:
                where = f"{self._store.url}/{part.object.path}"
                raise CorruptionError(f"{where}: {part.object.size} bytes that unpack to more than any writer makes")
        return pa.concat_tables(tables)


def read_parquet_object(store: ObjectStore, record: ObjectRecord) -> BoundedParquet:
    """A committed parquet object, opened; every byte read from it is verified."""
    with _decoding(store, record.path):
        return _open_parquet(CommittedObjects(store, (record,)), record.path)


def read_vocabulary(store: ObjectStore, record: ObjectRecord, vocab_size: int) -> pa.Table:
    """The vocabulary, a row for each id.

    Raises:
        CorruptionError: it is damaged, or has more rows than ids.
    """
    objects = CommittedObjects(store, (record,))
    objects.fetch_all()  # it is small, and has hundreds of row groups
    with _decoding(store, record.path):
        file = _open_parquet(objects, record.path)
        if file.metadata.num_rows > vocab_size:
            raise CorruptionError(
                f"{store.url}/{record.path}: {file.metadata.num_rows} words, and there are {vocab_size} ids"
            )
        return file.read(VOCABULARY_SCHEMA.names).cast(VOCABULARY_SCHEMA)


def target_positions(target_ranges: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Where the target tokens stand, [M], from flattened half-open ranges, [2R]."""
    starts, stops = target_ranges[0::2], target_ranges[1::2]
    lengths = stops - starts
    before = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.asarray(np.repeat(starts, lengths) + np.arange(lengths.sum()) - before, dtype=np.int32)


def _open_parquet(objects: CommittedObjects, path: str, footer: Any = None) -> BoundedParquet:
    return BoundedParquet(lambda: VerifiedFile(objects, path), objects.size(path), footer)


def _without_tokens(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in TOKEN_COLUMNS]


def _places_of(table: pa.Table) -> Places:
    return tuple(table.column(name).to_numpy() for name in PLACE_COLUMNS)


def _check_schema(table: pa.Table, where: str, names: Sequence[str]) -> None:
    """The fixed columns among `names` are there and of their types."""
    for f in SAMPLES_SCHEMA:
        if f.name in names and (f.name not in table.column_names or table.schema.field(f.name).type != f.type):
            raise CorruptionError(f"{where}: samples table without a column {f.name!r} of {f.type}")


@contextmanager
def _decoding(store: ObjectStore, path: str) -> Iterator[None]:
    """What Parquet makes of bytes that are as committed but no samples or vocabulary table."""
    try:
        yield
    except LogitCacheError:
        raise
    except (pa.ArrowException, OSError, LookupError, ValueError) as e:
        raise CorruptionError(f"{store.url}/{path}: not the Parquet file it should be: {e}") from e
