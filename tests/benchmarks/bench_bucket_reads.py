"""What a node reads of a bucket in an epoch, against the bytes of the shards that it trains on.

210,000 synthetic rows of k = 64 (V = 151,936, u8, Zarr) of 700 samples in 54 shards, on an S3 server that counts what
it sends to whom. Two ranks of one node, here one after the other in one process, share a local cache with room for
three shuffle windows of two shards, a third of the corpus, so that every epoch reads it again. All that is sent counts:
shards, samples with their tokens, plan, index, manifest.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from typing import Any

import numpy as np
from local_bucket import URL, Bucket, User, local_bucket
from teacher_rows import VOCAB_SIZE, K, synthetic_rows

from logitcache_storage import Cache
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.testing import make_identity, write_cache
from logitcache_train.data import CachedSamples, GlobalBatchSampler
from logitcache_train.objectives import objective

NUM_SAMPLES, PROMPT_TOKENS, TARGET_TOKENS = 700, 150, 300
SHARD_ROWS, WINDOW_SHARDS, BATCH_TOKENS = 4096, 2, 20_000
NUM_RANKS, NUM_EPOCHS = 2, 3
LOCAL_BYTES = 24_000_000
MOST = 1.05


def run() -> dict[str, Any]:
    """Bytes of each epoch over those of the shards."""
    with local_bucket() as (bucket, writer, reader):
        needed = _write(bucket, writer)
        sent = _read(bucket, reader)
    ratios = [round(num_bytes / needed, 4) for num_bytes in np.diff(sent, prepend=0).tolist()]
    return {
        "bytes_of_shards": needed,
        "bytes_read_over_bytes_of_shards_by_epoch": ratios,
        "target": f"of a node at most {MOST}x the bytes of the shards in each epoch",
        "passed": all(0 < ratio <= MOST for ratio in ratios),
    }


def _write(bucket: Bucket, user: User) -> int:
    """Write the cache; returns the bytes of its shards."""
    rng, (few, _) = np.random.default_rng(0), synthetic_rows()
    rows = few[rng.integers(len(few), size=NUM_SAMPLES * TARGET_TOKENS)]
    # The observed token is the likeliest one, everywhere: it costs the least thought and the same bytes.
    rows = dataclasses.replace(rows, label_log_prob=rows.log_probs[:, 0].copy())
    prompts = np.minimum(rng.zipf(1.2, size=(NUM_SAMPLES, PROMPT_TOKENS)), VOCAB_SIZE - 1)
    tokens = np.hstack([prompts, rows.ids[:, 0].reshape(NUM_SAMPLES, -1)]).astype(np.int32)
    ranges = np.array([[PROMPT_TOKENS, PROMPT_TOKENS + TARGET_TOKENS]], np.int32)
    topks = [rows[start : start + TARGET_TOKENS] for start in range(0, len(rows), TARGET_TOKENS)]
    identity = make_identity(k=K, vocab_size=VOCAB_SIZE, shard_rows=SHARD_ROWS)
    write_cache(
        URL, [(ids, ranges) for ids in tokens], topks, identity=identity, storage_options=_options(bucket, user)
    )
    records = Cache.open(URL, _options(bucket, user)).shards.values()
    return sum(item.size for record in records for item in record.objects if item.path.startswith("shards/"))


def _read(bucket: Bucket, user: User) -> list[int]:
    """Train on nothing, but read as training does; returns all bytes sent after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskCache(folder, LOCAL_BYTES)
        ranks = [_rank(rank, Cache.open(URL, _options(bucket, user), disk_cache=disk)) for rank in range(NUM_RANKS)]
        sent = []
        for epoch in range(NUM_EPOCHS):
            for _, sampler in ranks:
                sampler.set_epoch(epoch)
            for parts in zip(*(sampler for _, sampler in ranks), strict=True):
                for (samples, _), part in zip(ranks, parts, strict=True):
                    samples.__getitems__(part)
            sent.append(bucket.bytes_read(user).total())
        return sent


def _rank(rank: int, cache: Cache) -> tuple[CachedSamples, GlobalBatchSampler]:
    samples = CachedSamples({"teacher": [cache]}, objective("kd"), window_shards=WINDOW_SHARDS)
    sampler = GlobalBatchSampler(
        samples,
        batch_tokens=BATCH_TOKENS,
        window_shards=WINDOW_SHARDS,
        seed=0,
        rank=rank,
        world_size=NUM_RANKS,
        accumulation_steps=1,
    )
    return samples, sampler


def _options(bucket: Bucket, user: User) -> dict[str, Any]:
    endpoint = {"endpoint_url": bucket.endpoint, "region_name": bucket.region}
    return {"key": user.access_key, "secret": user.secret_key, "client_kwargs": endpoint}


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
