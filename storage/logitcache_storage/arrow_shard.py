"""A shard as one Arrow IPC file: a record batch per `BATCH_ROWS` rows, compressed buffers.

Faster to read than Zarr and readable wherever Arrow is, at more bytes per row. [N, k] columns are fixed-size
lists.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import CorruptionError
from logitcache_storage.id_layouts import Columns

BATCH_ROWS = 4096
COMPRESSION = "lz4"


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
        """Only the record batches that hold the rows are read; of a whole shard, from one piece of memory."""
        path = f"{prefix}.arrow"
        is_whole = (rows.start, rows.stop) == (0, num_rows)
        source = pa.py_buffer(objects.get(path)) if is_whole else pa.PythonFile(VerifiedFile(objects, path), mode="r")
        with pa.ipc.open_file(source) as reader:
            first, last = rows.start // BATCH_ROWS, -(-rows.stop // BATCH_ROWS)
            batches = [reader.get_batch(i) for i in range(first, min(last, reader.num_record_batches))]
            table = pa.Table.from_batches(batches, reader.schema)
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
