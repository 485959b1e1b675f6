"""What the views of a cache of a million samples take: loading statistics, sorting, searching, one sample.

The cache has real shards of k = 8, about 10 target tokens a sample and 40 tokens in all, of a vocabulary of 5,000
made-up words. Everything is measured in a process of its own, whose peak memory is told, and again through the pages of
`logitcache serve`, with all doubtful labels as CSV behind them. `bench_inspect.py make FOLDER` keeps the cache,
`bench_inspect.py measure FOLDER` and `bench_inspect.py serve FOLDER` measure one.

On an S3 server pages of samples are asked for, one after the other, and the bytes counted that it sends.

The cost of writing statistics is that of shards of k = 64 with 128 targets a sample, in bytes and in time.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from local_bucket import URL, local_bucket

from logitcache_storage import Cache, TopKLogProbs
from logitcache_storage.commit import commit_shard, create_or_continue, load_commits, new_attempt, write_manifest
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.inspect.data import sample_data, table_data
from logitcache_storage.inspect.doubtful import doubtful_positions
from logitcache_storage.inspect.overview import overview
from logitcache_storage.inspect.search import SampleSearch
from logitcache_storage.objects import open_store
from logitcache_storage.plans import commit_plan, write_parquet, write_samples
from logitcache_storage.sample_statistics import load_statistics
from logitcache_storage.samples import SAMPLES_SCHEMA
from logitcache_storage.schema import CacheIdentity, PlanRecord
from logitcache_storage.statistics import row_statistics
from logitcache_storage.statistics_object import dump_statistics, summarise
from logitcache_storage.testing import make_identity, write_cache
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA

NUM_SAMPLES = 1_000_000
SAMPLES_PER_PART = 65_536
SAMPLES_PER_SHARD = 8192
K = 8
VOCAB_SIZE = 5000
RARE = "zyzzyva"
"""A word that one sample has, in the middle."""
NUM_REMOTE, REMOTE_TARGETS, REMOTE_SHARD_ROWS = 1024, 128, 65_536
"""Of the cache on S3, k = 64, in two shards."""
REMOTE_LOOKED_AT = (0, 300, 513, 700, 1023)


def run() -> dict[str, Any]:
    """Both measurements, each against its target."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make(folder)
        seconds = time.perf_counter() - start
        done = subprocess.run([sys.executable, __file__, "measure", folder], stdout=subprocess.PIPE, check=True)
        pages = measure_pages(folder)
    found, cost, remote = dict(json.loads(done.stdout)), writing_cost(), measure_remote()
    passed = [
        found["peak_gigabytes"] < 1,
        found["seconds"]["sort"] < 1,
        found["seconds"]["search a source"] < 1,
        found["seconds"]["search a text, first results"] < 1,
        found["seconds"]["sample"] < 0.3,
        found["seconds"]["page of 50, sorted"] < 2,
        cost["bytes_percent"] < 2,
        pages["peak_gigabytes"] < 1,
        pages["seconds"]["overview"] < 2,
        pages["seconds"]["sample"] < 0.3,
        pages["seconds"]["sorted"] < 1,
        pages["seconds"]["search a source"] < 1,
        pages["seconds"]["first byte of the CSV"] < 1,
        max(remote["seconds_of_samples"]) < 1,
    ]
    return {
        "making_seconds": round(seconds, 1),
        **found,
        "served": pages,
        "served_from_s3": remote,
        "writing": cost,
        "target": "sort and search 1 s, sample 0.3 s, page 2 s, peak 1 GB with the CSV, its first byte 1 s; a sample on"
        " S3 1 s; statistics below 2% of the bytes",
        "passed": all(passed),
    }


# Making


def make(folder: str) -> None:
    """Write the cache; the same rows stand in every 8th shard, the tokens of their samples differ."""
    rng = np.random.default_rng(0)
    store, identity = open_store(folder), identity_of(K, VOCAB_SIZE)
    create_or_continue(store, identity)
    blocks = [_Block(rng) for _ in range(8)]
    num_shards = -(-NUM_SAMPLES // SAMPLES_PER_SHARD)
    sizes = [min(SAMPLES_PER_SHARD, NUM_SAMPLES - shard * SAMPLES_PER_SHARD) for shard in range(num_shards)]
    tables = (_samples(blocks[shard % 8], shard, size, rng) for shard, size in enumerate(sizes))
    parts = write_samples(store, new_attempt(), _joined(tables))
    rows = tuple(int(blocks[shard % 8].num_targets[:size].sum()) for shard, size in enumerate(sizes))
    words = pa.table(_vocabulary(), schema=VOCABULARY_SCHEMA)
    vocabulary = write_parquet(store, f"vocabulary/{new_attempt()}.parquet", words)
    num_tokens = sum(int(blocks[shard % 8].num_tokens[:size].sum()) for shard, size in enumerate(sizes))
    commit_plan(store, PlanRecord(NUM_SAMPLES, num_tokens, sum(rows), rows, {}, parts, vocabulary))
    for shard, size in enumerate(sizes):
        block = blocks[shard % 8]
        topk, labels = block.topk[: rows[shard]], block.labels[: rows[shard]]
        lengths = block.num_targets[:size].tolist()
        commit_shard(store, identity, shard, topk, labels, seconds=1.0, worker="bench", sample_rows=lengths)
    write_manifest(store, load_commits(store))


def identity_of(k: int, vocab_size: int) -> CacheIdentity:
    """Of a cache with shards of any size."""
    return make_identity(k=k, vocab_size=vocab_size, shard_rows=1 << 17, container="arrow")


class _Block:
    """Rows of a shard, and how long its samples are."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.num_targets = rng.integers(4, 17, SAMPLES_PER_SHARD)
        self.num_tokens = self.num_targets + rng.integers(10, 51, SAMPLES_PER_SHARD)
        self.topk, self.labels = make_rows(rng, int(self.num_targets.sum()), K, VOCAB_SIZE)


def make_rows(
    rng: np.random.Generator, num_rows: int, k: int, vocab_size: int
) -> tuple[TopKLogProbs, npt.NDArray[np.int32]]:
    """Rows whose label is among the k ids nine times of ten, at the first more often than at the last."""
    steps = rng.exponential(rng.uniform(0.2, 4.0, (num_rows, 1)), (num_rows, k + 1))
    logits = -np.cumsum(steps, axis=1)
    log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    # Ids of a row differ, as their remainders do.
    ids = (rng.integers(vocab_size // (2 * k), size=(num_rows, k)) * 2 * k + rng.permutation(2 * k)[:k]).astype(
        np.int32
    )
    place = np.minimum(rng.geometric(0.6, num_rows) - 1, k - 1)
    row = np.arange(num_rows)
    is_kept = rng.uniform(size=num_rows) < 0.9
    other = (ids[:, 0] // (2 * k)) * 2 * k + _absent(ids[0], 2 * k)
    labels = np.where(is_kept, ids[row, place], other).astype(np.int32)
    label_log_prob = np.where(is_kept, log_probs[row, place], log_probs[:, -1] - 1)
    topk = TopKLogProbs(
        ids, log_probs[:, :k], np.full(num_rows, k, np.int32), log_probs[:, k], label_log_prob.astype(np.float32)
    )
    return topk, labels


def _absent(ids: npt.NDArray[np.int32], modulus: int) -> int:
    """A remainder that none of these has."""
    return next(r for r in range(modulus) if r not in set((ids % modulus).tolist()))


def _samples(block: _Block, shard: int, size: int, rng: np.random.Generator) -> pa.Table:
    lengths, targets = block.num_tokens[:size], block.num_targets[:size]
    ends, row_ends = np.cumsum(lengths), np.cumsum(targets)
    tokens = rng.integers(VOCAB_SIZE - 1, size=int(ends[-1]), dtype=np.int32)
    is_target = np.repeat(lengths - targets, lengths) <= np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    tokens[is_target] = block.labels[: row_ends[-1]]
    if shard == NUM_SAMPLES // 2 // SAMPLES_PER_SHARD:
        tokens[0] = VOCAB_SIZE - 1
    ranges = np.stack([lengths - targets, lengths], axis=1).astype(np.int32)
    keys = [
        bytes.fromhex(sample_key(ids, found[None]))
        for ids, found in zip(np.split(tokens, ends[:-1]), ranges, strict=True)
    ]
    first = shard * SAMPLES_PER_SHARD
    columns = [
        pa.array(keys, pa.binary(16)),
        pa.array([f"corpus/train-{shard:05d}.jsonl:{first + i}" for i in range(size)]),
        pa.array(np.full(size, shard, np.int32)),
        pa.array((row_ends - targets).astype(np.int32)),
        pa.array(lengths.astype(np.int32)),
        pa.array(targets.astype(np.int32)),
        pa.ListArray.from_arrays(np.append(0, ends).astype(np.int32), pa.array(tokens)),
        pa.ListArray.from_arrays(np.arange(0, 2 * size + 1, 2, dtype=np.int32), pa.array(ranges.ravel())),
    ]
    return pa.table(columns, schema=SAMPLES_SCHEMA)


def _joined(tables: Any) -> Any:
    """The same samples in tables of `SAMPLES_PER_PART`."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= SAMPLES_PER_PART:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _vocabulary() -> dict[str, list[Any]]:
    rng = np.random.default_rng(1)
    letters = rng.choice(list("abcdefghiklmnoprstuvw"), size=(VOCAB_SIZE, 5))
    words = [f" {''.join(word[: 2 + i % 4])}" for i, word in enumerate(letters)]
    words[-1] = f" {RARE}"
    return {"token": words, "text": [word.encode() for word in words], "special": [False] * VOCAB_SIZE}


# Measuring


def measure(folder: str) -> dict[str, Any]:
    """Everything in this process, one after the other."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[name] = round(time.perf_counter() - start, 3)
        return found

    cache = timed("open", lambda: Cache.open(folder))
    table = timed("load statistics", lambda: load_statistics(cache))
    assert table.known.all() and len(table) == NUM_SAMPLES
    view = timed("overview", lambda: overview(cache, table))
    assert view.histograms[0].num_rows == view.totals.num_rows
    order = timed("sort", lambda: table.order("min_label_log_prob"))
    timed("page of 50, as they stand", lambda: table_data(cache, table, range(50)))
    timed("page of 50, sorted", lambda: table_data(cache, table, order[:50].tolist()))
    behind = timed("samples behind a bar, sorted", lambda: table.order("doubt", among=table.in_bin("entropy", 20)))
    assert 0 < len(behind) < NUM_SAMPLES
    search = SampleSearch(cache)
    first = timed("search a text, first results", lambda: search.search("ba"))
    assert first.found
    timed("load sources", search.load_sources)
    source = timed("search a source", lambda: search.search(f"jsonl:{NUM_SAMPLES - 7}", seconds=0))
    assert [found.index for found in source.found] == [NUM_SAMPLES - 7]
    key = cache.key(NUM_SAMPLES - 9)
    assert timed("search a key", lambda: search.search(key[:12], seconds=0)).found[0].index == NUM_SAMPLES - 9
    step = timed("search a rare text, one step", lambda: search.search(RARE))
    found = timed("search a rare text, all samples", lambda: search.search(RARE, seconds=1e9))
    assert len(found.found) == 1 and found.next is None
    timed("sample", lambda: _sample(cache, 777_777))
    doubtful = timed("doubtful positions, 100 of them", lambda: doubtful_positions(cache, table, limit=100))
    assert len(doubtful.positions) == 100
    return {
        "samples": len(cache),
        "rows": view.totals.num_rows,
        "seconds": seconds,
        "samples_searched_in_a_step": step.num_searched,
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def _sample(cache: Cache, index: int) -> dict[str, Any]:
    rows = slice(0, int(cache.index.num_targets[index]))
    return sample_data(cache[index], index, cache.vocabulary, rows=rows, top=K)


def measure_pages(folder: str) -> dict[str, Any]:
    """The pages of a server, each asked for once, the CSV last; and the server's peak memory."""
    seconds: dict[str, float] = {}
    with _served(folder) as (process, address):
        seconds["overview"] = _seconds(f"{address}/")
        _wait_for_statistics(address)
        seconds["overview with histograms, the first"] = _seconds(f"{address}/")
        seconds["sample"] = _seconds(f"{address}/samples/777777")
        seconds["sorted"] = _seconds(f"{address}/samples?sort=min_label_log_prob")
        seconds["behind a bar, sorted"] = _seconds(f"{address}/samples?sort=doubt&histogram=entropy&bin=20")
        seconds["search a source"] = _seconds(f"{address}/samples?q=jsonl:{NUM_SAMPLES - 7}")
        seconds["search a rare text, one step"] = _seconds(f"{address}/samples?q={RARE}")
        seconds["doubtful, 50 of them"] = _seconds(f"{address}/doubtful")
        before = _peak_gigabytes(process)
        start = time.perf_counter()
        with urllib.request.urlopen(f"{address}/doubtful.csv") as answer:
            answer.readline()
            seconds["first byte of the CSV"] = round(time.perf_counter() - start, 3)
            num_positions = sum(1 for _ in answer)
        seconds["the CSV"] = round(time.perf_counter() - start, 3)
        return {
            "seconds": seconds,
            "positions_in_the_csv": num_positions,
            "peak_gigabytes_before_the_csv": before,
            "peak_gigabytes": _peak_gigabytes(process),
        }


def measure_remote() -> dict[str, Any]:
    """Seconds of pages of samples on an S3 server, and the bytes that it sent for them."""
    with local_bucket() as (bucket, writer, reader):
        shard_bytes = _write_remote(writer.environment(bucket))
        with _served(URL, reader.environment(bucket)) as (_, address):
            _wait_for_statistics(address)
            _seconds(f"{address}/samples/1")  # modules and templates
            before = bucket.bytes_read(reader)
            seconds = [_seconds(f"{address}/samples/{i}") for i in REMOTE_LOOKED_AT]
            sent = bucket.bytes_read(reader) - before
    of_shards = sum(count for path, count in sent.items() if "/shards/" in path)
    return {
        "seconds_of_samples": seconds,
        "bytes_of_shards_a_sample": of_shards // len(REMOTE_LOOKED_AT),
        "bytes_in_all_a_sample": sent.total() // len(REMOTE_LOOKED_AT),
        "bytes_of_a_shard": shard_bytes,
    }


def _write_remote(environment: Mapping[str, str]) -> int:
    """Samples of as many targets as tokens before them; returns the bytes of a shard."""
    topk, labels = make_rows(np.random.default_rng(0), REMOTE_SHARD_ROWS, 64, VOCAB_SIZE)
    ranges = np.array([[REMOTE_TARGETS, 2 * REMOTE_TARGETS]], np.int32)
    samples, topks = [], []
    for i in range(NUM_REMOTE):
        at = i * REMOTE_TARGETS % REMOTE_SHARD_ROWS
        prompt = np.full(REMOTE_TARGETS, i, np.int32)
        samples.append((np.append(prompt, labels[at : at + REMOTE_TARGETS]), ranges))
        topks.append(topk[at : at + REMOTE_TARGETS])
    os.environ |= environment
    identity = make_identity(k=64, vocab_size=VOCAB_SIZE, shard_rows=REMOTE_SHARD_ROWS)
    write_cache(URL, samples, topks, identity=identity)
    objects = Cache.open(URL).shards[0].objects
    return sum(item.size for item in objects if item.path.startswith("shards/"))


@contextmanager
def _served(url: str, environment: Mapping[str, str] = {}) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "logitcache_storage.cli", "serve", url, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\S+", process.stdout.readline())
        assert found is not None
        yield process, found[0].rstrip("/")
    finally:
        process.terminate()
        process.wait(10)


def _wait_for_statistics(address: str) -> None:
    while b"data-done" not in urllib.request.urlopen(f"{address}/progress").read():
        time.sleep(0.05)


def _seconds(address: str) -> float:
    start = time.perf_counter()
    urllib.request.urlopen(address).read()
    return round(time.perf_counter() - start, 3)


def _peak_gigabytes(process: subprocess.Popen[str]) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return round(int(found[1]) * 1024 / 1e9, 2)


def writing_cost(num_rows: int = 65_536, k: int = 64, rows_per_sample: int = 128) -> dict[str, Any]:
    """Bytes of a shard with statistics against one without; seconds of making them against `commit_shard` without."""
    rng = np.random.default_rng(0)
    topk, labels = make_rows(rng, num_rows, k, 151_936)
    lengths = [rows_per_sample] * (num_rows // rows_per_sample)
    identity = make_identity(k=k, vocab_size=151_936, container="zarr")
    rows = row_statistics(topk, labels)  # which a commit needs for its sums as well
    committing, summarising = [], []
    for _ in range(3):
        start = time.process_time()
        store = open_store(f"memory://{new_attempt()}")
        record = commit_shard(store, identity, 0, topk, labels, seconds=0.0, worker="bench")
        committing.append(time.process_time() - start)
        start = time.process_time()
        data = dump_statistics(summarise(rows, topk, lengths))
        summarising.append(time.process_time() - start)
    return {
        "bytes_percent": round(100 * len(data) / record.num_bytes, 2),
        "seconds_percent": round(100 * min(summarising) / min(committing), 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2])
    else:
        parts = {"measure": measure, "serve": measure_pages}
        print(json.dumps(parts[sys.argv[1]](sys.argv[2]) if sys.argv[1:] else run(), indent=1))
