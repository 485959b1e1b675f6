"""Damaged bytes anywhere in a cache: every read refuses, or gives exactly what was written."""

from __future__ import annotations

import uuid
from collections import Counter

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.commit import load_quarantine, quarantine_shard
from logitcache_storage.errors import LogitCacheError
from logitcache_storage.objects import open_store
from logitcache_storage.testing import make_identity, make_samples, write_cache

NUM_DAMAGES = 100
"""For each container, with and without a manifest."""

SAMPLES, TOPKS = make_samples(6, k=4, vocab_size=50, seed=2)


def kind_of(path: str) -> str:
    """Objects that are read in the same way."""
    parts = path.split("/")
    if parts[0] == "shards" and len(parts) > 2:
        return f"shards/*/{'zarr.json' if path.endswith('zarr.json') else 'c'}"
    return parts[0] if len(parts) == 1 else f"{parts[0]}/*"


def damaged(data: bytes, rng: np.random.Generator) -> tuple[str, bytes | None]:
    """One random damage: a bit, an end that is missing, bytes that are too many, nothing at all."""
    kind = rng.choice(["bit", "bit", "bit", "truncated", "extended", "missing", "zeroed"])
    if kind == "bit":
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
        yield lambda: [cache.vocabulary.decode(range(50))]
        yield lambda: [load_quarantine(cache.store)]

    return [part() if part else [] for part in parts()]


@pytest.mark.parametrize("finished", [True, False], ids=["manifest", "commits"])
@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_no_damage_is_read(container: str, finished: bool) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    identity = make_identity(container=container, k=4, precision="u8", shard_rows=24)
    write_cache(url, SAMPLES, TOPKS, identity=identity, commit_shards=None if finished else 99)
    store = open_store(url)
    quarantine_shard(store, 7, ["made up"])
    expected = everything_of(url)
    rng = np.random.default_rng([finished, len(container)])
    by_kind: dict[str, list[str]] = {}
    for path in store.list(""):
        by_kind.setdefault(kind_of(path), []).append(path)
    outcomes: Counter[tuple[str, str]] = Counter()
    for n in range(NUM_DAMAGES):
        kind = sorted(by_kind)[n % len(by_kind)]
        path = str(rng.choice(by_kind[kind]))
        original = store.get(path)
        what, data = damaged(original, rng)
        store.delete(path) if data is None else store.put(path, data)
        try:
            found = everything_of(url)
        except LogitCacheError:
            outcomes[kind, "refused"] += 1
        else:
            is_gone = what == "missing" and kind in ("manifest.json", "commits/*", "quarantine/*")
            assert found == expected or is_gone, f"{what} in {path}"
            outcomes[kind, "same"] += 1
        store.put(path, original)
    refused = {kind for kind, outcome in outcomes if outcome == "refused"}
    assert refused >= by_kind.keys() - ({"commits/*"} if finished else set())
    assert everything_of(url) == expected


def test_damage_is_named_with_its_remedy(tmp_path) -> None:
    identity = make_identity(container="zarr", k=4, shard_rows=24)
    write_cache(str(tmp_path), SAMPLES, TOPKS, identity=identity)
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
