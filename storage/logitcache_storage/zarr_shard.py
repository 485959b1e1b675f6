"""A shard as a Zarr v3 group: one array per column, one Zarr shard per array, byte-shuffled zstd inside.

Any Zarr v3 reader opens `shards/<name>` as it stands. Inner chunks hold `CHUNK_ROWS` rows, so that one sample
costs a chunk and not the shard.

The format leaves nothing for the metadata to say: types, shapes and chunks follow from the identity and from the number
of rows. So rows are read without it, from verified bytes straight into the array that is returned. Zarr's own pipelines
take several times as long, and zarrs, the fast one, reads files by itself, where no checksum would be between
(`storage/SPEC.md`, section 9).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.storage import MemoryStore

from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import CorruptionError
from logitcache_storage.id_layouts import Columns
from logitcache_storage.schema import BLOCK_BYTES

CHUNK_ROWS = 4096
COMPRESSION_LEVEL = 5
"""Of Blosc's zstd. 3 takes 1.5% more bytes, 9 takes 5% fewer and 20 times as long; decoding costs the same."""
MAX_BLOCK_BYTES = 1 << 24

_BLOSC_HEADER_BYTES = 16


class ZarrShard:
    """See `ShardFormat`."""

    def write(self, columns: Columns, attributes: dict[str, Any]) -> dict[str, bytes]:
        """A group `zarr.json`, and `<column>/zarr.json` and `<column>/c/0[/0]` for each column."""
        store = MemoryStore()
        group = zarr.create_group(store, attributes=attributes, zarr_format=3)
        for name, column in columns.items():
            num_rows, *rest = column.shape
            chunk = (_chunk_rows(num_rows), *rest)
            shard = (_num_chunks(num_rows) * chunk[0], *rest)
            group.create_array(
                name,
                data=column,
                chunks=chunk,
                shards=shard,
                filters=None,
                compressors=BloscCodec(
                    cname="zstd",
                    clevel=COMPRESSION_LEVEL,
                    shuffle=BloscShuffle.shuffle,
                    # One block, so that each byte plane of a chunk is long enough for statistics of its own.
                    blocksize=min(MAX_BLOCK_BYTES, int(np.prod(chunk)) * column.itemsize),
                ),
                # All-zero chunks are written too: a missing object must always mean damage.
                config={"write_empty_chunks": True},
            )
        return {f"/{key}": value.to_bytes() for key, value in store._store_dict.items()}

    def read(
        self,
        objects: CommittedObjects,
        prefix: str,
        types: Mapping[str, np.dtype[Any]],
        num_rows: int,
        rows: slice,
    ) -> Columns:
        """The index of each array, and the span of its chunks that hold the rows; of a whole shard all side by side."""
        paths = {name: f"{prefix}/{name}/c/0{'/0' * len(dtype.shape)}" for name, dtype in types.items()}
        for path in (f"{prefix}/zarr.json", *(f"{prefix}/{name}/zarr.json" for name in types)):
            if path not in objects:
                raise CorruptionError(f"{path}: the commit lists no such object, which other readers of Zarr need")
        if num_rows and (rows.start, rows.stop) == (0, num_rows):  # of no rows there are no chunks
            objects.fetch_all(paths.values())
        return {name: _read_array(objects, paths[name], dtype, num_rows, rows) for name, dtype in types.items()}


def _read_array(
    objects: CommittedObjects, path: str, row_type: np.dtype[Any], num_rows: int, rows: slice
) -> npt.NDArray[Any]:
    if rows.stop <= rows.start:
        return np.empty(0, row_type)
    if rows.stop > num_rows:
        raise CorruptionError(f"{path}: {num_rows} rows, asked for rows {rows.start} to {rows.stop}")
    chunk_rows = _chunk_rows(num_rows)
    first, last = rows.start // chunk_rows, -(-rows.stop // chunk_rows)
    chunks = _read_chunks(objects, path, _num_chunks(num_rows), slice(first, last))
    for number, chunk in enumerate(chunks, first):
        _check_size(chunk, chunk_rows, row_type, f"{path}: chunk {number}")
    column = np.empty(len(chunks) * chunk_rows, row_type)
    for chunk, out in zip(chunks, np.split(column, len(chunks)), strict=True):
        blosc.decompress(chunk, out)
    return column[rows.start - first * chunk_rows : rows.stop - first * chunk_rows]


def _read_chunks(objects: CommittedObjects, path: str, num_chunks: int, wanted: slice) -> list[memoryview]:
    """Neighbouring chunks of an array as they stand, by the index that ends its object: in two reads, or in one."""
    size, index_bytes = objects.size(path), 16 * num_chunks
    index_start = max(0, size - index_bytes - 4)
    # Blocks are read whole: what stands before the index in its first block comes with it.
    end_start = index_start - index_start % BLOCK_BYTES
    end = objects.get_range(path, end_start, size)
    index, checksum = end[index_start - end_start : -4], end[-4:]
    if google_crc32c.value(index).to_bytes(4, "little") != checksum or len(index) != index_bytes:
        raise CorruptionError(f"{path}: does not end with an index of {num_chunks} chunks")
    begin, length = np.frombuffer(index, "<u8").reshape(-1, 2)[wanted].T
    if ((begin > index_start) | (length > index_start - np.minimum(begin, index_start))).any():
        raise CorruptionError(f"{path}: its index lists a chunk outside its {size} bytes")
    start, stop = int(begin.min()), int((begin + length).max())
    in_end = start >= end_start
    data = memoryview(end if in_end else objects.get_range(path, start, stop))
    begin = begin - np.uint64(end_start if in_end else start)
    return [data[b : b + n] for b, n in zip(begin.tolist(), length.tolist(), strict=True)]


def _check_size(chunk: memoryview, num_rows: int, row_type: np.dtype[Any], where: str) -> None:
    """What a Blosc chunk says of itself: [4:8] bytes when decompressed, [12:16] bytes as it stands."""
    expected = num_rows * row_type.itemsize
    sizes = np.frombuffer(chunk[:_BLOSC_HEADER_BYTES], "<u4") if len(chunk) >= _BLOSC_HEADER_BYTES else [0] * 4
    if (sizes[1], sizes[3]) != (expected, len(chunk)):
        raise CorruptionError(
            f"{where}: {len(chunk)} bytes that say they are {sizes[3]} and hold {sizes[1]};"
            f" {num_rows} rows of {row_type} are {expected}"
        )


def _chunk_rows(num_rows: int) -> int:
    return min(CHUNK_ROWS, max(num_rows, 1))


def _num_chunks(num_rows: int) -> int:
    return max(1, -(-num_rows // CHUNK_ROWS))
