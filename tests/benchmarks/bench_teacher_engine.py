"""The teacher engine on the GSM8K file: its speed against the bare forward pass and the obvious code, and its error.

Model: Qwen2 of random weights, D = 512, 8 layers, 8 heads (2 for keys and values), V = 32,768, 42M parameters, float32.
Text: the first records of the file under a byte-level BPE of 8,192 ids trained on it; targets are the answers.
All variants are timed in turn within each round on one thread, and the medians of the rounds compared. Ratios of wall
time are what a user sees; those of the process's CPU time do not move when other work shares the machine.

    engine     `TransformersTeacher.score`, k = 64
    bare       the same batches through the backbone, and the head at the same target positions, in the same chunks into
               the same memory; nothing is kept of the logits
    bare_all   the same batches through `model(...)`: the head at every position, [n, T, V] at once
    obvious    batches of 8 in corpus order, padded, with attention mask; log-softmax over [n, T, V], top-k and gather
               of the label; no tail
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

from logitcache_pipeline.batching import collate
from logitcache_pipeline.engines.base import ScoringRequest
from logitcache_pipeline.engines.transformers import TransformersTeacher

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k-1000.jsonl"
K = 64
NUM_RECORDS = 48
ROUNDS = 3
OBVIOUS_BATCH = 8


def run() -> dict[str, Any]:
    """Measure; ratios are of throughputs on the same samples."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure()
    finally:
        torch.set_num_threads(threads)


def measure() -> dict[str, Any]:
    """`run` with the thread count as it is."""
    requests = gsm8k_requests()
    num_tokens = sum(len(r.input_ids) for r in requests)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model().eval()
        model.save_pretrained(folder)
        teacher = TransformersTeacher.load(folder, dtype="float32", device="cpu")
    variants: dict[str, Callable[[], object]] = {
        "engine": lambda: teacher.score(requests, K),
        "bare": lambda: bare(teacher, requests),
        "bare_all": lambda: bare_all(teacher, requests),
        "obvious": lambda: [*obvious(model, requests)],
    }
    wall, cpu = interleaved_medians(variants)
    lengths = [len(r.input_ids) for r in requests]
    padded = sum(len(b) * max(lengths[i] for i in b) for b in teacher.batches(lengths))
    return {
        "model": "Qwen2, D=512, 8 layers, V=32768, random, float32, CPU",
        "threads": 1,
        "k": K,
        "samples": len(requests),
        "tokens": num_tokens,
        "targets": sum(len(r.target_positions) for r in requests),
        "padding_share": 1 - num_tokens / padded,
        "tokens_per_second": {name: num_tokens / seconds for name, seconds in wall.items()},
        **{f"engine_over_{name}": wall[name] / wall["engine"] for name in wall if name != "engine"},
        **{f"engine_over_{name}_cpu_time": cpu[name] / cpu["engine"] for name in cpu if name != "engine"},
        "max_abs_difference": max_differences(teacher, model, requests[:32]),
    }


def gsm8k_requests() -> list[ScoringRequest]:
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
    for record in records[:NUM_RECORDS]:
        prompt = tokenizer.encode(record["question"] + "\n").ids
        ids = [*prompt, *tokenizer.encode(record["answer"]).ids, 0]
        targets = np.arange(len(prompt), len(ids), dtype=np.int32)
        requests.append(ScoringRequest(np.array(ids, dtype=np.int32), targets))
    return requests


def random_model() -> Qwen2ForCausalLM:
    """Weights of twice the usual spread, so that the distributions are not all but uniform."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32768,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.04,
        )
    )


def interleaved_medians(variants: dict[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall and CPU seconds of each variant; every round runs all of them, the first does not count."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS + 1):
        for name, variant in variants.items():
            start = time.perf_counter(), time.process_time()
            variant()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    medians = ({name: statistics.median(s[1:]) for name, s in seconds.items()} for seconds in (wall, cpu))
    return next(medians), next(medians)


@torch.inference_mode()
def bare(teacher: TransformersTeacher, requests: list[ScoringRequest]) -> None:
    """Backbone and head over the engine's batches and target positions."""
    model, head = teacher._model, teacher._head
    for batch in teacher.batches([len(r.input_ids) for r in requests]):
        inputs, starts = collate([requests[i].input_ids for i in batch], "padded")
        hidden = model.model(input_ids=torch.from_numpy(inputs["input_ids"]), use_cache=False).last_hidden_state
        rows = np.concatenate([s + requests[i].target_positions - 1 for i, s in zip(batch, starts, strict=True)])
        for chunk in hidden.flatten(0, 1)[torch.from_numpy(rows)].split(head.rows_per_chunk):
            head.logits(chunk)


@torch.inference_mode()
def bare_all(teacher: TransformersTeacher, requests: list[ScoringRequest]) -> None:
    """The model as it is over the engine's batches."""
    for batch in teacher.batches([len(r.input_ids) for r in requests]):
        inputs, _ = collate([requests[i].input_ids for i in batch], "padded")
        _ = teacher._model(input_ids=torch.from_numpy(inputs["input_ids"]), use_cache=False).logits


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
