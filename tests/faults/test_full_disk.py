"""A disk that is full: said so, nothing half-committed, and the same command goes on once there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import StoreError
from logitcache_storage.objects import open_store
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

SAMPLES, TOPKS = make_samples(40, k=30, vocab_size=50, seed=9, max_targets=60)
IDENTITY = make_identity(k=30, precision="fp32", container="arrow", shard_rows=200)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a part of the cache."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=180k", "none", folder]).returncode:
        pytest.skip("mounting a small disk takes the rights of root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_build_and_nothing_else(small_disk: Path, count_fault) -> None:
    folder = small_disk / "cache"
    with pytest.raises(StoreError, match=r"No space left on device; the disk is full"):
        write_cache(str(folder), SAMPLES, TOPKS, identity=IDENTITY)
    count_fault("disks full")
    assert verify_cache(str(folder), deep=True).is_intact
    assert not list(folder.rglob("*.tmp"))
    cache = Cache.open(str(folder))
    assert 0 < len(cache) < len(SAMPLES)
    assert all(cache[i].topk.equals(TOPKS[int(cache[i].source_id[5:]) - 1]) for i in range(len(cache)))

    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    before = {path: open_store(str(folder)).get(path) for path in open_store(str(folder)).list("commits")}
    write_cache(str(folder), SAMPLES, TOPKS, identity=IDENTITY)
    assert verify_cache(str(folder), deep=True).is_intact
    cache = Cache.open(str(folder))
    assert cache.is_complete
    assert all(sample.topk.equals(topk) for sample, topk in zip(cache, TOPKS, strict=True))
    assert {path: cache.store.get(path) for path in before} == before


def test_a_full_disk_under_the_local_cache_costs_speed_only(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, count_fault
) -> None:
    write_cache(str(tmp_path / "cache"), SAMPLES, TOPKS, identity=IDENTITY)
    cache = Cache.open(str(tmp_path / "cache"), disk_cache=DiskCache(small_disk / "local", 1 << 30))
    plain = Cache.open(str(tmp_path / "cache"))
    for shard in list(plain.shards) * 2:
        assert np.array_equal(cache.read_shard(shard).log_probs, plain.read_shard(shard).log_probs)
    assert "its disk is full" in caplog.text
    count_fault("disks full")
