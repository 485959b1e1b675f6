"""Damaged bytes anywhere in a cache: every read refuses, or gives exactly what was written."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.commit import load_quarantine, quarantine_shard
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, LogitCacheError, MismatchError
from logitcache_storage.objects import open_store
from logitcache_storage.sample_statistics import read_statistics
from logitcache_storage.schema import STATISTICS_SUFFIX
from logitcache_storage.testing import extend_cache, make_identity, make_samples, write_cache

NUM_DAMAGES = {"zarr": 400, "arrow": 850}
"""For each container, with and without a manifest; more than 2,000 of them are flipped bits and truncations."""
NUM_LOCAL_DAMAGES = 200

IDENTITIES = {name: make_identity(container=name, k=4, precision="u8", shard_rows=24) for name in ("zarr", "arrow")}


def kind_of(path: str) -> str:
    """Objects that are read in the same way."""
    parts = path.split("/")
    if parts[0] == "shards" and len(parts) > 2:
        return f"shards/*/{'zarr.json' if path.endswith('zarr.json') else 'c'}"
    if path.endswith(STATISTICS_SUFFIX):
        return f"shards/*{STATISTICS_SUFFIX}"
    return parts[0] if len(parts) == 1 else f"{parts[0]}/*"


def damaged(data: bytes, rng: np.random.Generator) -> tuple[str, bytes | None]:
    """One random damage: a bit, an end that is missing, bytes that are too many, nothing at all."""
    kind = str(rng.choice(["flipped bit"] * 12 + ["truncated"] * 6 + ["extended", "missing", "zeroed"]))
    if kind == "flipped bit":
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        return kind, bytes(changed)
    if kind == "truncated":
        return kind, data[: rng.integers(len(data))]
    if kind == "extended":
        return kind, data + rng.bytes(int(rng.integers(1, 20)))
    return kind, None if kind == "missing" else bytes(len(data))


def everything_of(url: str) -> list[list[object]]:
    """All that a reader can ask of a cache; each part is read even when the part before was refused."""

    def parts():
        cache = Cache.open(url)
        yield lambda: [cache.identity, cache.plan, sorted(cache.shards.items()), cache.samples.to_pylist()]
        yield lambda: [(ids.tolist(), positions.tolist()) for ids, positions in cache.read_tokens(range(len(cache)))]
        yield lambda: [sample.topk.log_probs.tolist() + sample.topk.ids.tolist() for sample in cache]
        for shard in sorted(cache.shards):
            yield lambda shard=shard: [cache.read_shard(shard).ids.tolist()]
            yield lambda shard=shard: statistics_of(cache, shard)
        yield lambda: [cache.vocabulary.decode(range(50))]
        yield lambda: [load_quarantine(cache.store)]

    return [part() if part else [] for part in parts()]


def statistics_of(cache: Cache, shard: int) -> list[object]:
    found = read_statistics(cache, cache.shards[shard])
    return [] if found is None else [found.counts.tolist(), *(column.tolist() for column in found.columns.values())]


def outcome_of(url: str, path: str, what: str, data: bytes | None, expected: list[list[object]]) -> str:
    """Damage one object and read everything: "refused" by the object's name, or the "same" as ever."""
    store = open_store(url)
    original = store.get(path)
    store.delete(path) if data is None else store.put(path, data)
    try:
        found = everything_of(url)
    except LogitCacheError as e:
        if data is not None:
            assert isinstance(e, CorruptionError | MismatchError), f"{what} in {path}: {e!r}"
            assert path in str(e), f"{what} in {path}: {e}"
        return "refused"
    else:
        is_gone = data is None and path.split("/")[0] in ("manifest.json", "commits", "quarantine", "plans")
        assert found == expected or is_gone, f"{what} in {path}"
        return "same"
    finally:
        store.put(path, original)


@pytest.mark.parametrize("finished", [True, False], ids=["manifest", "commits"])
@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_no_damage_is_read(container: str, finished: bool, count_fault) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store = open_store(url)
    write_cache(store, *make_samples(6, k=4, vocab_size=50, seed=2), identity=IDENTITIES[container])
    extend_cache(store, *make_samples(2, k=4, vocab_size=50, seed=3))
    if not finished:
        store.delete("manifest.json")
        store.delete("manifest.parquet")
    quarantine_shard(store, 99, ["made up"])
    expected = everything_of(url)
    rng = np.random.default_rng([finished, len(container)])
    by_kind: dict[str, list[str]] = {}
    for path in store.list(""):
        by_kind.setdefault(kind_of(path), []).append(path)
    refused = set()
    for n in range(NUM_DAMAGES[container]):
        kind = sorted(by_kind)[n % len(by_kind)]
        path = str(rng.choice(by_kind[kind]))
        what, data = damaged(store.get(path), rng)
        outcome = outcome_of(url, path, what, data, expected)
        count_fault(f"{what} in a cache: {outcome}")
        refused |= {kind} if outcome == "refused" else set()
    # Of the manifest and the commit records either is enough; what a zarr.json says, our reader knows.
    repeated = {"commits/*", "manifest.json", "manifest.parquet"} if finished else set()
    assert refused >= by_kind.keys() - repeated - {"shards/*/zarr.json"}
    assert everything_of(url) == expected


def test_damage_on_the_local_disk_is_fetched_again(tmp_path: Path, count_fault) -> None:
    """Whatever is damaged there, what is read is what was written, and the file is whole again afterwards."""

    def read() -> list[list[object]]:
        cache = Cache.open(url, disk_cache=DiskCache(tmp_path, 1 << 20))
        rows = [cache.read_shard(shard).log_probs.tolist() for shard in cache.shards]
        return [rows, [ids.tolist() for ids, _ in cache.read_tokens(range(len(cache)))]]

    url = f"memory://{uuid.uuid4().hex}"
    write_cache(url, *make_samples(6, k=4, vocab_size=50, seed=2), identity=IDENTITIES["arrow"])
    expected = read()
    files = sorted(path for path in tmp_path.iterdir() if path.stat().st_size)
    assert {path.suffix for path in files} == {".rows", ".samples"}
    rng = np.random.default_rng(0)
    for n in range(NUM_LOCAL_DAMAGES):
        path = files[n % len(files)]
        original = path.read_bytes()
        what, data = damaged(original, rng)
        path.unlink() if data is None else path.write_bytes(data)
        assert read() == expected, f"{what} in {path.name}"
        assert path.read_bytes() == original
        count_fault(f"{what} on the local disk: fetched again")


def test_damage_is_named_with_its_remedy(tmp_path) -> None:
    write_cache(str(tmp_path), *make_samples(6, k=4, vocab_size=50, seed=2), identity=IDENTITIES["zarr"])
    path = next(tmp_path.glob("shards/00000-*/ids/c/0/0"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    cache = Cache.open(str(tmp_path))
    with pytest.raises(LogitCacheError) as e:
        cache.read_shard(0)
    message = str(e.value)
    assert path.relative_to(tmp_path).as_posix() in message
    for part in ("crc32c 0x", "in block 0, commit says 0x", "logitcache verify"):
        assert part in message
    assert len(cache.read_shard(1)) == cache.plan.shard_num_rows[1]
