"""What single stores promise beyond the conformance suite: atomic files, errors with names, forks and pickles."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest

from logitcache_storage import objects
from logitcache_storage.errors import InputError, ObjectNotFoundError, StoreError
from logitcache_storage.objects import open_store


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


def test_writing_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/x\.json: cannot be written"):
        open_store(str(tmp_path / "file")).create("x.json", b"{}")


@pytest.mark.parametrize("end", ["/", "//"])
def test_a_slash_at_the_end_of_a_url_says_nothing(store_location, end: str) -> None:
    options = store_location.storage_options
    open_store(store_location.url + end, options).put("a/b", b"1")
    store = open_store(store_location.url, options)
    assert (store.list(""), store.list("a"), store.get("a/b")) == (["a/b"], ["a/b"], b"1")


@pytest.mark.parametrize(
    "url",
    [
        "sftp://me:hunter2@host/cache",
        "s3://key:hunter2@bucket/cache",
        "az://c/cache?sv=2024&sig=hunter2",
        "https://b.s3.amazonaws.com/cache?X-Amz-Signature=hunter2",
    ],
)
def test_secrets_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError, match=r"://\.\.\.: a URL stands in records and logs.*storage options") as e:
        open_store(url)
    assert "hunter2" not in str(e.value)
