"""A shard as one Arrow IPC file: a record batch per `BATCH_ROWS` rows, compressed buffers.

Faster to read than Zarr and readable wherever Arrow is, at more bytes per row. [N, k] columns are fixed-size
lists.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import CorruptionError
from logitcache_storage.id_layouts import Columns
from logitcache_storage.schema import BLOCK_BYTES

BATCH_ROWS = 4096
COMPRESSION = "lz4"
MAX_PADDING = 2
"""A batch may unpack to so many times the bytes of its rows: more would be none of ours, and could fill the memory."""

_END_BYTES = 10
"""The length of the footer, and "ARROW1"."""


class ArrowShard:
    """See `ShardFormat`."""

    def write(self, columns: Columns, attributes: dict[str, Any]) -> dict[str, bytes]:
        """One object, `.arrow`; `attributes` stand as JSON in the schema's metadata under `logitcache`."""
        batch = pa.record_batch(
            [_to_arrow(column) for column in columns.values()],
            schema=pa.schema(
                [pa.field(name, _arrow_type(column), nullable=False) for name, column in columns.items()],
                metadata={"logitcache": json.dumps(attributes, sort_keys=True)},
            ),
        )
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=COMPRESSION)) as writer:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                writer.write_batch(batch.slice(start, BATCH_ROWS))
        return {".arrow": sink.getvalue()}

    def read(
        self,
        objects: CommittedObjects,
        prefix: str,
        types: Mapping[str, np.dtype[Any]],
        num_rows: int,
        rows: slice,
    ) -> Columns:
        """Only the record batches that hold the rows are read, in one piece; a whole shard from memory."""
        path = f"{prefix}.arrow"
        size, is_whole = objects.size(path), (rows.start, rows.stop) == (0, num_rows)
        objects.fetch(path, 0 if is_whole else max(0, size - 1) // BLOCK_BYTES * BLOCK_BYTES, size)
        source = pa.py_buffer(objects.get(path)) if is_whole else pa.PythonFile(VerifiedFile(objects, path), mode="r")
        # Without Arrow's threads: one that lets go of our bytes while the interpreter ends, ends the process.
        with pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
            first, last = rows.start // BATCH_ROWS, -(-rows.stop // BATCH_ROWS)
            blocks = _batch_blocks(objects, path)[first:last]
            if blocks and not is_whole:
                objects.fetch(path, min(block.start for block in blocks), max(block.stop for block in blocks))
            most = MAX_PADDING * BATCH_ROWS * sum(dtype.itemsize for dtype in types.values())
            for number, block in enumerate(blocks, first):
                if (found := _unpacked_bytes(objects, path, block)) > most:
                    raise CorruptionError(f"{path}: batch {number} unpacks to {found} bytes, expected at most {most}")
            table = pa.Table.from_batches([reader.get_batch(first + i) for i in range(len(blocks))], reader.schema)
        table.validate()  # that each array has the bytes that its length asks for
        table = table.slice(rows.start - first * BATCH_ROWS, rows.stop - rows.start).combine_chunks()
        return {name: _to_numpy(table, name, path) for name in types}


class VerifiedFile(io.RawIOBase):
    """A committed object as a seekable file, for readers that want one."""

    def __init__(self, objects: CommittedObjects, path: str) -> None:
        super().__init__()
        self._objects, self._path = objects, path
        self._size = objects.size(path)
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As io.RawIOBase.seek."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = min(max(0, base + offset), self._size)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Up to `size` verified bytes."""
        stop = self._size if size is None or size < 0 else min(self._size, self._position + size)
        data = self._objects.get_range(self._path, self._position, stop) if stop > self._position else b""
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """As io.RawIOBase.readinto."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Block(NamedTuple):
    """Where a record batch stands in its file."""

    start: int
    body: int
    """Where its buffers begin, behind what describes them."""
    stop: int


def _batch_blocks(objects: CommittedObjects, path: str) -> list[_Block]:
    """All record batches, from the footer: `Footer` in Arrow's File.fbs.

    Raises:
        CorruptionError: the footer lists what no writer of ours makes.
    """
    size = objects.size(path)
    (footer_bytes,) = struct.unpack("<i", objects.get_range(path, size - _END_BYTES, size)[:4])
    footer = _FlatTable.root(objects.get_range(path, max(0, size - _END_BYTES - footer_bytes), size - _END_BYTES))
    blocks = [_Block(at, at + about, at + about + body) for at, about, body in footer.structs(3, "<qi4xq")]
    if footer.structs(2, "<qi4xq") or any(not 0 <= at <= body <= stop <= size for at, body, stop in blocks):
        raise CorruptionError(f"{path}: its footer lists dictionaries, or batches outside its {size} bytes")
    return blocks


def _unpacked_bytes(objects: CommittedObjects, path: str, block: _Block) -> int:
    """Of all buffers of a batch, as each says of itself: `RecordBatch` and `BodyCompression` in Message.fbs."""
    data = objects.get_range(path, block.start, block.body)
    prefix = 8 if data[:4] == b"\xff\xff\xff\xff" else 4
    batch = _FlatTable.root(data[prefix:]).table(2)
    if not batch.has(3):  # not compressed
        return 0
    starts = (block.body + offset for offset, size in batch.structs(2, "<qq") if size)
    return sum(max(0, *struct.unpack("<q", objects.get_range(path, at, at + 8))) for at in starts)


class _FlatTable:
    """A table of a flatbuffer; Arrow has found it well-formed by the time that it is unpacked."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    @classmethod
    def root(cls, data: bytes) -> _FlatTable:
        """The table that the buffer is about."""
        return cls(data, *struct.unpack_from("<I", data))

    def has(self, field: int) -> bool:
        """Whether a field is there."""
        return bool(self._offset(field))

    def table(self, field: int) -> _FlatTable:
        """The table that a field leads to."""
        return _FlatTable(self._data, self._target(field))

    def structs(self, field: int, layout: str) -> list[tuple[int, ...]]:
        """The vector of structs that a field leads to; empty where it is not there."""
        if not self.has(field):
            return []
        at = self._target(field)
        (count,) = struct.unpack_from("<I", self._data, at)
        return list(struct.iter_unpack(layout, self._data[at + 4 : at + 4 + count * struct.calcsize(layout)]))

    def _offset(self, field: int) -> int:
        vtable = self._at - struct.unpack_from("<i", self._data, self._at)[0]
        (num_bytes,) = struct.unpack_from("<H", self._data, vtable)
        entry = 4 + 2 * field
        return int(struct.unpack_from("<H", self._data, vtable + entry)[0]) if entry < num_bytes else 0

    def _target(self, field: int) -> int:
        at = self._at + self._offset(field)
        return at + int(struct.unpack_from("<I", self._data, at)[0])


def _arrow_type(column: np.ndarray[Any, Any]) -> pa.DataType:
    item = pa.from_numpy_dtype(column.dtype)
    return item if column.ndim == 1 else pa.list_(pa.field("item", item, nullable=False), column.shape[1])


def _to_arrow(column: np.ndarray[Any, Any]) -> pa.Array:
    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), type=_arrow_type(column))


def _to_numpy(table: pa.Table, name: str, path: str) -> np.ndarray[Any, Any]:
    if name not in table.column_names:
        raise CorruptionError(f"{path}: no column {name!r}")
    chunked = table.column(name)
    column = chunked.chunk(0) if chunked.num_chunks else pa.array([], chunked.type)
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
    return np.asarray(column.to_numpy(zero_copy_only=False))
