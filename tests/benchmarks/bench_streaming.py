"""Opening a cache of 100,000 shards and 100 million samples, and streaming one from a slow S3 server into two ranks.

opening     identity, plan, manifest (11 objects a shard) and index are made up by `make_huge`; shards and all parts but
            one are not there. Times and peak memory (VmHWM) are of a process of its own that opens it from local disk,
            just written.
streaming   2,097,152 rows of k = 64 in 32 Zarr shards (u8) on a moto server behind a proxy that adds 50 ms to every
            answer and every connection. Two ranks with a loader worker each share one local cache, which has room for
            three shuffle windows of 4 shards. A rank takes 100,000 rows/s: it sleeps so long for each
            micro-batch, as a GPU would be busy, and is idle while it waits for the next. Busy is the share of the time
            in which it sleeps, of the rank that has to wait longest, from the second window on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_storage import SAMPLE_ROWS, SHARD_ROWS
from teacher_rows import VOCAB_SIZE, K, synthetic_rows

from logitcache_storage import Cache
from logitcache_storage.commit import create_or_continue, new_attempt, write_manifest
from logitcache_storage.committed import put_object
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.objects import open_store
from logitcache_storage.plans import commit_plan, write_parquet, write_samples
from logitcache_storage.samples import SAMPLES_SCHEMA
from logitcache_storage.schema import ObjectRecord, PlanPart, PlanRecord, ShardRecord
from logitcache_storage.testing import make_identity, write_cache

NUM_HUGE_SHARDS = 100_000
SAMPLES_PER_SHARD = 1000
SAMPLES_PER_PART = 65_536

NUM_SHARDS = 32
WINDOW_SHARDS = 4
NUM_RANKS = 2
NUM_WORKERS = 1
BATCH_SAMPLES = 64
LATENCY = 0.05
ROWS_PER_SECOND = 200_000

PROXY = Path(__file__).parent.parent / "faults" / "proxy.py"


def run() -> dict[str, Any]:
    """Both measurements, each against its target."""
    opening, streaming = measure_opening(), measure_streaming()
    reached = [
        opening["seconds"] < 10,
        opening["peak_gigabytes"] < 2,
        streaming["busy_percent"] >= 95,
        streaming["fetches_per_object"] <= 1,
        streaming["decodes_per_shard"] <= 1.1,
    ]
    return {
        "opening": opening,
        "streaming": streaming,
        "target": "opened in 10 s and 2 GB; busy 95% once warm; of a node one fetch an object and 1.1 decodes a shard",
        "passed": all(reached),
    }


# Opening


def measure_opening() -> dict[str, Any]:
    """Seconds and memory of `Cache.open` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        make_huge(folder)
        done = subprocess.run([sys.executable, __file__, "open", folder], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def make_huge(folder: str) -> None:
    """Everything that opening a cache reads, for 100 million samples of 100 to 611 tokens, half of them targets."""
    identity, store, rng = (
        make_identity(k=K, vocab_size=VOCAB_SIZE, shard_rows=1 << 17),
        open_store(folder),
        np.random.default_rng(0),
    )
    create_or_continue(store, identity)
    num_samples = NUM_HUGE_SHARDS * SAMPLES_PER_SHARD
    parts, sizes, num_tokens, row, last_shard = [], np.zeros(NUM_HUGE_SHARDS, np.int64), 0, 0, 0
    for start in range(0, num_samples, SAMPLES_PER_PART):
        sample = np.arange(start, min(num_samples, start + SAMPLES_PER_PART))
        shard, length = sample // SAMPLES_PER_SHARD, rng.integers(100, 612, len(sample))
        ends = np.cumsum(length // 2)
        # Rows begin at 0 in each shard; the first shard of a part goes on where the part before ended.
        is_new = np.append(shard[0] != last_shard, np.diff(shard) != 0)
        firsts = ends - length // 2 + row
        first_row = firsts - np.maximum.accumulate(np.where(is_new, firsts, 0))
        row, last_shard = int(first_row[-1] + length[-1] // 2), int(shard[-1])
        np.add.at(sizes, shard, length // 2)
        num_tokens += int(length.sum())
        if start == 0:
            parts += write_samples(store, "0" * 16, [_real_part(shard, first_row, length, rng)])
            continue
        places = np.concatenate([shard, first_row, length, length // 2]).astype("<i4").tobytes()
        index = put_object(store, f"samples/{start:016x}-00000.index", places + rng.bytes(16 * len(sample)))
        missing = ObjectRecord(f"samples/{start:016x}-00000.parquet", 1, (0,))
        parts.append(PlanPart(start, len(sample), missing, index))
    vocabulary = write_parquet(store, "vocabulary/x.parquet", pa.table({"text": []}))
    rows = tuple(sizes.tolist())
    commit_plan(store, PlanRecord(num_samples, num_tokens, sum(rows), rows, {}, tuple(parts), vocabulary))
    write_manifest(store, {shard: _huge_shard(shard, rows[shard], rng) for shard in range(NUM_HUGE_SHARDS)})


def _real_part(shard: np.ndarray, first_row: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> pa.Table:
    rows = []
    for i, n in enumerate(length.tolist()):
        ids, ranges = rng.integers(150_000, size=n, dtype=np.int32), np.array([[n - n // 2, n]], np.int32)
        key = bytes.fromhex(sample_key(ids, ranges))
        rows.append((key, f"huge:{i}", shard[i], first_row[i], n, n // 2, ids, ranges.ravel()))
    columns = zip(SAMPLES_SCHEMA.names, zip(*rows, strict=True), strict=True)
    return pa.table({name: list(values) for name, values in columns}, schema=SAMPLES_SCHEMA)


def _huge_shard(shard: int, num_rows: int, rng: np.random.Generator) -> ShardRecord:
    attempt = new_attempt()
    prefix = f"shards/{shard:05d}-{attempt}"
    sizes = {"/zarr.json": 200, "/ids/c/0/0": 130 * num_rows, "/codes/c/0/0": 20 * num_rows}
    for name in ("ids", "codes", "num_kept", "log_tail", "label_log_prob"):
        sizes |= {f"/{name}/zarr.json": 900, f"/{name}/c/0": 4 * num_rows}
    del sizes["/ids/c/0"], sizes["/codes/c/0"]
    crcs = rng.integers(1 << 32, size=sum(-(-size // (1 << 18)) for size in sizes.values())).tolist()
    objects = []
    for suffix, size in sizes.items():
        blocks = -(-size // (1 << 18))
        objects.append(ObjectRecord(prefix + suffix, size, tuple(crcs[:blocks])))
        del crcs[:blocks]
    statistics = dict.fromkeys(("entropy_sum", "kept_mass_sum", "label_log_prob_sum", "num_kept_sum"), 1.5)
    total = sum(sizes.values())
    return ShardRecord(
        shard, attempt, num_rows, total, tuple(objects), statistics, 1.0, "bench", "2026-01-01T00:00:00+00:00"
    )


def open_huge(folder: str) -> dict[str, Any]:
    """To be run in a process of its own: its peak memory is that of opening and of what is read then."""
    start = time.perf_counter()
    cache = Cache.open(folder)
    seconds = time.perf_counter() - start
    peak = _peak_bytes()
    assert cache.is_complete
    start = time.perf_counter()
    ids, positions = cache.read_tokens([50_000])[0]
    one_sample = time.perf_counter() - start
    assert (len(ids), len(positions)) == (cache.index.num_tokens[50_000], cache.index.num_targets[50_000])
    start = time.perf_counter()
    assert cache.index_of(cache.key(50_000)) == 50_000
    by_key = time.perf_counter() - start
    assert cache.shards[77_777].shard == 77_777
    return {
        "shards": len(cache.shards),
        "samples": len(cache),
        "seconds": round(seconds, 2),
        "peak_gigabytes": round(peak / 1e9, 2),
        "metadata_megabytes": {
            name: round(size / 1e6, 1)
            for name, size in {
                "plan": (Path(folder) / "plans/00000.json").stat().st_size,
                "manifest": (Path(folder) / "manifest.parquet").stat().st_size,
                "index": sum(path.stat().st_size for path in Path(folder).glob("samples/*.index")),
            }.items()
        },
        "tokens_of_one_sample_ms": round(one_sample * 1e3, 1),
        "index_of_key_seconds": round(by_key, 2),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Streaming


def measure_streaming() -> dict[str, Any]:
    """One epoch from a cold start."""
    with tempfile.TemporaryDirectory() as folder, _s3_server() as port, _proxy(port) as proxy_port:
        url = "s3://bench/cache"
        _write(url, _options(port))
        log = Path(folder) / "log.txt"
        cache = Cache.open(url, _options(proxy_port))
        room = cache.num_local_bytes(3 * WINDOW_SHARDS)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        arguments = [(rank, url, _options(proxy_port), folder, room, results) for rank in range(NUM_RANKS)]
        ranks = [context.Process(target=stream_rank, args=each) for each in arguments]
        for process in ranks:
            process.start()
        found = [results.get(timeout=600) for _ in ranks]
        for process in ranks:
            process.join()
        return _summary(found, log.read_text().split("\n")[:-1], cache)


def stream_rank(rank: int, url: str, options: dict[str, Any], folder: str, room: int, results: Any) -> None:
    """One rank and its workers, each fetch and each decoding noted in `log.txt`."""
    import torch

    from logitcache_train.collate import collate
    from logitcache_train.data import CachedSamples, EpochLoader, GlobalBatchSampler
    from logitcache_train.objectives import objective
    from logitcache_train.shipping import ship

    torch.set_num_threads(1)
    _note_reads(Path(folder) / "log.txt")
    cache = Cache.open(url, options, disk_cache=DiskCache(Path(folder) / "local", room))
    samples = CachedSamples({"teacher": [cache]}, objective("kd"), window_shards=WINDOW_SHARDS)
    sampler = GlobalBatchSampler(
        samples,
        batch_tokens=BATCH_SAMPLES * (SAMPLE_ROWS + 1),
        window_shards=WINDOW_SHARDS,
        seed=0,
        rank=rank,
        world_size=NUM_RANKS,
        accumulation_steps=1,
    )
    loader = EpochLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=lambda micro: ship(collate(micro.samples, num_items=micro.num_items, layout="packed")),
        num_workers=NUM_WORKERS,
        prefetch_factor=4,
        multiprocessing_context="fork",
    )
    busy, waits, rows, start = [], [], 0, time.perf_counter()
    for batch in loader:
        ready = time.perf_counter()
        waits.append(ready - start)
        num_rows = len(batch["targets"].labels_N)
        time.sleep(num_rows / (ROWS_PER_SECOND / NUM_RANKS))
        start = time.perf_counter()
        busy.append(start - ready)
        rows += num_rows
    warm = len(busy) * WINDOW_SHARDS // NUM_SHARDS
    results.put({"busy": sum(busy[warm:]), "waiting": sum(waits[warm:]), "cold": sum(waits[:warm]), "rows": rows})


def _note_reads(log: Path) -> None:
    """Writes a line for every object that is fetched and every shard that is decoded, here and in forked workers."""
    from logitcache_storage import cache as cache_module
    from logitcache_storage.objects import FsspecStore

    def note(*words: str) -> None:
        with log.open("a") as f:
            f.write("".join(word + "\n" for word in words))

    get_many, read_rows = FsspecStore.get_many, cache_module.read_rows
    get, get_range = FsspecStore.get, FsspecStore.get_range
    FsspecStore.get_many = lambda self, paths: (note(*paths), get_many(self, paths))[1]  # type: ignore[method-assign]
    FsspecStore.get = lambda self, path: (note(path), get(self, path))[1]  # type: ignore[method-assign]
    FsspecStore.get_range = lambda self, path, a, b: (  # type: ignore[method-assign]
        note(f"{path}[{a}:{b}]"),
        get_range(self, path, a, b),
    )[1]
    cache_module.read_rows = lambda store, identity, record, rows: (
        note(f"decode {record.shard}"),
        read_rows(store, identity, record, rows),
    )[1]


def _summary(found: list[dict[str, float]], log: list[str], cache: Cache) -> dict[str, Any]:
    counts = Counter(log)
    objects = {path: n for path, n in counts.items() if path.startswith("shards/")}
    ranges = {path: n for path, n in counts.items() if path.startswith("samples/") and ".parquet" in path}
    paths = [item.path for record in cache.shards.values() for item in record.row_objects]
    num_objects = sum(not path.endswith("/zarr.json") for path in paths)
    assert len(objects) == num_objects and sum(r["rows"] for r in found) == cache.plan.num_rows
    busy = min(result["busy"] / (result["busy"] + result["waiting"]) for result in found)
    return {
        "rows": cache.plan.num_rows,
        "ranks": NUM_RANKS,
        "workers_per_rank": NUM_WORKERS,
        "latency_ms": 1000 * LATENCY,
        "rows_per_second": ROWS_PER_SECOND,
        "busy_percent": round(100 * busy, 1),
        "cold_start_seconds": round(max(result["cold"] for result in found), 2),
        "objects": num_objects,
        "fetches_per_object": round(sum(objects.values()) / num_objects, 3),
        "fetches_of_token_ranges": round(sum(ranges.values()) / max(1, len(ranges)), 3),
        "decodes_per_shard": round(sum(line.startswith("decode") for line in log) / len(cache.shards), 3),
    }


def _write(url: str, options: dict[str, Any]) -> None:
    rows, _ = synthetic_rows(SHARD_ROWS)
    ranges = np.array([[1, SAMPLE_ROWS + 1]], np.int32)
    labels = rows.ids[np.arange(len(rows)), (rows.log_probs == rows.label_log_prob[:, None]).argmax(1)]
    starts = range(0, len(rows), SAMPLE_ROWS)
    samples = [
        (np.concatenate([[shard], labels[i : i + SAMPLE_ROWS]]).astype(np.int32), ranges)
        for shard in range(NUM_SHARDS)
        for i in starts
    ]
    topks = [rows[i : i + SAMPLE_ROWS] for i in starts] * NUM_SHARDS
    identity = make_identity(container="zarr", precision="u8", k=K, vocab_size=VOCAB_SIZE, shard_rows=SHARD_ROWS)
    write_cache(url, samples, topks, identity=identity, vocabulary=[], storage_options=options)


def _options(port: int) -> dict[str, Any]:
    endpoint = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-west-2"}
    return {"key": "test", "secret": "test", "client_kwargs": endpoint}


@contextmanager
def _s3_server() -> Iterator[int]:
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.1)
        s3fs.S3FileSystem(**_options(port)).mkdir("bench")
        yield port
    finally:
        server.kill()
        server.wait()


@contextmanager
def _proxy(port: int) -> Iterator[int]:
    command = [sys.executable, str(PROXY), str(port), "--latency", str(LATENCY)]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert proxy.stdout is not None
    try:
        yield int(proxy.stdout.readline())
    finally:
        proxy.kill()
        proxy.wait()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(open_huge(sys.argv[2]) if sys.argv[1:2] == ["open"] else run(), indent=1))
