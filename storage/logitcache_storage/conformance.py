"""What every object store and every shard format must pass; needs pytest.

Inherit and give the fixture `store`, an `ObjectStore` with nothing in it:

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self, tmp_path): ...
"""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest

from logitcache_storage.commit import commit_shard, create_or_continue, read_rows
from logitcache_storage.committed import CommittedObjects, object_record
from logitcache_storage.encoding import decode, encode
from logitcache_storage.errors import CorruptionError, InputError, ObjectExistsError, ObjectNotFoundError
from logitcache_storage.id_layouts import default_id_layout
from logitcache_storage.objects import ObjectStore
from logitcache_storage.schema import BLOCK_BYTES, CONTAINERS, ID_LAYOUTS, PRECISIONS, CacheIdentity, ShardRecord
from logitcache_storage.testing import make_identity, make_topk
from logitcache_storage.topk import TopKLogProbs

HOSTILE_PATHS = (
    "",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "a/",
    "./a",
    "a/./b",
    ".hidden",
    "a\\..\\b",
    "a\x00b",
    "a\nb",
    "a?b",
    "a*",
    "a b",
    "~/a",
    "s3://bucket/a",
    "ä",
)
"""Paths that could leave a cache's folder, or that some store reads in a way of its own."""

ROW_EDGES = (0, 1, 4095, 4096, 4097, 8191, 8192, 8193)
"""Rows where chunks and batches begin and end, and their neighbours."""

ENCODINGS = sorted(
    {(container, precision, default_id_layout(container, 1)) for container in CONTAINERS for precision in PRECISIONS}
    | {(container, "u8", layout) for container in CONTAINERS for layout in ID_LAYOUTS}
)
"""(container, precision, id layout): what new caches are made of, and every layout in every container."""


class StoreConformance:
    """An object store that a cache can be kept on."""

    def test_reads_what_was_put(self, store: ObjectStore) -> None:
        """Bytes come back as they went in."""
        for name, data in {"a": b"one", "deep/er/b": bytes(range(256)) * 3, "empty": b""}.items():
            store.put(name, data)
            assert store.get(name) == data

    def test_put_replaces(self, store: ObjectStore) -> None:
        """Also by something shorter, and by nothing."""
        for data in (b"a long first version", b"short", b""):
            store.put("x", data)
            assert store.get("x") == data

    def test_create_never_replaces(self, store: ObjectStore) -> None:
        """Whether the first was created or put, and even when it is empty."""
        store.create("x/created", b"1")
        store.put("x/put", b"1")
        store.create("x/empty", b"")
        for name, data in {"x/created": b"1", "x/put": b"1", "x/empty": b""}.items():
            with pytest.raises(ObjectExistsError, match=name):
                store.create(name, b"2")
            assert store.get(name) == data
        store.delete("x/created")
        store.create("x/created", b"3")
        assert store.get("x/created") == b"3"

    def test_of_racing_creators_one_wins(self, store: ObjectStore) -> None:
        """And what it wrote is what stays."""
        winners: list[int] = []
        barrier = threading.Barrier(8)

        def create(i: int) -> None:
            barrier.wait()
            try:
                store.create("race", b"%d" % i * 1000)
                winners.append(i)
            except ObjectExistsError:
                pass

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert store.get("race") == b"%d" % winners[0] * 1000

    def test_missing_objects_are_named(self, store: ObjectStore) -> None:
        """By every way of reading."""
        store.put("there", b"1")
        for read in (
            lambda: store.get("not/there"),
            lambda: store.get_range("not/there", 0, 1),
            lambda: store.get_many(["there", "not/there"]),
        ):
            with pytest.raises(ObjectNotFoundError, match="not/there"):
                read()

    def test_ranges(self, store: ObjectStore) -> None:
        """Half-open, cut at the end of the object."""
        data = bytes(range(256)) * 5
        store.put("x", data)
        edges = (0, 1, 255, 256, 1279, 1280, 1281, 5000)
        for start in edges:
            for stop in edges:
                assert store.get_range("x", start, stop) == data[start:stop], (start, stop)

    def test_many_are_in_order(self, store: ObjectStore) -> None:
        """As asked, repeated or not, empty or not."""
        contents = {f"many/{i:02d}": b"%d" % i * (i % 3) for i in range(40)}
        for name, data in contents.items():
            store.put(name, data)
        wanted = [*reversed(contents), *list(contents)[:3]]
        assert store.get_many(wanted) == [contents[name] for name in wanted]
        assert store.get_many(["many/07"]) == [contents["many/07"]]
        assert store.get_many([]) == []

    def test_list(self, store: ObjectStore) -> None:
        """A folder is a folder, not a prefix of names; new objects are listed at once."""
        assert store.list("commits") == []
        for name in ("commits/00001.json", "commits/00000.json", "commits/a/b", "commits-old/x", "commit"):
            store.put(name, b"1")
            assert name in store.list("")
        assert store.list("commits") == ["commits/00000.json", "commits/00001.json", "commits/a/b"]
        store.delete("commits/00000.json")
        assert store.list("commits") == ["commits/00001.json", "commits/a/b"]

    def test_delete(self, store: ObjectStore) -> None:
        """Once or twice."""
        store.put("x/y", b"1")
        store.delete("x/y")
        with pytest.raises(ObjectNotFoundError):
            store.get("x/y")
        store.delete("x/y")
        store.delete("never/was")

    def test_refuses_hostile_paths(self, store: ObjectStore) -> None:
        """In every operation, before anything is read or written."""
        for path in HOSTILE_PATHS:
            for operate in (store.get, store.delete, lambda p: store.get_many([p]), lambda p: store.get_range(p, 0, 1)):
                with pytest.raises(InputError, match="must be relative"):
                    operate(path)
            for write in (store.put, store.create):
                with pytest.raises(InputError, match="must be relative"):
                    write(path, b"1")
        for prefix in HOSTILE_PATHS[1:]:
            with pytest.raises(InputError, match="must be relative"):
                store.list(prefix)

    def test_verified_ranges(self, store: ObjectStore) -> None:
        """Whole blocks are read and checked, whatever is asked for."""
        data = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 77)
        record = object_record("shards/x", data)
        store.put("shards/x", data)
        edges = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, len(data) - 1, len(data))
        for start in edges:
            for stop in (stop for stop in edges if stop >= start):
                found = CommittedObjects(store, [record]).get_range("shards/x", start, stop)
                assert found == data[start:stop], (start, stop)

    def test_cut_and_changed_objects_are_damage(self, store: ObjectStore) -> None:
        """Cut at a block's edge, too; a changed block only where it is read."""
        data = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 77)
        record = object_record("shards/x", data)
        for size in (0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES, len(data) - 1):
            store.put("shards/x", data[:size])
            _expect_damage(store, record.path, CommittedObjects(store, [record]), len(data) - 1, len(data))
        changed = bytearray(data)
        changed[BLOCK_BYTES] ^= 1
        store.put("shards/x", bytes(changed))
        objects = CommittedObjects(store, [record])
        _expect_damage(store, record.path, objects, BLOCK_BYTES - 1, BLOCK_BYTES + 2)
        assert objects.get_range("shards/x", 0, BLOCK_BYTES) == data[:BLOCK_BYTES]
        store.delete("shards/x")
        _expect_damage(store, record.path, CommittedObjects(store, [record]), 0, 1)


@pytest.mark.parametrize("encoding", ENCODINGS, ids="-".join)
class ShardConformance:
    """A shard format that keeps every column to the last bit, in whole and in parts."""

    @pytest.mark.parametrize(
        ("num_rows", "k"), [(0, 3), (1, 1), (5, 97), (4095, 2), (4096, 1), (4097, 3)], ids=lambda v: str(v)
    )
    def test_round_trip(self, store: ObjectStore, encoding: tuple[str, str, str], num_rows: int, k: int) -> None:
        """One row, no row, one id, the whole vocabulary, and around the size of a chunk."""
        identity, expected, record = _written(store, encoding, num_rows, k)
        found = read_rows(store, identity, record, slice(0, num_rows))
        assert found.equals(expected)
        assert (record.num_rows, record.num_bytes) == (num_rows, sum(item.size for item in record.objects))

    def test_partial_reads(self, store: ObjectStore, encoding: tuple[str, str, str]) -> None:
        """Rows from each edge to each later one, and no rows."""
        identity, expected, record = _written(store, encoding, ROW_EDGES[-1], 2)
        pairs = [*pairwise(ROW_EDGES), (0, 4096), (1, 8192), (4095, 8193), (4096, 4096), (0, 8193)]
        for start, stop in pairs:
            found = read_rows(store, identity, record, slice(start, stop))
            assert found.equals(expected[start:stop]), (start, stop)

    def test_rows_past_the_end_are_damage(self, store: ObjectStore, encoding: tuple[str, str, str]) -> None:
        """Rows that the shard does not have."""
        identity, _, record = _written(store, encoding, 3, 2)
        with pytest.raises(CorruptionError, match="shards/00000"):
            read_rows(store, identity, record, slice(0, 4))


def _written(
    store: ObjectStore, encoding: tuple[str, str, str], num_rows: int, k: int
) -> tuple[CacheIdentity, TopKLogProbs, ShardRecord]:
    """The identity of a cache of one shard, the rows that must be read from it, and its record."""
    vocab_size = 97
    container, precision, layout = encoding
    identity = make_identity(
        container=container, precision=precision, id_layout=layout, k=k, vocab_size=vocab_size, shard_rows=9000
    )
    create_or_continue(store, identity)
    labels = np.random.default_rng(1).integers(vocab_size, size=num_rows).astype(np.int32)
    topk = make_topk(num_rows, k, vocab_size, labels=labels).keep_mass(0.999)
    record = commit_shard(store, identity, 0, topk, labels, seconds=0.0, worker="test")
    return identity, decode(encode(topk, precision, layout), precision, layout), record


def _expect_damage(store: ObjectStore, path: str, objects: CommittedObjects, start: int, stop: int) -> None:
    for read in (lambda: objects.get_range(path, start, stop), lambda: objects.get(path), objects.fetch_all):
        with pytest.raises(CorruptionError, match=path):
            read()
