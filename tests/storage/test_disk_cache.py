"""The disk cache: one fill for all processes, a bound that holds, what dies or rots, and what is in use."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import disk_cache
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, InputError, StoreError

CHECKSUM = 4
FORK = multiprocessing.get_context("fork")


def content(name: str, size: int = 1000) -> bytes:
    return np.random.default_rng(list(name.encode())).bytes(size)


def counted(folder: Path, name: str, size: int = 1000, *, seconds: float = 0.0) -> Callable[[], list[bytes]]:
    """A fill that leaves a line for each call, in whatever process."""

    def fill() -> list[bytes]:
        with (folder / "fills.txt").open("a") as f:
            f.write(name + "\n")
        time.sleep(seconds)
        whole = content(name, size)
        return [whole[: size // 3], whole[size // 3 :]]

    return fill


def num_fills(folder: Path) -> int:
    return len((folder / "fills.txt").read_text().split()) if (folder / "fills.txt").exists() else 0


def names(cache: DiskCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock")


def num_bytes(cache: DiskCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def fetch(cache: DiskCache, folder: Path, name: str, size: int = 1000) -> memoryview:
    return cache.get(name, counted(folder, name, size), source="the test")


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "local", 10_000)


def test_what_was_fetched_is_fetched_once(tmp_path: Path, cache: DiskCache) -> None:
    for name in ("a", "b", "a", "b"):
        assert fetch(cache, tmp_path, name) == content(name)
    assert fetch(DiskCache(cache.folder, 10_000), tmp_path, "a") == content("a")
    assert num_fills(tmp_path) == 2
    assert names(cache) == ["a", "b"]


def test_the_least_recently_used_goes_first(tmp_path: Path, cache: DiskCache) -> None:
    for name in "abcdefghi":
        fetch(cache, tmp_path, name)
    assert num_bytes(cache) == 9 * (1000 + CHECKSUM)
    fetch(cache, tmp_path, "a")
    fetch(cache, tmp_path, "z", 2000)
    assert names(cache) == ["a", "d", "e", "f", "g", "h", "i", "z"]
    assert num_bytes(cache) <= 10_000


def test_what_is_in_use_is_never_evicted(tmp_path: Path, cache: DiskCache) -> None:
    used = fetch(cache, tmp_path, "used")
    array = np.frombuffer(used, np.uint8)[10:20]
    del used
    for i in range(30):
        fetch(cache, tmp_path, f"other{i}")
    assert "used" in names(cache)
    assert array.tobytes() == content("used")[10:20]
    assert not array.flags.writeable
    del array
    gc.collect()
    for i in range(30):
        fetch(cache, tmp_path, f"more{i}")
    assert "used" not in names(cache)
    assert num_bytes(cache) <= 10_000


def test_where_all_is_in_use_the_content_comes_back_all_the_same(tmp_path: Path, cache: DiskCache, caplog) -> None:
    held = [fetch(cache, tmp_path, f"held{i}") for i in range(9)]
    for name in ("one", "two"):
        assert fetch(cache, tmp_path, name) == content(name)
    assert caplog.text.count("no room") == 1
    assert cache.get_ahead("three", counted(tmp_path, "three"), source="") is None
    assert num_fills(tmp_path) == 12
    assert cache.get_ahead("four", counted(tmp_path, "four"), source="", num_bytes=1000) is None
    assert num_fills(tmp_path) == 12
    assert names(cache) == sorted(f"held{i}" for i in range(len(held)))


def test_ahead_is_there_when_it_is_asked_for(tmp_path: Path, cache: DiskCache) -> None:
    found = cache.get_ahead("a", counted(tmp_path, "a"), source="", num_bytes=1000)
    assert found == content("a") == fetch(cache, tmp_path, "a")
    assert cache.get_ahead("a", counted(tmp_path, "a"), source="") == content("a")
    assert num_fills(tmp_path) == 1


@pytest.mark.parametrize("damage", ["bit", "truncated", "extended", "empty", "other file"])
def test_a_damaged_file_is_fetched_again(tmp_path: Path, cache: DiskCache, damage: str, caplog) -> None:
    fetch(cache, tmp_path, "other")
    fetch(cache, tmp_path, "a")
    path = cache.folder / "a"
    data = path.read_bytes()
    changed = {
        "bit": data[:400] + bytes([data[400] ^ 4]) + data[401:],
        "truncated": data[:-7],
        "extended": data + b"more",
        "empty": b"",
        "other file": (cache.folder / "other").read_bytes(),
    }
    path.write_bytes(changed[damage])
    assert fetch(cache, tmp_path, "a") == content("a")
    assert num_fills(tmp_path) == 3
    assert path.read_bytes() == data
    assert f"{path} is damaged" in caplog.text


def test_a_disk_that_damages_everything_is_reported(tmp_path: Path, cache: DiskCache, monkeypatch) -> None:
    monkeypatch.setattr(disk_cache, "_mapped", lambda name, file: None)
    with pytest.raises(CorruptionError, match=r"local/a: other bytes than were fetched from s3://x, twice; check the"):
        cache.get("a", counted(tmp_path, "a"), source="s3://x")
    assert num_fills(tmp_path) == 2
    assert names(cache) == []


def test_an_error_of_the_source_leaves_nothing(tmp_path: Path, cache: DiskCache) -> None:
    def fails() -> list[bytes]:
        raise StoreError("no answer")

    for get in (cache.get, cache.get_ahead):
        with pytest.raises(StoreError, match="no answer"):
            get("a", fails, source="")
        assert names(cache) == []
    assert fetch(cache, tmp_path, "a") == content("a")


def test_threads_share_one_fetch(tmp_path: Path, cache: DiskCache) -> None:
    found: list[bytes] = []
    fill = counted(tmp_path, "a", seconds=0.1)
    threads = [threading.Thread(target=lambda: found.append(bytes(cache.get("a", fill, source="")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert cache.get_ahead("a", fill, source="") is None, "another one is at it"
    for thread in threads:
        thread.join()
    assert found == [content("a")] * 8
    assert num_fills(tmp_path) == 1


def _reader(folder: Path, bound: int, seed: int, failures) -> None:
    """Reads at random from a folder that holds a fifth of what there is; some of it stays in use for a while."""
    cache, rng = DiskCache(folder / "local", bound), np.random.default_rng(seed)
    held: list[tuple[str, memoryview]] = []
    for _ in range(150):
        name = f"n{rng.integers(20)}"
        if rng.random() < 0.3:
            found = cache.get_ahead(name, counted(folder, name), source="", num_bytes=1000)
        else:
            found = fetch(cache, folder, name)
        held = [*held, (name, found)][-2:] if found is not None else held
        if any(data != content(name) for name, data in held):
            failures.put(f"{name} is wrong")
        with cache._counting():
            total = num_bytes(cache)
        if total > bound:
            failures.put(f"{total} bytes")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_folder_and_its_bound(tmp_path: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    # Each of 4 processes holds 2 files and fetches a third: 12 always have room, and 20 do not.
    failures, bound = context.Queue(), 12 * (1000 + CHECKSUM)
    processes = [context.Process(target=_reader, args=(tmp_path, bound, seed, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert failures.empty(), failures.get()
    cache = DiskCache(tmp_path / "local", bound)
    assert not [name for name in names(cache) if name.endswith(".part")]
    assert 20 <= num_fills(tmp_path) < 4 * 150


def test_processes_that_read_the_same_order_fetch_each_once(tmp_path: Path) -> None:
    def read() -> None:
        cache = DiskCache(tmp_path / "local", 100_000)
        for i in range(20):
            name = f"n{i}"
            assert cache.get(name, counted(tmp_path, name, seconds=0.005), source="") == content(name)

    processes = [FORK.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert num_fills(tmp_path) == 20


@pytest.mark.parametrize("where", ["while it fetches", "while it writes"])
def test_a_process_that_is_killed_is_in_nobodys_way(tmp_path: Path, cache: DiskCache, where: str) -> None:
    def die() -> list[bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    def run() -> None:
        if where == "while it fetches":
            cache.get("a", die, source="")
        # Between the reservation and the name.
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        fetch(cache, tmp_path, "a", 6000)

    process = FORK.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert names(cache) == ["a.part"]
    # What it left does not count, even for others: its 6,000 bytes must go.
    fetch(cache, tmp_path, "b", 9000)
    assert fetch(cache, tmp_path, "a", 500) == content("a", 500)
    assert num_bytes(cache) <= 10_000 and "a.part" not in names(cache)


def test_who_waits_for_a_process_that_is_killed_takes_over(tmp_path: Path, cache: DiskCache) -> None:
    process = FORK.Process(target=lambda: cache.get("a", counted(tmp_path, "a", seconds=60), source=""))
    process.start()
    while not num_fills(tmp_path):
        time.sleep(0.01)
    threading.Timer(0.2, process.kill).start()
    assert fetch(cache, tmp_path, "a") == content("a")
    assert num_fills(tmp_path) == 2
    process.join()


def test_a_process_forked_in_mid_fetch_does_not_keep_the_lock(tmp_path: Path, cache: DiskCache) -> None:
    """It inherits the descriptor; the fetch fails, and others must be able to try."""
    children = []

    def fails() -> list[bytes]:
        children.append(FORK.Process(target=time.sleep, args=(30,)))
        children[0].start()
        raise StoreError("no answer")

    with pytest.raises(StoreError):
        cache.get("a", fails, source="")
    assert fetch(cache, tmp_path, "a") == content("a")
    children[0].kill()
    children[0].join()


def test_a_full_disk_is_no_error(tmp_path: Path, cache: DiskCache, monkeypatch, caplog) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for name in ("pwrite", "ftruncate"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            assert fetch(cache, tmp_path, name) == content(name)
            fill = counted(tmp_path, name)
            assert cache.get(name, fill, source="", num_bytes=1000) == content(name)
            assert cache.get_ahead(name, fill, source="", num_bytes=1000) is None
        assert names(cache) == []
    assert caplog.text.count("no room (its disk is full") == 1
    assert fetch(cache, tmp_path, "a") == content("a")
    assert names(cache) == ["a"]


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    """A file system of 64 KiB, where we may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64k tmpfs {folder} 2>/dev/null"):
        pytest.skip("mounting a file system takes root and CAP_SYS_ADMIN")
    try:
        cache = DiskCache(folder / "local", 10**9)
        for i in range(6):
            assert fetch(cache, tmp_path, f"n{i}", 20_000) == content(f"n{i}", 20_000)
        assert 1 <= len(names(cache)) <= 3
    finally:
        os.system(f"umount {folder}")


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_of_nothing(tmp_path: Path, bound: int) -> None:
    with pytest.raises(InputError, match=f"a local cache of {bound} bytes holds nothing"):
        DiskCache(tmp_path, bound)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"local cache .*file/local: Not a directory; give a folder"):
        DiskCache(tmp_path / "file" / "local", 10)


@pytest.mark.parametrize("name", ["", ".lock", "a/b", "..", "a.part", "a\n"])
def test_names_that_are_no_files_of_ours(tmp_path: Path, cache: DiskCache, name: str) -> None:
    with pytest.raises(InputError, match="is no name for a file in it"):
        fetch(cache, tmp_path, name)


def test_only_files_of_the_folder_are_touched(tmp_path: Path, cache: DiskCache) -> None:
    """Whatever else is there is not counted: a folder of its own, a link to somewhere."""
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(50_000))
    (cache.folder / "link").symlink_to(outside)
    (cache.folder / "folder").mkdir()
    for i in range(30):
        fetch(cache, tmp_path, f"n{i}")
    assert outside.stat().st_size == 50_000
    assert {"link", "folder"} <= set(names(cache))
