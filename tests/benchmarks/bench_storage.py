"""Reading a cache from local disk into decoded numpy arrays, on one core, against what one would otherwise write.

Rows: `teacher_rows.synthetic_rows`, 1,048,576 of them in shards of 65,536; the first 65,536 are repeated, much further
apart than any compressor here looks back.

    zarr_u8, zarr_u10, arrow_u8, arrow_u10      `Cache.read_shard` of every shard: checksums, container and decoding
    parquet         list<int32> ids and list<float16> log-probs, zstd, one file per shard, to float32 arrays
    npz             `np.savez_compressed` of int32 and float16 arrays, one file per shard, to float32 arrays
    npz_raw         the same without compression

and of a Zarr shard, before decoding:

    verified        checksums and columns, as the cache reads them
    zarr, zarrs     columns alone, as Zarr reads them with its own codec pipeline and with that of zarrs

Only the caches check what they read. The process is pinned to one CPU; rates are given in wall time and in
the process's CPU time, which does not move when other work shares the machine. Medians of rounds in turn.
What the encodings cost in bytes and nats is in `bench_encoding`.
"""

from __future__ import annotations

import importlib.util
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
import zarr
from teacher_rows import VOCAB_SIZE, K, synthetic_rows

from logitcache_storage import Cache, TopKLogProbs
from logitcache_storage.committed import CommittedObjects, shard_prefix
from logitcache_storage.encoding import column_types
from logitcache_storage.testing import make_identity, write_cache
from logitcache_storage.zarr_shard import ZarrShard

SHARD_ROWS = 65_536
NUM_SHARDS = 16
SAMPLE_ROWS = 256
ROUNDS = 3
CACHES = [("zarr", "u8"), ("zarr", "u10"), ("arrow", "u8"), ("arrow", "u10")]
TARGETS = {"zarr_u8": 1.0, "arrow_u8": 2.0}
"""Millions of rows per second."""
PIPELINES = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}


def run() -> dict[str, Any]:
    """Write everything once, read it in turn, and return rates, sizes and divergences."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        rows, _ = synthetic_rows(SHARD_ROWS)
        with tempfile.TemporaryDirectory() as folder:
            return _measure(rows, Path(folder))
    finally:
        os.sched_setaffinity(0, allowed)


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
    columns = _column_readers(caches["zarr_u8"])
    readers |= columns
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
    rate = {name: num_rows / statistics.median(cpu[name]) / 1e6 for name in readers}
    return {
        "rows": num_rows,
        "k": K,
        "vocab_size": VOCAB_SIZE,
        "read_million_rows_per_cpu_second": {n: round(r, 3) for n, r in rate.items() if n not in columns},
        "read_million_rows_per_wall_second": {
            n: round(num_rows / statistics.median(wall[n]) / 1e6, 3) for n in readers if n not in columns
        },
        "columns_million_rows_per_cpu_second": {n: round(rate[n], 3) for n in columns},
        "bytes_per_row": {name: round(size, 1) for name, size in bytes_per_row.items()},
        "zarr_u8_against": {name: round(rate["zarr_u8"] / rate[name], 2) for name in baselines},
        "one_sample_ms": {name: round(_one_sample(cache), 2) for name, cache in caches.items()},
        "target": "on one core zarr_u8 at least 1 million rows/s, arrow_u8 at least 2 million",
        "passed": all(rate[name] >= least for name, least in TARGETS.items()),
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


def _column_readers(cache: Cache) -> dict[str, Callable[[], None]]:
    """Readers of the stored columns of every shard: ours, and Zarr's with each codec pipeline that is installed."""
    types = column_types("u8", cache.identity.id_layout, K)
    prefixes = {shard: shard_prefix(shard, record.attempt) for shard, record in cache.shards.items()}

    def verified() -> None:
        for shard, prefix in prefixes.items():
            objects = CommittedObjects(cache.store, cache.shards[shard].objects)
            ZarrShard().read(objects, prefix, types, SHARD_ROWS, slice(0, SHARD_ROWS))

    def with_pipeline(path: str) -> None:
        with zarr.config.set({"codec_pipeline.path": path}):
            for prefix in prefixes.values():
                group = zarr.open_group(f"{cache.store.url}/{prefix}", mode="r", zarr_format=3)
                for name in types:
                    assert len(np.asarray(group[name][:])) == SHARD_ROWS

    installed = {name: path for name, path in PIPELINES.items() if importlib.util.find_spec(path.split(".")[0])}
    readers = {name: lambda path=path: with_pipeline(path) for name, path in installed.items()}
    return {"verified": verified, **readers}


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
