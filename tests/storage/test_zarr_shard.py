"""A Zarr shard byte by byte: other readers open it, ours asks for little, and bytes that lie are refused."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from logitcache_storage.committed import CommittedObjects, put_object
from logitcache_storage.encoding import column_types, encode
from logitcache_storage.errors import CorruptionError
from logitcache_storage.objects import LocalStore, ObjectStore, open_store
from logitcache_storage.schema import BLOCK_BYTES
from logitcache_storage.testing import make_topk
from logitcache_storage.zarr_shard import CHUNK_ROWS, ZarrShard

K = 3
TYPES = column_types("u8", "ascending", K)
CHUNK = "/ids/c/0/0"


def columns_of(num_rows: int) -> dict[str, np.ndarray]:
    return encode(make_topk(num_rows, K, 40), "u8", "ascending")


def written(store: ObjectStore, columns: dict[str, np.ndarray]) -> CommittedObjects:
    files = ZarrShard().write(columns, {"shard": 0})
    return CommittedObjects(store, [put_object(store, "shards/x" + suffix, data) for suffix, data in files.items()])


def read(objects: CommittedObjects, num_rows: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    return ZarrShard().read(objects, "shards/x", TYPES, num_rows, slice(0, num_rows) if rows is None else rows)


def pipelines() -> list[object]:
    marks = [] if importlib.util.find_spec("zarrs") else [pytest.mark.skip(reason="zarrs is not installed")]
    own = "zarr.core.codec_pipeline.BatchedCodecPipeline"
    return [pytest.param(own, id="zarr"), pytest.param("zarrs.ZarrsCodecPipeline", id="zarrs", marks=marks)]


@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS, CHUNK_ROWS + 1])
@pytest.mark.parametrize("pipeline", pipelines())
def test_zarr_reads_the_same(tmp_path: Path, pipeline: str, num_rows: int) -> None:
    """With either codec pipeline; which one is set makes no difference to what we read."""
    columns = columns_of(num_rows)
    objects = written(LocalStore(str(tmp_path)), columns)
    with zarr.config.set({"codec_pipeline.path": pipeline, "codec_pipeline.strict": True}):
        group = zarr.open_group(str(tmp_path / "shards/x"), mode="r", zarr_format=3)
        found = read(objects, num_rows)
        for name, column in columns.items():
            assert np.array_equal(group[name][:], column), name
            assert np.array_equal(found[name], column) and found[name].dtype == column.dtype, name


class CountingStore(LocalStore):
    """A local store that notes the ranges it is asked for."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, int, int]] = []

    def get(self, path: str) -> bytes:
        data = super().get(path)
        self.asked.append((path, 0, len(data)))
        return data

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        self.asked.append((path, start, stop))
        return super().get_range(path, start, stop)


def test_one_sample_asks_for_its_blocks_alone(tmp_path: Path) -> None:
    num_rows = 40 * CHUNK_ROWS
    noise = np.random.default_rng(0).integers(2**31, size=(num_rows, K), dtype=np.int32)
    columns = {**{name: np.zeros(num_rows, dtype) for name, dtype in TYPES.items()}, "ids": noise}
    store = CountingStore(str(tmp_path))
    objects = written(store, columns)
    rows = slice(5 * CHUNK_ROWS - 7, 5 * CHUNK_ROWS + 9)
    assert np.array_equal(read(objects, num_rows, rows)["ids"], noise[rows])
    assert len(store.asked) == len(TYPES) + 1  # two for the ids, whose chunks stand before the block of the index
    asked = [stop - start for path, start, stop in store.asked if path.endswith(CHUNK)]
    assert sum(asked) <= 3 * BLOCK_BYTES < objects.size("shards/x" + CHUNK) / 2


def with_index(data: bytes, change: Callable[[list[int]], None]) -> bytes:
    """The object of a one-chunk array with another (offset, length) in its index, under a right checksum."""
    entry = list(struct.unpack("<2Q", data[-20:-4]))
    change(entry)
    index = struct.pack("<2Q", *entry)
    return data[:-20] + index + google_crc32c.value(index).to_bytes(4, "little")


def put_at(position: int, value: int) -> Callable[[list[int]], None]:
    return lambda entry: entry.__setitem__(position, value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "does not end with an index of 1 chunks"),
        (lambda data: data[-19:], "does not end with an index"),
        (lambda data: b"", "does not end with an index"),
        (lambda data: with_index(data, put_at(0, 2**64 - 1)), "lists a chunk outside"),
        (lambda data: with_index(data, put_at(1, 2**64 - 1)), "lists a chunk outside"),
        (lambda data: with_index(data, put_at(1, len(data) - 19)), "lists a chunk outside"),
        (lambda data: with_index(data, put_at(0, 1)), "lists a chunk outside"),
        (lambda data: with_index(data, put_at(1, 7)), "7 bytes that say they are 0 and hold 0"),
        (lambda data: with_index(data, put_at(1, len(data) - 21)), "2 rows of .* are 24"),
        (lambda data: data[:4] + struct.pack("<I", 2**31 - 1) + data[8:], "hold 2147483647; 2 rows of"),
        (lambda data: data[:12] + struct.pack("<I", 2**31 - 1) + data[16:], "say they are 2147483647"),
        (lambda data: data[:8] + struct.pack("<I", 2**31 - 1) + data[12:], None),
        (lambda data: bytes([data[0] ^ 0xFF]) + data[1:], None),
    ],
)
def test_bytes_that_lie(change: Callable[[bytes], bytes], problem: str | None) -> None:
    """Behind right checksums: what only the commit record's writer could have done."""
    store = open_store("memory://zarr-shard")
    objects = written(store, columns_of(2))
    record = put_object(store, "shards/x" + CHUNK, change(store.get("shards/x" + CHUNK)))
    others = [put_object(store, path, store.get(path)) for path in objects.paths if path != record.path]
    with pytest.raises(CorruptionError if problem else (RuntimeError, ValueError), match=problem):
        read(CommittedObjects(store, [record, *others]), 2)


def test_more_rows_than_there_are_chunks() -> None:
    """A hostile number of rows is an error before it is memory."""
    objects = written(open_store("memory://zarr-rows"), columns_of(2))
    with pytest.raises(CorruptionError, match="index of 524288 chunks"):
        read(objects, 2**31 - 1)
    with pytest.raises(CorruptionError, match="2 rows, asked for rows 1 to 3"):
        read(objects, 2, slice(1, 3))
