"""On a CUDA device: the teacher engine's share of the bare forward pass, its tokens a second and its peak memory.

Model: Qwen2 of random weights, D = 2,048, 24 layers, V = 151,936, 1.4B parameters, bfloat16. Random tokens in sequences
of 60 to 420, as those of GSM8K, of which the last three fifths are targets; k = 64.

    engine     `TransformersTeacher.score`
    compiled   the same with `compile=True`
    bare       the engine's batches through the backbone, and the head at the same target positions, in the same chunks
               into the same memory; nothing is kept of the logits

Times are medians of wall seconds after a warm-up, the variants in turn; ratios are medians within a round. The answers
are compared with a float32 log-softmax of the model's own logits, lest something be timed that computes another thing.

    python tests/benchmarks/bench_gpu_teacher.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_teacher_engine import bare, ratio
from random_models import Shape, random_qwen2
from transformers import Qwen2ForCausalLM

from logitcache_pipeline.engines.base import ScoringRequest
from logitcache_pipeline.engines.transformers import TransformersTeacher
from logitcache_storage.topk import TopKLogProbs

SHAPE = Shape(151_936, 2048, 5632, 24, head_size=128)
K, NUM_SEQUENCES, ROUNDS, CHECKED = 64, 800, 5, 8


def run() -> dict[str, Any]:
    """Shares, rates, memory and differences."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    requests = random_requests()
    num_tokens = sum(len(r.input_ids) for r in requests)
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = save_model(folder)
        teacher = TransformersTeacher.load(folder, device="cuda")
        compiled = TransformersTeacher.load(folder, device="cuda", compile=True)
        own = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    variants: dict[str, Callable[[], object]] = {
        "engine": lambda: teacher.score(requests, K),
        "compiled": lambda: compiled.score(requests, K),
        "bare": lambda: bare(teacher, requests),
    }
    peaks = {name: peak_bytes(variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            seconds[name].append(timed(variant))
    return {
        "device": torch.cuda.get_device_name(),
        "parameters": num_parameters,
        "dtype": teacher.identity.dtype,
        "layout": teacher.layout,
        "tokens": num_tokens,
        "batches": len(teacher.batches([len(r.input_ids) for r in requests])),
        "tokens_per_second": {name: round(num_tokens / statistics.median(s)) for name, s in seconds.items()},
        "engine_over_bare": ratio(seconds, "bare"),
        "engine_over_compiled": ratio(seconds, "compiled"),
        "peak_mib_above_weights": {name: round(value / 2**20) for name, value in peaks.items()},
        "max_abs_difference": max_difference(own, requests[:CHECKED], teacher.score(requests[:CHECKED], K)),
    }


def random_requests() -> list[ScoringRequest]:
    """Token ids of no meaning in sequences of GSM8K's lengths."""
    rng = np.random.default_rng(0)
    requests = []
    for length in rng.gamma(6.0, 25.0, NUM_SEQUENCES).clip(60, 420).astype(int):
        targets = np.arange(int(0.4 * length), length, dtype=np.int32)
        requests.append(ScoringRequest(rng.integers(SHAPE.vocab_size, size=length, dtype=np.int32), targets))
    return requests


def save_model(folder: str) -> int:
    """Write it; returns its number of parameters."""
    with torch.device("cuda"):
        model = random_qwen2(SHAPE).to(torch.bfloat16)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def timed(variant: Callable[[], object]) -> float:
    """Wall seconds until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    variant()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(variant: Callable[[], object]) -> int:
    """Above what is held before, in a first call, which warms up."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(variant)
    return torch.cuda.max_memory_allocated() - before


@torch.inference_mode()
def max_difference(model: Qwen2ForCausalLM, requests: list[ScoringRequest], answers: list[TopKLogProbs]) -> float:
    """Of label log-probs, in nats: bfloat16 rounds differently alone and in a batch."""
    worst = 0.0
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.from_numpy(request.input_ids.astype(np.int64)).cuda()
        at = torch.from_numpy(request.target_positions.astype(np.int64)).cuda()
        log_probs = model(input_ids=ids[None]).logits[0, at - 1].float().log_softmax(-1)
        expected = log_probs.gather(1, ids[at, None])[:, 0].cpu()
        worst = max(worst, float((expected - torch.from_numpy(answer.label_log_prob)).abs().max()))
    return worst


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
