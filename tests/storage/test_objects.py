"""What single stores promise beyond the conformance suite: atomic files, errors with names, forks and pickles."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import signal
import time
import uuid
from pathlib import Path

import pytest

from logitcache_storage import objects
from logitcache_storage.committed import CommittedObjects, block_checksums, object_record
from logitcache_storage.errors import CorruptionError, InputError, ObjectExistsError, ObjectNotFoundError, StoreError
from logitcache_storage.objects import open_store
from logitcache_storage.schema import BLOCK_BYTES, ObjectRecord


def crc32c(data: bytes) -> int:
    """Bit by bit, from RFC 3720 appendix B.4: reflected polynomial 0x82f63b78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_block_checksums() -> None:
    # The vectors of RFC 3720, appendix B.4.
    assert crc32c(b"123456789") == 0xE3069283
    assert block_checksums(bytes(32)) == (0x8A9136AA,)
    assert block_checksums(b"\xff" * 32) == (0x62A8AB43,)
    data = bytes(range(251)) * 1100
    assert BLOCK_BYTES == 262144 < len(data)
    assert block_checksums(data) == (crc32c(data[:262144]), crc32c(data[262144:]))
    assert block_checksums(b"") == ()


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_local_urls(tmp_path: Path, url: str) -> None:
    folder = tmp_path / "Käse und Öl [1] #2 日本"
    store = open_store(url.format(folder))
    store.create("a/b", b"1")
    assert (folder / "a" / "b").read_bytes() == b"1"
    assert store.list("") == ["a/b"]


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/cache").put("a", b"1")
    assert (tmp_path / "cache" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["Käse 日本", "with space", "br[ack]et*s"])
def test_roots_with_odd_names(store_location, name: str) -> None:
    store = open_store(f"{store_location.url}/{name}", store_location.storage_options)
    store.create("a/b", b"1")
    with pytest.raises(ObjectExistsError):
        store.create("a/b", b"2")
    assert (store.get("a/b"), store.get_many(["a/b", "a/b"]), store.list("a")) == (b"1", [b"1", b"1"], ["a/b"])
    assert store.get_range("a/b", 0, 1) == b"1"


def test_killed_writers_leave_no_half_written_file(tmp_path: Path) -> None:
    """A process is killed in the midst of writes, again and again; what has a name is whole."""
    store = open_store(str(tmp_path / "cache"))
    rng = random.Random(0)
    for round_ in range(12):
        child = os.fork()
        if child == 0:
            for n in range(1_000_000):
                body = os.urandom(1 << 20)
                data = hashlib.sha256(body).digest() + body
                store.put(f"put/{n % 5}", data)
                store.create(f"created/{round_}-{n}", data)
            os._exit(1)
        time.sleep(0.05 + 0.1 * rng.random())
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    names = store.list("")
    assert len(names) > 12
    for name in names:
        data = store.get(name)
        assert data[:32] == hashlib.sha256(data[32:]).digest(), name
        assert len(data) == 32 + (1 << 20)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(str(tmp_path))
    monkeypatch.setattr(objects.os, "fsync", fail)
    with pytest.raises(StoreError, match=r"commits/1\.json: .*the disk is full"):
        store.create("commits/1.json", b"1")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_local_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    store = open_store(str(tmp_path))
    with pytest.raises(ObjectNotFoundError, match="file/below"):
        store.get("file/below")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder"):
        store.get("folder")


def test_names_behind_links_are_listed_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".hidden.tmp").write_bytes(b"left by a killed writer")
    (tmp_path / "a" / "b").write_bytes(b"1")
    assert open_store(str(tmp_path)).list("a") == ["a/b"]


def test_unknown_protocol() -> None:
    with pytest.raises(StoreError, match=r"nothing://x: cannot be opened: .*nothing"):
        open_store("nothing://x")


def test_unreachable_server_is_a_store_error() -> None:
    pytest.importorskip("s3fs")
    options = {
        "key": "k",
        "secret": "s3cr3t",
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:9", "region_name": "us-west-2"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    store = open_store("s3://bucket/cache", options)
    store._fs.retries = 1
    with pytest.raises(StoreError, match=r"s3://bucket/cache/cache\.json") as e:
        store.get("cache.json")
    assert "s3cr3t" not in str(e.value)


def test_stores_survive_pickle(store_location) -> None:
    store = open_store(store_location.url, store_location.storage_options)
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"


def test_stores_survive_fork(store_location) -> None:
    store = open_store(store_location.url, store_location.storage_options)
    store.put("a", b"1")
    assert store.get("a") == b"1"
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        ok = False
        try:
            ok = store.get("a") == b"1" and store.get_many(["a", "a"]) == [b"1", b"1"]
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("a") == b"1"


def test_objects_that_no_commit_lists() -> None:
    with pytest.raises(CorruptionError, match="x/y: the commit lists no such object"):
        CommittedObjects(open_store("memory://nowhere"), []).get("x/y")


def test_fetched_objects_come_from_memory() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    contents = {"a": b"", "b": bytes(range(256)) * 2000, "c": b"1"}
    for path, data in contents.items():
        store.put(path, data)
    found = CommittedObjects(store, [object_record(path, data) for path, data in contents.items()])
    found.fetch_all()
    for path in contents:
        store.delete(path)
    assert {path: found.get(path) for path in found.paths} == contents
    assert found.get_range("b", 300_000, 300_005) == contents["b"][300_000:300_005]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (("../x", 0, ()), "must be relative"),
        (("/x", 0, ()), "must be relative"),
        (("x", -1, ()), "size must be >= 0"),
        (("x", 1, ()), "block_crc32c must be 1 checksums, got 0"),
        (("x", 0, (1,)), "block_crc32c must be 0 checksums, got 1"),
        (("x", BLOCK_BYTES, (1, 2)), "block_crc32c must be 1 checksums, got 2"),
        (("x", BLOCK_BYTES + 1, (1,)), "block_crc32c must be 2 checksums, got 1"),
    ],
)
def test_records_that_cannot_be(fields: tuple, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ObjectRecord(*fields)


@pytest.mark.parametrize("write", ["put", "create"])
def test_writing_into_a_bucket_that_is_not_there_says_so(s3_server, write: str) -> None:
    store = open_store("s3://no-such-bucket/cache", s3_server.storage_options)
    with pytest.raises(StoreError, match=r"no-such-bucket/cache/x\.json: cannot be written, there is no such bucket"):
        getattr(store, write)("x.json", b"{}")


def test_writing_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/x\.json: cannot be written"):
        open_store(str(tmp_path / "file")).create("x.json", b"{}")
