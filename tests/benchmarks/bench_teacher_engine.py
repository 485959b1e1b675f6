"""The teacher engine on the GSM8K file: its speed against the bare forward pass and the obvious code, and its error.

Models: two Qwen2 of random weights, float32 on two threads; `153M` has Qwen2's own vocabulary.
Text: the first records of the file under a byte-level BPE of 8,192 ids trained on it; targets are the answers.
All variants are timed in turn within each round; ratios are medians of those within a round. Ratios of wall time are
what a user sees; those of the process's CPU time hardly move when other work shares the machine.

    engine     `TransformersTeacher.score`, k = 64
    bare       the same batches through the backbone, and the head at the same target positions, in the same chunks into
               the same memory; nothing is kept of the logits
    obvious    batches of 8 in corpus order, padded, with attention mask; log-softmax over [n, T, V], top-k and gather
               of the label; no tail

`arithmetic` is what `obvious` multiplies over what `engine` must: the ratio of a teacher so large that nothing else
counts.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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
ROUNDS = 3
OBVIOUS_BATCH = 8


SHAPES = {"42M": Shape(32768, 512, 1408, 8), "153M": Shape(151936, 768, 2048, 6)}
NUM_RECORDS = {"42M": 48, "153M": 20}
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
    num_tokens = sum(len(r.input_ids) for r in requests)
    num_targets = sum(len(r.target_positions) for r in requests)
    with tempfile.TemporaryDirectory() as folder:
        model = random_qwen2(shape).eval()
        model.save_pretrained(folder)
        teacher = TransformersTeacher.load(folder, dtype="float32", device="cpu")
    variants: dict[str, Callable[[], object]] = {
        "engine": lambda: teacher.score(requests, K),
        "bare": lambda: bare(teacher, requests),
        "obvious": lambda: [*obvious(model, requests)],
    }
    wall, cpu = interleaved(variants)
    head = shape.vocab_size * shape.hidden_size
    backbone = model.num_parameters() - head
    lengths = [len(r.input_ids) for r in requests]
    padded = [lengths[i : i + OBVIOUS_BATCH] for i in range(0, len(lengths), OBVIOUS_BATCH)]
    num_padded = sum(len(batch) * max(batch) for batch in padded)
    return {
        "parameters": model.num_parameters(),
        "shape": f"D={shape.hidden_size}, {shape.num_layers} layers, V={shape.vocab_size}",
        "layout": teacher.layout,
        "samples": len(requests),
        "tokens": num_tokens,
        "targets": num_targets,
        "padding_share_of_obvious": 1 - num_tokens / num_padded,
        "tokens_per_second": {name: num_tokens / statistics.median(seconds) for name, seconds in wall.items()},
        **{f"engine_over_{name}": ratio(wall, name) for name in wall if name != "engine"},
        **{f"engine_over_{name}_cpu_time": ratio(cpu, name) for name in cpu if name != "engine"},
        "arithmetic": num_padded * (backbone + head) / (num_tokens * backbone + num_targets * head),
        "max_abs_difference": max_differences(teacher, model, requests[:16]),
    }


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


def interleaved(variants: dict[str, Callable[[], object]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of each variant in each round; a first round of all but the last is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for variant in list(variants.values())[:-1]:
        variant()
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            start = time.perf_counter(), time.process_time()
            variant()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    return wall, cpu


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """How many times as fast as `name` the engine is, the median over rounds."""
    return statistics.median(b / a for a, b in zip(seconds["engine"], seconds[name], strict=True))


@torch.inference_mode()
def bare(teacher: TransformersTeacher, requests: list[ScoringRequest]) -> None:
    """Backbone and head over the engine's batches and target positions."""
    for batch in teacher.batches([len(r.input_ids) for r in requests]):
        chosen = [requests[i] for i in batch]
        hidden = teacher._hidden([r.input_ids for r in chosen], [r.target_positions for r in chosen], teacher.layout)
        for chunk in torch.split(hidden, teacher._head.rows_per_chunk):
            teacher._head.logits(chunk)


@torch.inference_mode()
def obvious(model: Qwen2ForCausalLM, requests: list[ScoringRequest]) -> Iterator[tuple[np.ndarray, ...]]:
    """What one writes first: ids, log-probs and label log-probs of each request."""
    for start in range(0, len(requests), OBVIOUS_BATCH):
        batch = requests[start : start + OBVIOUS_BATCH]
        rows = [torch.from_numpy(r.input_ids.astype(np.int64)) for r in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        top = log_probs.topk(K)
        label = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        for i, request in enumerate(batch):
            at = torch.from_numpy(request.target_positions.astype(np.int64)) - 1
            yield top.indices[i, at].numpy(), top.values[i, at].numpy(), label[i, at].numpy()


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
