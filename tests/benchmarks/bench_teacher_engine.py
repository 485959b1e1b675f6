"""The teacher engine on the GSM8K file: its speed against the bare forward pass and the obvious code, and its error.

Models: two Qwen2 of random weights, float32 on two threads; `153M` has Qwen2's own vocabulary.
Text: the first records of the file under a byte-level BPE of 8,192 ids trained on it; targets are the answers.
What is compared is timed in turn within each round; ratios are medians of those within a round. Ratios of wall time are
what a user sees; those of the process's CPU time move less when other work shares the machine.

    engine     `TransformersTeacher.score`, k = 64
    bare       the same batches through the backbone, and the head at the same target positions, in the same chunks into
               the same memory; nothing is kept of the logits
    obvious_n  batches of n in corpus order, padded, with attention mask; log-softmax over [n, T, V], top-k and gather
               of the label; no tail. It holds two arrays [n, T, V]; an n whose arrays do not fit is left out

`arithmetic` is what `obvious_n` multiplies over what `engine` must: the ratio of a teacher so large that nothing else
counts.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import Shape, random_qwen2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2ForCausalLM

from logitcache_pipeline.engines.base import ScoringRequest
from logitcache_pipeline.engines.transformers import TransformersTeacher

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k-1000.jsonl"
K = 64
THREADS = 2
BARE_ROUNDS = 7
OBVIOUS_ROUNDS = 2
OBVIOUS_BATCHES = (8, 16, 32)
SHAPES = {"42M": Shape(32768, 512, 1408, 8), "153M": Shape(151936, 768, 2048, 6)}
NUM_RECORDS = {"42M": 64, "153M": 32}
"""That each model scores."""


def run() -> dict[str, Any]:
    """Measure; ratios are of throughputs on the same samples."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    requests = gsm8k_requests(max(NUM_RECORDS.values()))
    try:
        measured = {name: measure(shape, requests[: NUM_RECORDS[name]]) for name, shape in SHAPES.items()}
    finally:
        torch.set_num_threads(threads)
    return {"threads": THREADS, "k": K, "dtype": "float32", **measured}


def measure(shape: Shape, requests: list[ScoringRequest]) -> dict[str, Any]:
    """One model, with the thread count as it is."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_qwen2(shape).eval()
        model.save_pretrained(folder)
        teacher = TransformersTeacher.load(folder, dtype="float32", device="cpu")
    engine = {"engine": lambda: teacher.score(requests, K)}
    sizes = affordable_batches(shape, requests)
    return {
        "parameters": model.num_parameters(),
        "shape": f"D={shape.hidden_size}, {shape.num_layers} layers, V={shape.vocab_size}",
        "layout": teacher.layout,
        "samples": len(requests),
        "tokens": sum(len(r.input_ids) for r in requests),
        "targets": sum(len(r.target_positions) for r in requests),
        **compare({**engine, "bare": lambda: bare(teacher, requests)}, BARE_ROUNDS),
        **compare({**engine, **{f"obvious_{n}": partial(obvious, model, requests, n) for n in sizes}}, OBVIOUS_ROUNDS),
        "arithmetic": {f"obvious_{n}": arithmetic(model, shape, requests, n) for n in sizes},
        "max_abs_difference": max_differences(teacher, model, requests[:16]),
    }


def affordable_batches(shape: Shape, requests: list[ScoringRequest]) -> list[int]:
    """Sizes of batches whose two arrays [n, T, V] fit into this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    longest = max(len(r.input_ids) for r in requests)
    return [n for n in OBVIOUS_BATCHES if 2 * 4 * n * longest * shape.vocab_size < 0.7 * memory]


def arithmetic(model: Qwen2ForCausalLM, shape: Shape, requests: list[ScoringRequest], batch_size: int) -> float:
    """See the module's docstring."""
    lengths = [len(r.input_ids) for r in requests]
    num_padded = sum(len(rows) * max(rows) for rows in batched(lengths, batch_size))
    num_targets = sum(len(r.target_positions) for r in requests)
    head = shape.vocab_size * shape.hidden_size
    backbone = model.num_parameters() - head
    return num_padded * (backbone + head) / (sum(lengths) * backbone + num_targets * head)


def gsm8k_requests(num_records: int) -> list[ScoringRequest]:
    """The first records as question, newline, answer, end; the answer and the end are targets."""
    records = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((r[field] for r in records for field in ("question", "answer")), trainer)
    requests = []
    for record in records[:num_records]:
        prompt = tokenizer.encode(record["question"] + "\n").ids
        ids = [*prompt, *tokenizer.encode(record["answer"]).ids, 0]
        targets = np.arange(len(prompt), len(ids), dtype=np.int32)
        requests.append(ScoringRequest(np.array(ids, dtype=np.int32), targets))
    return requests


def compare(variants: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """How many times as fast as each other variant the engine is, by wall and by CPU time, the median over rounds.

    A first round of the first two is not counted.
    """
    for variant in list(variants.values())[:2]:
        variant()
    ratios = defaultdict(list)
    for _ in range(num_rounds):
        seconds = {name: timed(variant) for name, variant in variants.items()}
        wall, cpu = seconds.pop("engine")
        for name, (other_wall, other_cpu) in seconds.items():
            ratios[f"engine_over_{name}"].append(other_wall / wall)
            ratios[f"engine_over_{name}_cpu_time"].append(other_cpu / cpu)
    return {name: statistics.median(values) for name, values in ratios.items()}


def timed(variant: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start = time.perf_counter(), time.process_time()
    variant()
    return time.perf_counter() - start[0], time.process_time() - start[1]


@torch.inference_mode()
def bare(teacher: TransformersTeacher, requests: list[ScoringRequest]) -> None:
    """Backbone and head over the engine's batches and target positions."""
    for batch in teacher.batches([len(r.input_ids) for r in requests]):
        chosen = [requests[i] for i in batch]
        hidden = teacher._hidden([r.input_ids for r in chosen], [r.target_positions for r in chosen], teacher.layout)
        for chunk in torch.split(hidden, teacher._head.rows_per_chunk):
            teacher._head.logits(chunk)


@torch.inference_mode()
def obvious(model: Qwen2ForCausalLM, requests: list[ScoringRequest], batch_size: int) -> list[tuple[np.ndarray, ...]]:
    """What one writes first: ids, log-probs and label log-probs of each request."""
    scored = []
    for batch in batched(requests, batch_size):
        rows = [torch.from_numpy(r.input_ids.astype(np.int64)) for r in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        top = log_probs.topk(K)
        label = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        for i, request in enumerate(batch):
            at = torch.from_numpy(request.target_positions.astype(np.int64)) - 1
            scored.append((top.indices[i, at].numpy(), top.values[i, at].numpy(), label[i, at].numpy()))
    return scored


def batched(items: list[Any], n: int) -> list[list[Any]]:
    """Runs of n in their order; the last may be shorter."""
    return [items[i : i + n] for i in range(0, len(items), n)]


@torch.inference_mode()
def max_differences(
    teacher: TransformersTeacher, model: Qwen2ForCausalLM, requests: list[ScoringRequest]
) -> dict[str, float]:
    """Against the float32 log-softmax over the full vocabulary of each sample alone; the tail in float64 from it."""
    worst = {"top_k": 0.0, "tail": 0.0, "label": 0.0}
    for request, scored in zip(requests, teacher.score(requests, K), strict=True):
        ids = torch.from_numpy(request.input_ids.astype(np.int64))
        at = torch.from_numpy(request.target_positions.astype(np.int64))
        full = model(input_ids=ids[None]).logits[0, at - 1].log_softmax(-1)
        outside = full.double().scatter(1, torch.from_numpy(scored.ids).long(), -torch.inf)
        expected = {
            "top_k": (full.topk(K).values, scored.log_probs),
            "tail": (outside.logsumexp(1), scored.log_tail),
            "label": (full.gather(1, ids[at, None])[:, 0], scored.label_log_prob),
        }
        for name, (a, b) in expected.items():
            worst[name] = max(worst[name], float((a - torch.from_numpy(b)).abs().max()))
    return worst


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
