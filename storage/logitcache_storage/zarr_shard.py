"""A shard as a Zarr v3 group: one array per column, one Zarr shard per array, byte-shuffled zstd inside.

Any Zarr v3 reader opens `shards/<name>` as it stands. Inner chunks hold `CHUNK_ROWS` rows, so that one sample
costs a chunk and not the shard.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore

from logitcache_storage.committed import CommittedObjects
from logitcache_storage.encoding import Columns, column_types
from logitcache_storage.errors import CorruptionError

CHUNK_ROWS = 4096
ZSTD_LEVEL = 3


class ZarrShard:
    """See `ShardFormat`."""

    def write(self, columns: Columns, attributes: dict[str, Any]) -> dict[str, bytes]:
        """A group `zarr.json`, and `<column>/zarr.json` and `<column>/c/0[/0]` for each column."""
        store = MemoryStore()
        group = zarr.create_group(store, attributes=attributes, zarr_format=3)
        for name, column in columns.items():
            num_rows, *rest = column.shape
            chunk = (min(CHUNK_ROWS, max(num_rows, 1)), *rest)
            shard = (-(-max(num_rows, 1) // chunk[0]) * chunk[0], *rest)
            group.create_array(
                name,
                data=column,
                chunks=chunk,
                shards=shard,
                filters=None,
                compressors=BloscCodec(cname="zstd", clevel=ZSTD_LEVEL, shuffle=BloscShuffle.shuffle),
                # All-zero chunks are written too: a missing object must always mean damage.
                config={"write_empty_chunks": True},
            )
        return {f"/{key}": value.to_bytes() for key, value in store._store_dict.items()}

    def read(self, objects: CommittedObjects, prefix: str, precision: str, rows: slice) -> Columns:
        """Each array is checked against the expected type before its rows are read."""
        group = zarr.open_group(_ReadOnlyStore(objects, prefix), mode="r", zarr_format=3)
        columns: Columns = {}
        for name, dtype in column_types(precision).items():
            array = group.get(name)
            if not isinstance(array, zarr.Array) or array.dtype != dtype:
                found = getattr(array, "dtype", type(array).__name__)
                raise CorruptionError(f"{prefix}/{name}: expected a Zarr array of {dtype}, found {found}")
            if array.ndim < 1 or array.shape[0] < rows.stop:
                raise CorruptionError(f"{prefix}/{name}: {array.shape} has no rows {rows.start} to {rows.stop}")
            columns[name] = np.asarray(array[rows])
        return columns


class _ReadOnlyStore(Store):  # type: ignore[misc]  # zarr is not followed by mypy
    """The objects of a commit as Zarr sees them: every byte it gets was verified."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, objects: CommittedObjects, prefix: str) -> None:
        super().__init__(read_only=True)
        self._objects = objects
        self._prefix = prefix

    def __eq__(self, other: object) -> bool:
        return self is other

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        path = f"{self._prefix}/{key}"
        # Zarr would take a missing or empty chunk for zeros.
        if "/c/" in path and self._objects.size(path) == 0:
            raise CorruptionError(f"{path}: an empty chunk, which no writer makes")
        if path not in self._objects:
            return None
        start, stop = _bounds(self._objects.size(path), byte_range)
        return prototype.buffer.from_bytes(self._objects.get_range(path, start, stop))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return f"{self._prefix}/{key}" in self._objects

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        for path in self._objects.paths:
            yield path.removeprefix(f"{self._prefix}/")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        names = {key.removeprefix(folder).split("/")[0] async for key in self.list_prefix(folder)}
        for name in sorted(names):
            yield name


def _bounds(size: int, byte_range: ByteRequest | None) -> tuple[int, int]:
    match byte_range:
        case RangeByteRequest(start=start, end=end):
            return start, end
        case OffsetByteRequest(offset=offset):
            return offset, size
        case SuffixByteRequest(suffix=suffix):
            return max(0, size - suffix), size
        case _:
            return 0, size
