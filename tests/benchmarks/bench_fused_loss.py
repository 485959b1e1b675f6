"""Time and memory of the fused loss against the materialised path, forward and backward of head and loss.

The materialised path is what `model(labels=...)` does after its last layer: logits, cross-entropy, backward. Objectives
are compared with each other in `bench_objective_steps.py`.
Repetitions are interleaved in one process and a ratio is the median over rounds of the ratio within a round, so
that a slow minute of the machine meets both sides alike. Peak memory is taken in a process of its own per path:
the rise of the resident set's high-water mark (VmHWM, which unlike ru_maxrss a child does not inherit) over inputs
that are already there, less the gradients of hidden states and weight, which both paths must hold. Linux only.

    python tests/benchmarks/bench_fused_loss.py
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from logitcache_train import CachedTopK, fused_target_loss, objective

VOCAB_SIZE, NUM_ROWS, HIDDEN_SIZE, K, NUM_THREADS = 151_936, 2_048, 896, 64, 2

Step = Callable[[], None]


def run(repeats: int = 3) -> dict[str, float]:
    """Ratios of plain SFT's time (the bound is 1.0) and peak memory (0.15)."""
    torch.set_num_threads(NUM_THREADS)
    seconds = _interleaved(make_steps(("sft",)), repeats)
    extra = {path: extra_bytes(path) for path in ("materialised", "sft")}
    pairs = zip(seconds["sft"], seconds["materialised"], strict=True)
    ratios = {
        "fused_sft_over_materialised_time": statistics.median(a / b for a, b in pairs),
        "fused_sft_over_materialised_memory": extra["sft"] / extra["materialised"],
        "materialised_seconds": statistics.median(seconds["materialised"]),
        "materialised_extra_mib": extra["materialised"] / 2**20,
    }
    return {name: round(value, 3) for name, value in ratios.items()}


def extra_bytes(path: str) -> int:
    """Bytes that a step of `materialised` or of an objective needs above its inputs and gradients."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, "--peak", path]
    return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def make_steps(objectives: tuple[str, ...]) -> dict[str, Step]:
    """One training step of head and loss for `materialised` and for each objective, on the same inputs."""
    torch.manual_seed(0)
    hidden_ND = torch.empty(NUM_ROWS, HIDDEN_SIZE).normal_().requires_grad_()
    weight_VD = torch.empty(VOCAB_SIZE, HIDDEN_SIZE).normal_(std=0.05).requires_grad_()
    labels_N = torch.randint(VOCAB_SIZE, (NUM_ROWS,))
    topk = _random_topk()
    cached = {"teacher": topk, "reference": topk}
    columns = {"critical": labels_N % 2, "sequence": torch.arange(NUM_ROWS) // 128}

    def materialised() -> None:
        hidden_ND.grad = weight_VD.grad = None
        torch.nn.functional.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N).backward()

    def fused(name: str) -> Step:
        def step() -> None:
            hidden_ND.grad = weight_VD.grad = None
            fused_target_loss(hidden_ND, weight_VD, labels_N, objective(name), cached, columns).backward()

        return step

    return {"materialised": materialised, **{name: fused(name) for name in objectives}}


def _random_topk() -> CachedTopK:
    log_probs_Nk = torch.randn(NUM_ROWS, K + 1).mul_(3).log_softmax(-1)
    stride = VOCAB_SIZE // K
    return CachedTopK(
        ids=torch.randint(stride, (NUM_ROWS, K)) + stride * torch.arange(K),
        log_probs=log_probs_Nk[:, :K].sort(-1, descending=True).values,
        num_kept=torch.full((NUM_ROWS,), K),
        log_tail=log_probs_Nk[:, K],
        label_log_prob=log_probs_Nk[:, K] - 2,
    )


def _interleaved(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def _peak(path: str) -> int:
    torch.set_num_threads(NUM_THREADS)
    step = make_steps(() if path == "materialised" else (path,))[path]
    torch.ones(64, 64).requires_grad_().mm(torch.ones(64, 64)).sum().backward()  # libraries load their own buffers
    before = _high_water_mark()
    step()
    return _high_water_mark() - before - 4 * HIDDEN_SIZE * (VOCAB_SIZE + NUM_ROWS)


def _high_water_mark() -> int:
    """The largest resident set this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(_peak(sys.argv[2]))
    else:
        print(json.dumps(run(), indent=2))
