"""Whole training steps of every objective against plain SFT, of `target_sft` against `model(labels=...)`, and memory.

Model: two layers of the shape of Qwen2.5-0.5B (D = 896, V = 151,936, tied head), random, float32; 16 samples of 128
targets, N = 2,048, k = 64, with the columns that objectives know. A step is forward and backward; the optimizer's part
is the same for all. Every step is put between two that it is compared with, and divided by their mean: the speed of a
machine that others use, too, drifts within a minute by more than what is measured. The ratios are medians over rounds,
by the clock and by the CPU time of the process. `model(labels=...)` makes logits of prompts, too: it is compared on
samples without a prompt, and on samples whose prompt is as long as their response. Peak memory is that of head and loss
as in `bench_fused_loss.py`, in units of `CHUNK_BYTES`.

    python tests/benchmarks/bench_objective_steps.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import bench_fused_loss
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from logitcache_storage.testing import make_topk
from logitcache_train import OBJECTIVES, objective
from logitcache_train.collate import TrainingSample, collate
from logitcache_train.fused import CHUNK_BYTES
from logitcache_train.student import make_student

LABELS, PROMPTED = "model(labels=...)", " with prompts"
VOCAB_SIZE, HIDDEN_SIZE, NUM_SAMPLES, NUM_TARGETS, K = 151_936, 896, 16, 128, 64
NUM_THREADS, ROUNDS = 2, 1
COMPARED = {
    "sft": [name for name in OBJECTIVES if name != "sft"],
    LABELS: ["sft", "target_sft"],
    LABELS + PROMPTED: ["target_sft" + PROMPTED],
}
"""What the steps are compared with, and which."""
BOUNDS = {"target_sft": 1.05, "gem": 1.3}
"""Of the time over plain SFT; it is 1.15 for the others, and 0.6 for `target_sft` over `model(labels=...)`."""
MEMORY_BOUND = 1.1

Step = Callable[[], None]


def run() -> dict[str, Any]:
    """Ratios by wall and by CPU time, memory in chunks, and what is above its bound."""
    torch.set_num_threads(NUM_THREADS)
    found = measure(make_steps())
    ratios = {
        f"{clock}_over_{'sft' if base == 'sft' else 'model_labels'}{'_with_prompts' * base.endswith(PROMPTED)}": {
            name.removesuffix(PROMPTED): round(statistics.median(r[i] for r in found[name, base]), 3) for name in names
        }
        for i, clock in enumerate(("wall", "cpu"))
        for base, names in COMPARED.items()
    }
    paths = ("sft", "target_sft", "gem")
    chunks = {name: round(bench_fused_loss.extra_bytes(name) / CHUNK_BYTES["cpu"], 3) for name in paths}
    return {
        **ratios,
        "peak_memory_in_chunks": chunks,
        "above_bound": [
            *(o for o, ratio in ratios["wall_over_sft"].items() if ratio > BOUNDS.get(o, 1.15)),
            *(
                f"{name} over {base}"
                for base in (LABELS, LABELS + PROMPTED)
                for name in COMPARED[base]
                if name.startswith("target_sft") and statistics.median(r[0] for r in found[name, base]) > 0.6
            ),
            *(f"memory of {name}" for name, ratio in chunks.items() if ratio > MEMORY_BOUND),
        ],
    }


def make_steps() -> dict[str, Callable[[], None]]:
    """A step of each objective, and of `model(labels=...)`, all on the same model and batch."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)

    def model_labels(prompt: int) -> Step:
        samples = _samples(prompt)
        ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples]).astype(np.int64))
        labels = torch.where(torch.arange(ids.shape[1]) > prompt, ids, -100)

        def step() -> None:
            _reset(model)
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()

        return step

    def student(name: str, prompt: int = 0) -> Step:
        batch = collate(_samples(prompt), num_items=NUM_SAMPLES * NUM_TARGETS, layout="padded")

        def step() -> None:
            _reset(model)
            make_student(model, objective(name), vocab_size=VOCAB_SIZE)
            model(**batch)["loss"].backward()

        return step

    return {
        **{name: student(name) for name in OBJECTIVES},
        LABELS: model_labels(0),
        "target_sft" + PROMPTED: student("target_sft", NUM_TARGETS),
        LABELS + PROMPTED: model_labels(NUM_TARGETS),
    }


def measure(steps: dict[str, Step]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """For each pair of what is measured and what it is compared with: a ratio of wall and of CPU time a round."""
    steps["sft"]()  # warms up
    ratios = defaultdict(list)
    for _ in range(ROUNDS):
        for base, names in COMPARED.items():
            before = _seconds(steps[base])
            for name in names:
                found, after = _seconds(steps[name]), _seconds(steps[base])
                ratios[name, base].append(tuple(2 * t / (a + b) for a, t, b in zip(before, found, after, strict=True)))
                before = after
    return ratios


def _seconds(step: Step) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def _reset(model: Any) -> None:
    """As loaded: without gradients, and without what `make_student` put in place of its forward pass."""
    model.zero_grad()
    vars(model).pop("forward", None)


def _samples(prompt: int) -> list[TrainingSample]:
    """Samples of `prompt` tokens, one more that is no target, and the targets."""
    rng = np.random.default_rng(0)
    positions = np.arange(prompt + 1, prompt + 1 + NUM_TARGETS, dtype=np.int32)
    samples = []
    for i in range(NUM_SAMPLES):
        ids = rng.integers(1000, size=prompt + 1 + NUM_TARGETS).astype(np.int32)
        # Rows over a small vocabulary: which ids are kept makes no difference to the time.
        topk = make_topk(NUM_TARGETS, K, 1000, seed=i, labels=ids[positions])
        columns = {"critical": positions % 2, "sequence": np.full(NUM_TARGETS, i)}
        samples.append(TrainingSample(str(i), ids, positions, {"teacher": (topk,), "reference": (topk,)}, columns))
    return samples


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
