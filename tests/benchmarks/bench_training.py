"""A student's training step against `model(labels=...)`, the loader's rate, two ranks against one, and resuming.

Model: Llama of random weights, D = 256, 2 layers, V = 151,936, float32; 512 tokens, all but the first of each sample
targets; k = 64. A step is forward and backward; the optimizer's part is the same for both. Sides take turns within a
round, and the ratio is the median over rounds of the ratio within a round.

    python tests/benchmarks/bench_training.py
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from logitcache_storage.cache import Cache
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache
from logitcache_train.collate import TrainingSample, collate
from logitcache_train.data import CachedSamples, GlobalBatchSampler
from logitcache_train.demo.models import build_tokenizer
from logitcache_train.objectives import objective
from logitcache_train.student import make_student

VOCAB_SIZE, HIDDEN_SIZE, NUM_SAMPLES, LENGTH, K = 151_936, 256, 8, 64, 64
NUM_THREADS, ROUNDS = 2, 5


def run() -> dict[str, Any]:
    """All measures; the bounds are 1.0 for the step, 1e-5 for the losses, and equal bits for the resumed weights."""
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {**training_step(), "loader_target_rows_per_second": loader_rate(folder), **whole_runs(folder)}


def training_step() -> dict[str, float]:
    """Time of the fused step over that of `model(labels=...)`, for plain SFT and for `target_sft`."""
    torch.manual_seed(0)
    samples = _samples()
    batch = collate(samples, num_items=NUM_SAMPLES * (LENGTH - 1), layout="padded")
    models = {"materialised": _model()}
    for name in ("sft", "target_sft"):
        models[name] = _model()
        make_student(models[name], objective(name), vocab_size=VOCAB_SIZE)

    def step(name: str) -> None:
        model = models[name]
        model.zero_grad(set_to_none=True)
        if name == "materialised":
            model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss.backward()
        else:
            model(**batch)["loss"].backward()

    seconds = _interleaved({name: lambda name=name: step(name) for name in models})
    return {
        f"{name}_step_over_model_labels": round(
            statistics.median(a / b for a, b in zip(seconds[name], seconds["materialised"], strict=True)), 3
        )
        for name in ("sft", "target_sft")
    } | {"model_labels_step_seconds": round(statistics.median(seconds["materialised"]), 3)}


def loader_rate(folder: Path) -> int:
    """Target rows per second of one process from a local Zarr cache to collated tensors, decoding included."""
    num_samples, vocab_size = 1500, 1000
    samples, topks = make_samples(num_samples, K, vocab_size, max_targets=200)
    identity = make_identity(vocab_size=vocab_size, k=K, shard_rows=8192)
    write_cache(str(folder / "large"), samples, topks, identity=identity)
    data = CachedSamples({"teacher": Cache.open(str(folder / "large"))}, objective("kd"), window_shards=8)
    sampler = GlobalBatchSampler(
        data, batch_tokens=4096, window_shards=8, seed=0, rank=0, world_size=1, accumulation_steps=1
    )
    start, rows = time.perf_counter(), 0
    for part in sampler:
        micro = data.__getitems__(part)
        rows += len(collate(micro.samples, num_items=micro.num_items, layout="padded")["targets"].labels_N)
    return round(rows / (time.perf_counter() - start))


def whole_runs(folder: Path) -> dict[str, Any]:
    """Losses of two ranks against one, and the weights of a run that was resumed in mid-epoch."""
    _write_student_and_cache(folder)
    one = _train(folder, "one", ranks=1)
    two = _train(folder, "two", ranks=2)
    checkpoint = folder / "one" / "checkpoint-7"
    _train(folder, "resumed", ranks=1, resume_from_checkpoint=checkpoint)
    expected, found = (load_file(folder / name / "model.safetensors") for name in ("one", "resumed"))
    return {
        "two_ranks_max_loss_difference": max(abs(a - b) for a, b in zip(one, two, strict=True)),
        "resumed_weights_equal_bits": all(torch.equal(expected[name], found[name]) for name in expected),
    }


def _model() -> LlamaForCausalLM:
    sizes = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 2 * HIDDEN_SIZE, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=2, **sizes))


def _samples() -> list[TrainingSample]:
    rng = np.random.default_rng(0)
    positions = np.arange(1, LENGTH, dtype=np.int32)
    samples = []
    for i in range(NUM_SAMPLES):
        ids = rng.integers(1000, size=LENGTH).astype(np.int32)
        # Rows over a small vocabulary: which ids are kept makes no difference to the time.
        topk = make_topk(LENGTH - 1, K, 1000, seed=i, labels=ids[positions])
        samples.append(TrainingSample(str(i), ids, positions, {"teacher": topk}))
    return samples


def _interleaved(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def _write_student_and_cache(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "student")
    identity = make_identity(
        tokenizer=tokenizer_identity(tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template),
        vocab_size=len(tokenizer),
    )
    samples, topks = make_samples(80, identity.k, len(tokenizer))
    write_cache(str(folder / "cache"), samples, topks, identity=identity)


def _train(folder: Path, name: str, *, ranks: int, **changes: object) -> list[float]:
    options = {"student": folder / "student", "cache": folder / "cache", "output": folder / name}
    options |= {"objective": "target_sft", "learning_rate": 1e-3, "batch_tokens": 150, "max_steps": 20}
    options |= {"logging_steps": 1, "save_steps": 7, **changes}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launcher, "-m", "logitcache_train", *words], env=env, check=True, capture_output=True
    )
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
