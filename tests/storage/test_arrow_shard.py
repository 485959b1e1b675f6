"""An Arrow shard for other readers, and files that hold something else."""

from __future__ import annotations

import io
import itertools
import json
import re
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from logitcache_storage.arrow_shard import BATCH_ROWS, ArrowShard, VerifiedFile
from logitcache_storage.commit import read_rows
from logitcache_storage.committed import CommittedObjects, put_object
from logitcache_storage.encoding import encode
from logitcache_storage.errors import CorruptionError
from logitcache_storage.objects import open_store
from logitcache_storage.schema import ShardRecord
from logitcache_storage.testing import FlakyStore, make_identity, make_topk

IDENTITY = make_identity(container="arrow", k=3, vocab_size=100_000)
TOPK = make_topk(BATCH_ROWS + 2, 3, 40)
COLUMNS = encode(TOPK, "u8", "split")
PATH = "shards/00000-0123456789abcdef.arrow"


def test_any_arrow_reader_opens_it() -> None:
    data = ArrowShard().write(COLUMNS, {"shard": 3})[".arrow"]
    with pa.ipc.open_file(data) as file:
        assert [file.get_batch(i).num_rows for i in range(file.num_record_batches)] == [BATCH_ROWS, 2]
        assert json.loads(file.schema.metadata[b"logitcache"]) == {"shard": 3}
        table = file.read_all()
    assert [str(field.type) for field in table.schema] == [
        "fixed_size_list<item: uint16 not null>[3]",
        "fixed_size_list<item: uint8 not null>[3]",
        "fixed_size_list<item: uint8 not null>[3]",
        "int32",
        "float",
        "float",
    ]
    for name, column in COLUMNS.items():
        assert table.column(name).to_pylist() == column.tolist()


def read_file(table: pa.Table, num_rows: int | None = None) -> object:
    """Rows of a shard whose bytes are those of this table, under right checksums."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    store = open_store("memory://arrow-shard")
    item = put_object(store, PATH, sink.getvalue())
    rows = table.num_rows if num_rows is None else num_rows
    record = ShardRecord(0, "0123456789abcdef", rows, item.size, (item,), {}, 0.0, "", "")
    return read_rows(store, IDENTITY, record, slice(0, rows))


def arrow_columns(num_rows: int = 4) -> dict[str, pa.Array]:
    def array(column: np.ndarray) -> pa.Array:
        flat = pa.array(column[:num_rows].ravel())
        return flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])

    return {name: array(column) for name, column in COLUMNS.items()}


def test_the_file_that_is_changed_below_is_read_as_it_is() -> None:
    assert read_file(pa.table(arrow_columns())).equals(TOPK_READ)


TOPK_READ = read_file(pa.table(arrow_columns()))


@pytest.mark.parametrize(
    ("name", "column", "problem"),
    [
        ("ids_high", None, "no column 'ids_high'"),
        ("codes", pa.array([1, 2, 3, 4], pa.uint8()), "column 'codes'"),
        ("codes", pa.array([[0, 1, 2]] * 4, pa.list_(pa.uint8())), "column 'codes'"),
        ("codes", pa.array([[0, 1]] * 4, pa.list_(pa.uint8(), 2)), "column 'codes'"),
        ("codes", pa.array([[0, 1, 2], None, [0, 1, 2], [0, 1, 2]], pa.list_(pa.uint8(), 3)), "column 'codes'"),
        ("codes", pa.array([[0, None, 2]] * 4, pa.list_(pa.uint8(), 3)), "column 'codes'"),
        ("num_kept", pa.array([3, 3, None, 3], pa.int32()), "column 'num_kept'"),
        ("num_kept", pa.array(["a", "b", "c", "d"]), "column 'num_kept'"),
        ("log_tail", pa.array([-1.0] * 4), "column 'log_tail' .* expected float32"),
        ("ids_high", pa.array([[2, 0, 0]] * 4, pa.list_(pa.uint8(), 3)), r"ids outside \[0, 100000\)"),
    ],
)
def test_columns_of_another_kind(name: str, column: pa.Array | None, problem: str) -> None:
    columns = arrow_columns()
    columns = {n: column if n == name else c for n, c in columns.items() if n != name or column is not None}
    with pytest.raises(CorruptionError, match=f"{PATH.removesuffix('.arrow')}.*{problem}"):
        read_file(pa.table(columns))


def test_fewer_rows_than_the_record_says() -> None:
    with pytest.raises(CorruptionError, match=r"rows of shape \(4, 3\), expected \(5, 3\)"):
        read_file(pa.table(arrow_columns()), 5)


def test_lengths_that_lie() -> None:
    """Of arrays in the metadata, and of buffers before compression in their first eight bytes: too large, too small."""
    good = ArrowShard().write(COLUMNS, {})[".arrow"]
    store = open_store("memory://arrow-shard")
    places = [match.start() for match in re.finditer(re.escape((BATCH_ROWS * 3).to_bytes(8, "little")), good)]
    assert len(places) >= 4  # lengths of arrays and of buffers, of both columns of bytes
    for place, length in itertools.product(places, (1 << 60, 1 << 31, 1)):
        data = good[:place] + length.to_bytes(8, "little") + good[place + 8 :]
        item = put_object(store, PATH, data)
        record = ShardRecord(0, "0123456789abcdef", len(TOPK), item.size, (item,), {}, 0.0, "", "")
        with pytest.raises(CorruptionError, match=r"not the arrow shard it should be|batch 0 unpacks to"):
            read_rows(store, IDENTITY, record, slice(0, len(TOPK)))


def test_some_rows_take_two_requests() -> None:
    """The end, which says where batches stand, and the batches: a remote store takes its time for each."""

    class Watched(FlakyStore):
        asked: ClassVar[list[tuple[int, int]]] = []

        def get_range(self, path: str, start: int, stop: int) -> bytes:
            self.asked.append((start, stop))
            return self._store.get_range(path, start, stop)

    store = Watched(open_store("memory://arrow-requests"), set())
    rng = np.random.default_rng(0)
    columns = {"ids": rng.integers(1 << 16, size=(5 * BATCH_ROWS, 20), dtype=np.uint16)}
    types = {"ids": np.dtype((np.uint16, (20,)))}
    item = put_object(store, PATH, ArrowShard().write(columns, {})[".arrow"])
    objects = CommittedObjects(store, [item])
    rows = slice(2 * BATCH_ROWS - 3, 2 * BATCH_ROWS + 3)
    found = ArrowShard().read(objects, PATH.removesuffix(".arrow"), types, 5 * BATCH_ROWS, rows)
    assert np.array_equal(found["ids"], columns["ids"][rows])
    assert len(store.asked) == 2 and sum(stop - start for start, stop in store.asked) < 0.9 * item.size


def test_a_verified_file_is_a_file() -> None:
    store = open_store("memory://arrow-file")
    objects = CommittedObjects(store, [put_object(store, "shards/y", bytes(range(100)))])
    file = VerifiedFile(objects, "shards/y")
    assert file.readable() and file.seekable() and file.read(3) == b"\0\1\2" and file.tell() == 3
    assert file.seek(-2, io.SEEK_END) == 98 and file.read() == b"bc" and file.read(5) == b""
    assert file.seek(10) == 10 and file.seek(5, io.SEEK_CUR) == 15 and file.seek(-50) == 0
    buffer = bytearray(4)
    assert file.readinto(buffer) == 4 and buffer == b"\0\1\2\3"
