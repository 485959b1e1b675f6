"""Gradients of all rows of the table against float64, by both losses.

Two oracles, both of the tests: autograd of the textbook losses over the whole vocabulary (the cache keeps every
token), and the targets with the student-following tail spread out over the vocabulary (a small k). The logits are
rounded to the dtype first, so that what is measured is the losses' own error. In float32 the measure's bound is 1e-6.
In bfloat16 the gradient is rounded once, by at most 2^-8 of itself, and it is at most 2.

    python tests/benchmarks/bench_objectives_accuracy.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache_train import OBJECTIVES, CachedTopK, fused_target_loss, objective, target_loss

NUM_ROWS, VOCAB_SIZE, K = 48, 1_009, 16
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2 * 2**-8}


def run() -> dict[str, Any]:
    """The largest difference of a gradient by row of the table, `<support>_<loss>_<dtype>`, and over all rows."""
    torch.manual_seed(0)
    textbook, dense = _oracles("test_objectives"), _oracles("test_loss")
    rows: dict[str, dict[str, float]] = {name: {} for name in OBJECTIVES}
    for dtype, bound in BOUNDS.items():
        z_NV = (2 * torch.randn(NUM_ROWS, VOCAB_SIZE)).to(dtype)
        labels_N = torch.randint(VOCAB_SIZE, (NUM_ROWS,))
        z_NV[::2].scatter_add_(1, labels_N[::2, None], torch.full((NUM_ROWS, 1), 9.0, dtype=dtype)[::2])
        for name, found in rows.items():
            for support, (case, oracle_NV) in {
                "full_support": _full_support(textbook, name, z_NV, labels_N),
                "small_k": _small_k(dense, name, z_NV, labels_N),
            }.items():
                for loss in ("reference", "fused"):
                    difference = (_gradient(loss, z_NV, labels_N, *case).double() - oracle_NV).abs().max().item()
                    assert difference <= bound, f"{name}, {support}, {loss}, {dtype}: {difference:.2g} > {bound:.2g}"
                    found[f"{support}_{loss}_{str(dtype).removeprefix('torch.')}"] = float(f"{difference:.2g}")
    largest = {column: max(found[column] for found in rows.values()) for column in rows["sft"]}
    return {"largest": largest, "rows": rows}


def _oracles(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "train" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _full_support(oracles: ModuleType, name: str, z_NV: Tensor, labels_N: Tensor) -> tuple[Any, Tensor]:
    """An objective with its inputs, and the gradient of its textbook loss by autograd."""
    z_NV = z_NV.double().requires_grad_()
    teacher_NV, reference_NV = ((z_NV.detach() / 2 + torch.randn(2, *z_NV.shape)).softmax(-1)).double()
    columns = {"critical": labels_N % 2, "sequence": torch.arange(NUM_ROWS) // 7}
    par = oracles.PARAMETERS.get(name, {})
    given = (teacher_NV, reference_NV, columns["critical"], columns["sequence"])
    oracles.textbook(name, z_NV, labels_N, *given, **par).sum().backward()
    assert z_NV.grad is not None and z_NV.grad.abs().max() > 0.05
    obj, caches = objective(name, **par), {"teacher": teacher_NV, "reference": reference_NV}
    cached = {role: oracles.full_cache(caches[role], labels_N) for role in obj.roles}
    return (obj, cached, columns), z_NV.grad


def _small_k(oracles: ModuleType, name: str, z_NV: Tensor, labels_N: Tensor) -> tuple[Any, Tensor]:
    """An objective with its inputs, and p - Q with the tail spread out like the student's."""
    cache: CachedTopK = oracles.random_cache(np.random.default_rng(1), labels_N.numpy(), VOCAB_SIZE, K)
    reference_N = torch.linspace(-3, -0.5, NUM_ROWS, dtype=torch.float64)
    obj = objective(name, **oracles.PARAMETERS.get(name, {}))
    if obj.role is None:
        cache = CachedTopK(**{**vars(cache), "label_log_prob": reference_N})
    critical_N = labels_N % 2
    expected = [
        oracles.dense_gradient(
            name, z_V.double().numpy(), int(label), oracles.row_of(cache, i), reference_N[i].exp().item(), int(critical)
        )
        for i, (z_V, label, critical) in enumerate(zip(z_NV, labels_N, critical_N, strict=True))
    ]
    return (obj, dict.fromkeys(obj.roles, cache), {"critical": critical_N}), torch.tensor(np.array(expected))


def _gradient(loss: str, z_NV: Tensor, labels_N: Tensor, obj: Any, cached: Any, columns: Any) -> Tensor:
    z_NV = z_NV.clone().requires_grad_()
    if loss == "reference":
        target_loss(z_NV, labels_N, obj, cached, columns).sum().backward()
    else:  # with the identity as head the hidden states are the logits
        head_VV = torch.eye(VOCAB_SIZE, dtype=z_NV.dtype)
        fused_target_loss(z_NV, head_VV, labels_N, obj, cached, columns, num_items=1, chunk_size=20).backward()
    assert z_NV.grad is not None
    return z_NV.grad


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
