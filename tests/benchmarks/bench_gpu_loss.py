"""On a CUDA device: time and memory of the fused loss against the fused cross-entropies of others.

Forward and backward of head and loss on 8,192 positions in bfloat16, all of them targets, with the gradients of hidden
states and weight, against

    torch_compile       torch.compile of linear and cross-entropy
    liger               liger-kernel's LigerFusedLinearCrossEntropyLoss
    cut_cross_entropy   cut-cross-entropy's linear_cross_entropy, which leaves out gradients too small for bfloat16

Times are medians of CUDA events after warm-up; paths take turns. Peak memory is that of one step above its inputs. The
gradients of `sft` and of the others are compared, so that nothing is timed that computes something else. What is not
installed is named under `versions`.

    python tests/benchmarks/bench_gpu_loss.py
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from logitcache_train import CachedTopK, fused_target_loss, objective

NUM_ROWS, K, WARM_UP, ROUNDS = 8_192, 64, 3, 10
SHAPES = [(128_256, 4_096), (128_256, 2_048), (151_936, 4_096), (151_936, 2_048)]
"""(V, D)."""
OWN = ("sft", "target_sft", "gem")
OTHERS = {"liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy"}
"""Path to the module that it needs."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden states, weight and labels: the mean over positions."""


def run() -> dict[str, Any]:
    """For each shape milliseconds, ratios and peak memory of each path."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, **{name: _version(module) for name, module in OTHERS.items()}},
        "rows": NUM_ROWS,
        "k": K,
        **{f"V={v}, D={d}": compare(v, d) for v, d in SHAPES},
    }


def compare(vocab_size: int, hidden_size: int) -> dict[str, Any]:
    """Every installed path at one shape."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(NUM_ROWS, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(vocab_size, hidden_size, device="cuda", dtype=torch.bfloat16).mul_(hidden_size**-0.5)
    weight_VD.requires_grad_()
    labels_N = torch.randint(vocab_size, (NUM_ROWS,), device="cuda")
    losses = {**own_losses(vocab_size), **other_losses()}

    def step(loss: Loss) -> None:
        hidden_ND.grad = weight_VD.grad = None
        loss(hidden_ND, weight_VD, labels_N).backward()

    peaks, gradients = {}, {}
    for name, loss in losses.items():
        for _ in range(WARM_UP):
            step(loss)
        hidden_ND.grad = weight_VD.grad = None
        peaks[name] = _peak_bytes(functools.partial(step, loss))
        # A few rows say enough, and leave the memory to the next path.
        gradients[name] = [t.grad[:: len(t) // 64].float() for t in (hidden_ND, weight_VD)]
    rounds = [
        {name: _milliseconds(functools.partial(step, loss)) for name, loss in losses.items()} for _ in range(ROUNDS)
    ]
    return {
        "milliseconds": {name: round(statistics.median(r[name] for r in rounds), 3) for name in losses},
        "over_sft": {name: round(statistics.median(r[name] / r["sft"] for r in rounds), 3) for name in losses},
        "peak_mib": {name: round(value / 2**20) for name, value in peaks.items()},
        "gradients_differ_from_sft_by": {
            name: [round(_relative(*pair), 5) for pair in zip(found, gradients["sft"], strict=True)]
            for name, found in gradients.items()
            if name not in OWN
        },
    }


def own_losses(vocab_size: int) -> dict[str, Loss]:
    """The fused loss of some objectives."""
    cached = {"teacher": _random_topk(vocab_size)}

    def loss(name: str) -> Loss:
        row = objective(name)
        return lambda hidden_ND, weight_VD, labels_N: fused_target_loss(hidden_ND, weight_VD, labels_N, row, cached)

    return {name: loss(name) for name in OWN}


def other_losses() -> dict[str, Loss]:
    """Plain cross-entropy by the others, of those that are installed."""

    def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N)

    losses: dict[str, Loss] = {"torch_compile": torch.compile(linear_cross_entropy, dynamic=False)}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        losses["liger"] = lambda hidden_ND, weight_VD, labels_N: liger(weight_VD, hidden_ND, labels_N)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

        losses["cut_cross_entropy"] = cut_cross_entropy
    return losses


def _random_topk(vocab_size: int) -> CachedTopK:
    log_probs_Nk = torch.randn(NUM_ROWS, K + 1, device="cuda").mul_(3).log_softmax(-1)
    stride = vocab_size // K
    return CachedTopK(
        ids=torch.randint(stride, (NUM_ROWS, K), device="cuda") + stride * torch.arange(K, device="cuda"),
        log_probs=log_probs_Nk[:, :K].sort(-1, descending=True).values,
        num_kept=torch.full((NUM_ROWS,), K, device="cuda"),
        log_tail=log_probs_Nk[:, K],
        label_log_prob=log_probs_Nk[:, K] - 2,
    )


def _milliseconds(step: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _peak_bytes(step: Callable[[], None]) -> int:
    """With the gradients, which every path must hold."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
