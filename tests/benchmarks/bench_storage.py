"""Reading a cache from local disk into decoded numpy arrays, on one core, against what one would otherwise write.

Rows: k = 64 of V = 151,936, 1,048,576 of them in shards of 65,536. Probability falls with a power of the rank, so that
entropies are those of a language model (printed); ids are drawn evenly, which no byte shuffle can compress: real text
takes less. The first 65,536 rows are repeated, 4 times further apart than any compressor here looks back.

    zarr_u8, zarr_u10, arrow_u8, arrow_u10      `Cache.read_shard` of every shard: checksums, container and decoding
    parquet         list<int32> ids and list<float16> log-probs, zstd, one file per shard, to float32 arrays
    npz             `np.savez_compressed` of int32 and float16 arrays, one file per shard, to float32 arrays
    npz_raw         the same without compression

Only the caches check what they read. The process is pinned to one CPU; rates are given in wall time and in
the process's CPU time, which does not move when other work shares the machine. Medians of rounds in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage import Cache, TopKLogProbs
from logitcache_storage.encoding import decode, encode
from logitcache_storage.testing import make_identity, write_cache

K = 64
VOCAB_SIZE = 151_936
SHARD_ROWS = 65_536
NUM_SHARDS = 16
SAMPLE_ROWS = 256
ROUNDS = 3
CACHES = [("zarr", "u8"), ("zarr", "u10"), ("arrow", "u8"), ("arrow", "u10")]


def run() -> dict[str, Any]:
    """Write everything once, read it in turn, and return rates, sizes and divergences."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        rows = make_rows(SHARD_ROWS, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            return _measure(rows, Path(folder))
    finally:
        os.sched_setaffinity(0, allowed)


def make_rows(num_rows: int, seed: int) -> TopKLogProbs:
    """Rows whose log-probs fall by a multiple of the log of the rank, jittered; the tail goes on in the same way."""
    rng = np.random.default_rng(seed)
    steepness = 1.2 * (10 / 1.2) ** rng.uniform(size=(num_rows, 1))
    weights = -steepness * np.log(np.arange(1, K + 1)) + rng.normal(0, 0.3, size=(num_rows, K))
    weights = -np.sort(-weights, axis=1)
    # sum over ranks r > K of r^-s is close to the integral of x^-s from K + 1/2 to V + 1/2.
    s = steepness[:, 0]
    tail = ((K + 0.5) ** (1 - s) - (VOCAB_SIZE + 0.5) ** (1 - s)) / (s - 1)
    total = np.exp(weights).sum(1) + tail
    log_probs = (weights - np.log(total)[:, None]).astype(np.float32)
    rank = np.minimum(rng.geometric(0.7, size=num_rows) - 1, K - 1)
    return TopKLogProbs(
        ids=_distinct_ids(rng, num_rows),
        log_probs=log_probs,
        num_kept=np.full(num_rows, K, np.int32),
        log_tail=np.log(tail / total).astype(np.float32),
        label_log_prob=log_probs[np.arange(num_rows), rank],
    )


def _distinct_ids(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    ids = rng.integers(VOCAB_SIZE, size=(num_rows, K), dtype=np.int32)
    while (again := (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1)).any():
        ids[again] = rng.integers(VOCAB_SIZE, size=(int(again.sum()), K), dtype=np.int32)
    return ids


def _measure(rows: TopKLogProbs, folder: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[], None]] = {}
    caches = {f"{container}_{precision}": _write(rows, folder, container, precision) for container, precision in CACHES}
    for name, cache in caches.items():
        readers[name] = lambda cache=cache: _read_cache(cache)
    baselines = {
        "parquet": _parquet(rows, folder),
        "npz": _npz(rows, folder, True),
        "npz_raw": _npz(rows, folder, False),
    }
    readers |= {name: read for name, (read, _) in baselines.items()}
    wall, cpu = {name: [] for name in readers}, {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            read()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    num_rows = NUM_SHARDS * SHARD_ROWS
    bytes_per_row = {name: sum(r.num_bytes for r in cache.shards.values()) / num_rows for name, cache in caches.items()}
    bytes_per_row |= {name: size / SHARD_ROWS for name, (_, size) in baselines.items()}
    entropy = -(np.exp(rows.log_probs) * rows.log_probs).sum(1) - np.exp(rows.log_tail) * rows.log_tail
    rate = {name: num_rows / statistics.median(cpu[name]) / 1e6 for name in readers}
    return {
        "rows": num_rows,
        "k": K,
        "vocab_size": VOCAB_SIZE,
        "entropy_nats": {"mean": round(float(entropy.mean()), 3), "median": round(float(np.median(entropy)), 3)},
        "read_million_rows_per_cpu_second": {name: round(r, 3) for name, r in rate.items()},
        "read_million_rows_per_wall_second": {
            name: round(num_rows / statistics.median(wall[name]) / 1e6, 3) for name in readers
        },
        "bytes_per_row": {name: round(size, 1) for name, size in bytes_per_row.items()},
        "kl_nats_per_row": {p: float(f"{_divergence(rows, p):.2e}") for p in ("u8", "u10", "fp16", "fp32")},
        "zarr_u8_against": {name: round(rate["zarr_u8"] / rate[name], 2) for name in baselines},
        "one_sample_ms": {name: round(_one_sample(cache), 2) for name, cache in caches.items()},
        "target": "zarr_u8 at least 0.5 million rows/s on one core",
        "passed": rate["zarr_u8"] >= 0.5,
    }


def _write(rows: TopKLogProbs, folder: Path, container: str, precision: str) -> Cache:
    url = str(folder / f"{container}_{precision}")
    ranges = np.array([[1, SAMPLE_ROWS + 1]], np.int32)
    is_label = rows.log_probs == rows.label_log_prob[:, None]
    labels = rows.ids[np.arange(len(rows)), is_label.argmax(1)]
    starts = range(0, len(rows), SAMPLE_ROWS)
    samples = [(np.concatenate([[0], labels[i : i + SAMPLE_ROWS]]).astype(np.int32), ranges) for i in starts]
    topks = [rows[i : i + SAMPLE_ROWS] for i in starts]
    identity = make_identity(
        container=container, precision=precision, k=K, vocab_size=VOCAB_SIZE, shard_rows=SHARD_ROWS
    )
    write_cache(url, samples * NUM_SHARDS, topks * NUM_SHARDS, identity=identity, vocabulary=[])
    return Cache.open(url)


def _read_cache(cache: Cache) -> None:
    for shard in cache.shards:
        topk = cache.read_shard(shard)
        assert topk.log_probs.dtype == np.float32 and topk.log_probs.shape == (SHARD_ROWS, K)


def _one_sample(cache: Cache, count: int = 40) -> float:
    """Milliseconds for the tokens and rows of one sample somewhere in the cache."""
    picks = np.random.default_rng(0).integers(len(cache), size=count).tolist()
    start = time.perf_counter()
    for i in picks:
        cache[i]
    return (time.perf_counter() - start) / count * 1e3


def _divergence(rows: TopKLogProbs, precision: str) -> float:
    decoded = decode(encode(rows, precision), precision)
    p, q = rows.log_probs.astype(np.float64), decoded.log_probs.astype(np.float64)
    # Row masses are one to within float32; the generalised divergence does not count that rounding as loss.
    return float((np.exp(p) * (p - q) - np.exp(p) + np.exp(q)).sum(1).mean())


def _parquet(rows: TopKLogProbs, folder: Path) -> tuple[Callable[[], None], int]:
    path = folder / "shard.parquet"
    offsets = np.arange(0, rows.ids.size + 1, K, dtype=np.int32)
    columns = {
        "ids": pa.ListArray.from_arrays(offsets, rows.ids.ravel()),
        "log_probs": pa.ListArray.from_arrays(offsets, rows.log_probs.astype(np.float16).ravel()),
        "log_tail": rows.log_tail,
        "label_log_prob": rows.label_log_prob,
    }
    pq.write_table(pa.table(columns), path, compression="zstd")

    def read() -> None:
        for _ in range(NUM_SHARDS):
            table = pq.read_table(path, use_threads=False).combine_chunks()
            ids, log_probs = (
                table.column(n).chunk(0).flatten().to_numpy().reshape(-1, K) for n in ("ids", "log_probs")
            )
            assert ids.shape == log_probs.astype(np.float32).shape

    return read, path.stat().st_size


def _npz(rows: TopKLogProbs, folder: Path, compressed: bool) -> tuple[Callable[[], None], int]:
    path = folder / f"shard-{compressed}.npz"
    save = np.savez_compressed if compressed else np.savez
    save(
        path,
        ids=rows.ids,
        log_probs=rows.log_probs.astype(np.float16),
        log_tail=rows.log_tail,
        label_log_prob=rows.label_log_prob,
    )

    def read() -> None:
        for _ in range(NUM_SHARDS):
            with np.load(path) as found:
                assert found["ids"].shape == found["log_probs"].astype(np.float32).shape

    return read, path.stat().st_size


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
