"""What a build will take, before it is started: tokens, bytes, hours, money. Nothing is written.

The corpus is planned as a build would plan it, and a random draw of its samples is scored in this process, or by one
worker of the Ray cluster where the teacher spans nodes:

    bytes    the rows of some samples are encoded and packed as a shard is. A shard's bytes are a part that it has
             without any row, and one per row; both are extrapolated to the plan. The interval is a delete-a-group
             jackknife over NUM_GROUPS groups of samples (Efron, 1982), with Student's t.
    hours    samples are scored for so many seconds after a warm-up. Storing is not in the rate, and as many workers are
             taken to be as many times as fast; the longest shard is a lower bound.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache_pipeline.cluster import ray_cluster
from logitcache_pipeline.engines.base import ScoringRequest, Teacher, load_teacher
from logitcache_pipeline.plan import PlanSummary, render_report
from logitcache_pipeline.prepare import Prepared, plan_summary, prepare_extension
from logitcache_pipeline.remote_teacher import RemoteTeacher, teacher_on_cluster
from logitcache_pipeline.settings import BuildSettings
from logitcache_storage.encoding import encode
from logitcache_storage.errors import InputError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.samples import target_positions
from logitcache_storage.schema import CacheIdentity
from logitcache_storage.shard_format import shard_format
from logitcache_storage.terminal import counted, format_bytes, format_count, format_duration
from logitcache_storage.topk import TopKLogProbs

DEFAULT_SAMPLE_ROWS = 2000
MAX_WEIGHT_BYTES = 2_000_000_000
"""Teachers with larger weights are loaded for a dry run only where that is asked for."""

NUM_DRAWN = 1024
NUM_GROUPS = 8
T_95 = 2.365
"""0.975 quantile of Student's t with NUM_GROUPS - 1 degrees of freedom."""

LEAST_ROUND_TOKENS = 256
MOST_ROUND_TOKENS = 1 << 18

BYTES_PER_ENTRY = {
    "zarr": {"u8": 2.5, "u10": 2.8, "fp16": 3.2, "fp32": 4.8},
    "arrow": {"u8": 3.3, "u10": 3.9, "fp16": 4.4, "fp32": 6.7},
}
"""Of an id and its log-prob, where the ids of neighbouring rows have nothing in common; measured on made-up rows."""
TEXT_SHARE = 0.75
"""As much of that may be left where they have: text repeats itself."""
BYTES_PER_ROW = 10
"""Of what a row has besides."""
BYTES_PER_LABEL = (2.0, 4.2)
"""Of a row with k = 0, at least and at most."""


def estimate(store: ObjectStore, prepared: Prepared) -> dict[str, Any]:
    """Plan the corpus, and score as much of it as the settings say.

    Args:
        store: where the cache will be, or is, for an extension.
        prepared: the corpus and the settings of the dry run.

    Returns:
        JSON values; fields are only ever added. `plan_in_cache` is the number of the plan where the cache to be
        extended has these data already, and there is nothing else then.

    Raises:
        InputError: what the build itself would refuse, or a teacher that cannot be loaded here.
    """
    base = None
    if prepared.settings.extend:
        prepared, base = prepare_extension(store, prepared)
        if (number := base.number_of(prepared.corpus_identity)) is not None:
            return {"plan_in_cache": number}
    draw = SampleDraw(NUM_DRAWN)
    summary = plan_summary(prepared, base, draw.see)
    settings, dtype = prepared.settings, _dtype(prepared.settings)
    identity = prepared.identity(dtype)
    found: dict[str, Any] = {
        "plan_in_cache": None,
        "shards": len(summary.shard_num_rows),
        "shard_rows": prepared.shard_rows,
        "largest_shard_rows": max(summary.shard_num_rows),
        "report": summary.report,
        "rate": None,
        "run": None,
    }
    sample_rows = settings.sample_rows if settings.sample_rows is not None else default_sample_rows(settings)
    if not sample_rows and settings.calibrate is None:
        return {**found, "bytes": _typical_bytes(identity, summary)}
    requests = draw.requests()
    with _teacher(settings, dtype) as teacher:
        found["bytes"] = (
            sampled_bytes(teacher, requests, identity, summary, sample_rows)
            if sample_rows
            else _typical_bytes(identity, summary)
        )
        if settings.calibrate is not None:
            rate = measure_rate(teacher, requests, settings.k, settings.calibrate)
            found["rate"] = {**rate, **_device(settings, dtype)}
            found["run"] = _run(settings, summary, found["rate"])
    return found


def default_sample_rows(settings: BuildSettings) -> int:
    """DEFAULT_SAMPLE_ROWS where the teacher is loaded anyway, or stands in a folder and is small; else 0.

    One that is spread over nodes is not small.
    """
    if settings.calibrate is not None:
        return DEFAULT_SAMPLE_ROWS
    if settings.nodes_per_worker > 1:
        return 0
    folder = Path(settings.teacher)
    weights = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    is_small = 0 < sum(file.stat().st_size for file in weights) <= MAX_WEIGHT_BYTES
    return DEFAULT_SAMPLE_ROWS if is_small else 0


def render_estimate(found: dict[str, Any]) -> str:
    """The estimate in a few lines for people."""
    if found["plan_in_cache"] is not None:
        return f"plan {found['plan_in_cache']} of the cache is of these data already: nothing would be added"
    report = found["report"]
    lines = [render_report(report)]
    tokens, targets = report["tokens_per_sample"], report["targets_per_sample"]
    lines.append(
        f"shortest {tokens['min']:,}, 5% up to {tokens['p5']:,}, 99% up to {tokens['p99']:,}; targets per sample:"
        f" median {targets['p50']:,}, 95% up to {targets['p95']:,}, longest {targets['max']:,}"
    )
    lines.append(f"{counted(found['shards'], 'shard')} of up to {found['shard_rows']:,} target rows")
    lines.append(_bytes_line(found["bytes"]))
    if (rate := found["rate"]) is not None:
        lines.append(
            f"{format_count(rate['target_tokens_per_second'])} target tokens/s,"
            f" {format_count(rate['tokens_per_second'])} tokens/s in {rate['dtype']} on {rate['device']},"
            f" measured over {rate['seconds']:.1f} s; storing is not in it"
        )
    if (run := found["run"]) is not None:
        lines.append(_run_line(run))
    return "\n".join([*lines, "nothing was written"])


class SampleDraw:
    """A uniform random draw from samples that come by in tables; the same for the same samples."""

    def __init__(self, num_samples: int, seed: int = 0) -> None:
        self._num_samples, self._rng = num_samples, np.random.default_rng(seed)
        self._drawn: list[tuple[float, ScoringRequest]] = []

    def see(self, table: pa.Table) -> None:
        """Consider the samples of a table of the schema `SAMPLES_SCHEMA`: those with the lowest lots stay."""
        lots = self._rng.random(len(table))
        ids, ranges = (table.column(name).combine_chunks() for name in ("input_ids", "target_ranges"))
        highest = self._drawn[-1][0] if len(self._drawn) == self._num_samples else math.inf
        for row in np.argsort(lots)[: self._num_samples].tolist():
            if lots[row] >= highest:
                break
            positions = target_positions(ranges[row].values.to_numpy())
            request = ScoringRequest(ids[row].values.to_numpy().copy(), positions)
            self._drawn.append((float(lots[row]), request))
        self._drawn = sorted(self._drawn, key=lambda item: item[0])[: self._num_samples]

    def requests(self) -> list[ScoringRequest]:
        """What was drawn, in random order."""
        return [request for _, request in self._drawn]


def sampled_bytes(
    teacher: Teacher | RemoteTeacher,
    requests: Sequence[ScoringRequest],
    identity: CacheIdentity,
    summary: PlanSummary,
    sample_rows: int,
) -> dict[str, Any]:
    """Bytes of all shards of a plan, with a 95% interval, from the first samples that have `sample_rows` target rows.

    Args:
        teacher: the cache's.
        requests: samples in random order.
        identity: of the cache.
        summary: of its plan.
        sample_rows: at least 1.
    """
    num_rows = np.cumsum([len(request.target_positions) for request in requests])
    chosen = requests[: int(np.searchsorted(num_rows, sample_rows)) + 1]
    rows = teacher.score(chosen, identity.k)
    if identity.kept_mass < 1.0:
        rows = [topk.keep_mass(identity.kept_mass) for topk in rows]
    empty = _packed_bytes(rows[0][:0], identity)

    def total(parts: Sequence[TopKLogProbs]) -> float:
        topk = TopKLogProbs.concatenate(parts)
        per_row = (_packed_bytes(topk, identity) - empty) / len(topk)
        return summary.num_rows * per_row + len(summary.shard_num_rows) * empty

    middle, error = total(rows), None
    if len(rows) >= NUM_GROUPS:
        groups = [[topk for i, topk in enumerate(rows) if i % NUM_GROUPS != group] for group in range(NUM_GROUPS)]
        error = T_95 * math.sqrt((NUM_GROUPS - 1) * float(np.var([total(group) for group in groups])))
    return {
        "total": round(middle),
        "low": None if error is None else round(max(middle - error, 0.0)),
        "high": None if error is None else round(middle + error),
        "per_target_token": round(middle / summary.num_rows, 3),
        "sampled_target_tokens": int(sum(map(len, rows))),
    }


def measure_rate(
    teacher: Teacher | RemoteTeacher, requests: Sequence[ScoringRequest], k: int, seconds: float
) -> dict[str, Any]:
    """Tokens per second of scoring alone, over at least so many seconds after a warm-up.

    Rounds grow during the warm-up until one takes an eighth of the time: batches are better where there is more to
    choose from, as in a shard.
    """
    stream = itertools.cycle(requests)
    round_tokens = LEAST_ROUND_TOKENS
    teacher.score(_take(stream, round_tokens), k)
    while round_tokens < MOST_ROUND_TOKENS:
        start = time.perf_counter()
        teacher.score(_take(stream, round_tokens), k)
        if time.perf_counter() - start >= seconds / 8:
            break
        round_tokens *= 2
    num_tokens = num_rows = 0
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        chosen = _take(stream, round_tokens)
        teacher.score(chosen, k)
        num_tokens += sum(len(request.input_ids) for request in chosen)
        num_rows += sum(len(request.target_positions) for request in chosen)
    return {
        "target_tokens_per_second": num_rows / took,
        "tokens_per_second": num_tokens / took,
        "seconds": round(took, 3),
        "measured_target_tokens": num_rows,
    }


def _take(stream: Iterator[ScoringRequest], num_tokens: int) -> list[ScoringRequest]:
    """The next requests, with at least so many tokens."""
    taken = [next(stream)]
    left = num_tokens - len(taken[0].input_ids)
    while left > 0:
        taken.append(next(stream))
        left -= len(taken[-1].input_ids)
    return taken


def _packed_bytes(topk: TopKLogProbs, identity: CacheIdentity) -> int:
    columns = encode(topk, identity.precision, identity.id_layout)
    attributes = {"shard": 0, "precision": identity.precision, "id_layout": identity.id_layout}
    return sum(map(len, shard_format(identity.container).write(columns, attributes).values()))


def _typical_bytes(identity: CacheIdentity, summary: PlanSummary) -> dict[str, Any]:
    entries = BYTES_PER_ENTRY[identity.container][identity.precision] * identity.k
    least = TEXT_SHARE * entries if identity.kept_mass == 1.0 else 0.0
    low, high = (least + BYTES_PER_ROW, entries + BYTES_PER_ROW) if identity.k else BYTES_PER_LABEL
    return {
        "total": None,
        "low": round(low * summary.num_rows),
        "high": round(high * summary.num_rows),
        "per_target_token": None,
        "sampled_target_tokens": 0,
    }


def _run(settings: BuildSettings, summary: PlanSummary, rate: dict[str, Any]) -> dict[str, Any]:
    workers = settings.workers or 1
    seconds = max(summary.num_rows / workers, max(summary.shard_num_rows)) / rate["target_tokens_per_second"]
    gpus = 1.0 if settings.devices_per_worker is None else settings.devices_per_worker
    price = settings.price_per_gpu_hour
    gpu_hours = seconds / 3600 * workers * gpus
    return {
        "workers": workers,
        "hours": seconds / 3600,
        "gpus_per_worker": gpus,
        "price_per_gpu_hour": price,
        "gpu_hours": None if price is None else gpu_hours,
        "cost": None if price is None else gpu_hours * price,
    }


def _bytes_line(found: dict[str, Any]) -> str:
    if found["total"] is None:
        between = f"{format_bytes(found['low'])} and {format_bytes(found['high'])}"
        return (
            f"typically between {between} in shards: the teacher was not asked; --sample-rows {DEFAULT_SAMPLE_ROWS}"
            " scores some rows here and says it more precisely"
        )
    interval = ""
    if found["low"] is not None:
        interval = f" (95%: {format_bytes(found['low'])} to {format_bytes(found['high'])})"
    return (
        f"about {format_bytes(found['total'])} in shards{interval}, {found['per_target_token']:.1f} bytes per target"
        f" token, from {found['sampled_target_tokens']:,} that were scored"
    )


def _run_line(run: dict[str, Any]) -> str:
    workers = "1 worker like this one" if run["workers"] == 1 else f"{run['workers']:,} workers like this one"
    line = f"{format_duration(run['hours'] * 3600)} with {workers}"
    if run["cost"] is None:
        return line
    per_worker = "1 GPU" if run["gpus_per_worker"] == 1 else f"{run['gpus_per_worker']:g} GPUs"
    return (
        f"{line}, {run['gpu_hours']:,.2f} GPU-hours at {run['price_per_gpu_hour']:g}: {run['cost']:,.2f}"
        f" ({per_worker} per worker)"
    )


def _dtype(settings: BuildSettings) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if _on_gpu(settings) else "float32"


@contextmanager
def _teacher(settings: BuildSettings, dtype: str) -> Iterator[Teacher | RemoteTeacher]:
    """The teacher as one worker has it: in this process, or, where it spans nodes, on the Ray cluster."""
    if settings.nodes_per_worker == 1:
        yield _load(settings, dtype)
        return
    folder = Path(settings.teacher)
    path = str(folder.absolute()) if folder.is_dir() else settings.teacher
    arguments = settings.engine, path, dtype
    with ray_cluster(settings.ray_address, 1, settings.devices_per_worker, settings.nodes_per_worker) as cluster:
        if not cluster.num_placeable:
            raise InputError(
                f"the Ray cluster has no {settings.nodes_per_worker} nodes now with the {settings.tensor_parallel} GPUs"
                " that --sample-rows and --calibrate ask; start them, or leave the two options out"
            )
        with teacher_on_cluster(cluster, *arguments, **settings.teacher_options) as teacher:
            yield teacher


def _load(settings: BuildSettings, dtype: str) -> Teacher:
    """The teacher in this process: on a CPU with a worker's share of the cores. vLLM takes the devices that it sees."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # the estimate is one text, or one JSON object
    on_gpu = _on_gpu(settings)
    if settings.ray_address is None and not on_gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // (settings.workers or 1)))
    device = None if on_gpu or settings.engine == "vllm" else "cpu"
    return load_teacher(settings.engine, settings.teacher, dtype, **{"device": device, **settings.teacher_options})


def _device(settings: BuildSettings, dtype: str) -> dict[str, Any]:
    import torch

    if settings.nodes_per_worker > 1:
        return {"device": f"{settings.tensor_parallel} GPUs of {settings.nodes_per_worker} nodes", "dtype": dtype}
    cores = f"{counted(torch.get_num_threads(), 'CPU thread')} ({platform.machine()})"
    return {"device": torch.cuda.get_device_name() if _on_gpu(settings) else cores, "dtype": dtype}


def _on_gpu(settings: BuildSettings) -> bool:
    import torch

    return settings.nodes_per_worker > 1 or (torch.cuda.is_available() and settings.devices_per_worker != 0)
