"""The fused loss: from hidden states and the head's weight, by chunks of positions, with no [N, V] tensor.

For a chunk of positions the logits are made, reduced to a few numbers per row, and overwritten by the
gradient

    g_a = T exp(z_a - lse_tail) - dense_a       a outside S,  T = C rho - t_tail
    g_a = C p_a - t_a - dense_a                 a in S

with C = sum_j c_j, t the weighted sum of label, cached and guided (`atoms.coarse_target`), and dense_a =
c_uniform / V + c_sharpened sharpened_a. Outside S the exponent is taken relative to the tail's own
log-sum-exp, so that a tail which underflows against the rest still gets its exact share. Then dh = g W and
dW += g^T h.
All of it happens in the forward pass; the backward pass only scales.

Shapes: N target positions, n of a chunk, S slots of the support, V vocabulary that carries mass, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_train.atoms import Support, build_support, coarse_student, coarse_target, cross_entropy
from logitcache_train.head import Head, HeadGradients, Precomputed
from logitcache_train.loss import reduction_dtype
from logitcache_train.objectives import Objective
from logitcache_train.positions import Inputs, Positions, check_finite, check_inputs, row_metrics, total

CHUNK_BYTES = 1 << 27
"""Bytes of a chunk's buffers where `chunk_size` is not given: larger ones gain no speed on a CPU."""


def fused_target_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    num_items: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The sum of `target_loss` over all positions divided by `num_items`, a scalar; never [N, V] at once.

    The logits are z = logit_scale (h W^T + bias), then logit_softcap tanh(z / logit_softcap) if there is a
    cap. Memory above inputs and gradients is one chunk. Gradients are made in the forward pass, for those of
    hidden states, weight and bias that require one. Products run in the inputs' dtype (under autocast in
    autocast's); reductions, and the sum of dW over chunks, in float32 (float64 for float64).

    Args:
        hidden_ND: final hidden states at the positions that predict a target, [N, D].
        weight_VD: the head's weight, [V, D]; rows at or above `vocab_size` carry no mass and get no gradient.
        labels_N: observed tokens, [N].
        obj: a row of the table.
        cached: as in `target_loss`.
        columns: as in `target_loss`.
        num_items: what the sum is divided by: the target tokens of the global batch; N if not given.
        chunk_size: positions per chunk; by default as many as `CHUNK_BYTES` holds.
        bias: the head's bias, [V].
        logit_softcap: the cap of Gemma 2, > 0.
        logit_scale: the factor on the logits of Cohere and Granite.
        vocab_size: as in `target_loss`.

    Raises:
        InputError: as in `target_loss`.
    """
    return fused_loss_and_metrics(
        hidden_ND,
        weight_VD,
        labels_N,
        obj,
        cached,
        columns,
        num_items,
        chunk_size,
        bias=bias,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
    )[0]


def fused_loss_and_metrics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    num_items: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fused_target_loss`, and the metrics of `loss.target_metrics` from the same pass."""
    _check_head(hidden_ND, weight_VD, bias, logit_softcap, num_labels=len(labels_N), chunk_size=chunk_size)
    inputs = check_inputs(labels_N, obj, cached, columns, num_logits=len(weight_VD), vocab_size=vocab_size)
    divisor = _divisor(num_items, len(inputs))
    dtype = _product_dtype(hidden_ND, weight_VD)
    sources = (hidden_ND, weight_VD, bias)
    gradients = HeadGradients.zeros(sources, reduction_dtype(dtype))
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        head = Head(
            weight_VD=weight_VD[: inputs.vocab_size].to(dtype),
            bias_V=None if bias is None else bias[: inputs.vocab_size].to(reduction_dtype(dtype)),
            scale=float(logit_scale),
            softcap=logit_softcap,
        )
        metrics = _sweep(hidden_ND, head, inputs, chunk_size, gradients)
    loss = Precomputed.apply(metrics["loss"].sum(), divisor, *sources, *gradients.tensors)  # type: ignore[no-untyped-call]
    return loss, metrics


def _sweep(
    hidden_ND: Tensor, head: Head, inputs: Inputs, chunk_size: int | None, gradients: HeadGradients
) -> dict[str, Tensor]:
    """Visit the positions chunk by chunk and add up their gradients; returns the metrics of each, [N]."""
    num_rows, num_tokens = len(inputs), len(head.weight_VD)
    sharpened, slope = inputs.obj.has("sharpened"), head.softcap is not None and gradients.wanted
    if chunk_size is None:
        chunk_size = default_chunk_size(num_tokens * (1 + sharpened + slope))
    size = min(chunk_size, max(num_rows, 1))
    buffers = _Buffers.allocate(size, num_tokens, head.weight_VD, sharpened=sharpened, slope=slope)
    chunks = [slice(i, min(i + size, num_rows)) for i in range(0, max(num_rows, 1), size)]

    def reduce(rows: slice) -> tuple[Tensor, _Reduced]:
        hidden_nD = hidden_ND[rows].to(head.weight_VD.dtype)
        chunk = buffers.first(len(hidden_nD))
        head.write_logits(hidden_nD, chunk.z_nV, chunk.slope_nV)
        return hidden_nD, _reduce(chunk, inputs[rows])

    pooled_N = None
    if inputs.needs_all_rows:
        pooled_N = inputs.pool(torch.cat([reduce(rows)[1].at.statistic() for rows in chunks]))
    parts = []
    for rows in chunks:
        hidden_nD, reduced = reduce(rows)
        terms = _weigh(reduced, None if pooled_N is None else pooled_N[rows])
        parts.append(terms.metrics)
        if gradients.wanted:
            _overwrite_with_gradient(reduced, terms, head.scale)
            gradients.add(rows, reduced.buffers.z_nV, hidden_nD, head)
    metrics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    check_finite(metrics["loss"], metrics.pop("lse"))
    return metrics


@dataclass(frozen=True, eq=False)
class _Buffers:
    """The only tensors of size [n, V], used again for every chunk."""

    z_nV: Tensor
    sharpened_nV: Tensor | None
    slope_nV: Tensor | None

    @classmethod
    def allocate(cls, num_rows: int, num_tokens: int, like: Tensor, *, sharpened: bool, slope: bool) -> _Buffers:
        def empty() -> Tensor:
            return like.new_empty(num_rows, num_tokens, dtype=reduction_dtype(like.dtype))

        return cls(empty(), empty() if sharpened else None, empty() if slope else None)

    def first(self, n: int) -> _Buffers:
        """The first n rows of each."""
        sharpened_nV, slope_nV = (None if t is None else t[:n] for t in (self.sharpened_nV, self.slope_nV))
        return _Buffers(self.z_nV[:n], sharpened_nV, slope_nV)


@dataclass(frozen=True, eq=False)
class _Reduced:
    """A chunk whose logits were reduced: `buffers.z_nV` now holds exp(z - tail_max) outside S, and 0 on S."""

    buffers: _Buffers
    support: Support
    at: Positions
    tail_sum_n: Tensor
    dense: dict[str, tuple[Tensor, Tensor]]
    """Of `uniform` and `sharpened`, where used: sum_a atom_a z_a, [n], and the atom on S, [n, S]."""


def _reduce(buffers: _Buffers, inputs: Inputs) -> _Reduced:
    z_nV, sharpened_nV, obj = buffers.z_nV, buffers.sharpened_nV, inputs.obj
    support = build_support(inputs.labels_N, inputs.topk, inputs.vocab_size, z_nV.dtype)
    dense = {}
    if obj.has("uniform") or sharpened_nV is not None:
        z_nV.sub_(z_nV.amax(-1, keepdim=True))
    if obj.has("uniform"):
        dense["uniform"] = z_nV.mean(-1), support.is_outcome_NS.to(z_nV.dtype) / z_nV.shape[1]
    if sharpened_nV is not None:
        torch.div(z_nV, obj.values["beta"], out=sharpened_nV).exp_()
        sharpened_nV.div_(sharpened_nV.sum(-1, keepdim=True))
        mean_z_n = torch.bmm(sharpened_nV[:, None, :], z_nV[:, :, None])[:, 0, 0]
        dense["sharpened"] = mean_z_n, sharpened_nV.gather(1, support.ids_NS) * support.is_outcome_NS

    z_nS = z_nV.gather(1, support.ids_NS)
    z_nV.scatter_(1, support.ids_NS, -torch.inf)
    tail_max_n = z_nV.amax(-1)
    z_nV.sub_(tail_max_n.masked_fill(~support.has_tail_N, 0)[:, None]).exp_()
    tail_sum_n = z_nV.sum(-1)
    student = coarse_student(z_nS, tail_max_n, tail_sum_n.log(), support)

    def top_logits(k: int) -> Tensor:
        k = min(k, z_nV.shape[1])
        outside_nk = z_nV.topk(k).values.log() + tail_max_n[:, None]
        on_support_nS = z_nS.masked_fill(~support.is_outcome_NS, -torch.inf)
        return torch.cat([on_support_nS, outside_nk], dim=-1).topk(k).values

    return _Reduced(buffers, support, Positions(inputs, student, top_logits), tail_sum_n, dense)


@dataclass(frozen=True, eq=False)
class _Terms:
    """Per-row factors of the gradient, and what is reported of each row."""

    coefficients: dict[str, Tensor]
    g_nS: Tensor
    """The gradient on S."""
    tail_n: Tensor
    """T = C rho - t_tail, the gradient of the tail as one outcome, without the dense atoms."""
    metrics: dict[str, Tensor]


def _weigh(reduced: _Reduced, pooled_n: Tensor | None) -> _Terms:
    support, student, obj = reduced.support, reduced.at.student, reduced.at.inputs.obj
    coefficients = reduced.at.coefficients(pooled_n)
    pull_nS, pull_tail_n = coarse_target(coefficients, student, support, obj.values.get("eta"))
    loss_n = cross_entropy(pull_nS, pull_tail_n, student)
    total_n = total(coefficients, loss_n)
    tail_n = total_n * student.log_rho_N.exp() - pull_tail_n
    for atom, (mean_z_n, atom_nS) in reduced.dense.items():
        c_n = coefficients[atom]
        loss_n = loss_n + c_n * (student.lse_N - mean_z_n)
        pull_nS = pull_nS + c_n[:, None] * atom_nS
        pull_tail_n = pull_tail_n + c_n * (1 - atom_nS.sum(-1))
    g_nS = total_n[:, None] * student.log_p_NS.exp() - pull_nS
    metrics = row_metrics(loss_n, coefficients, student, support, pull_nS, pull_tail_n)
    return _Terms(coefficients, g_nS, tail_n, {**metrics, "lse": student.lse_N})


def _overwrite_with_gradient(reduced: _Reduced, terms: _Terms, scale: float) -> None:
    """Turn exp(z - tail_max) in `buffers.z_nV` into the gradient at h W^T + b."""
    buffers, support = reduced.buffers, reduced.support
    tail_n = (terms.tail_n / reduced.tail_sum_n).masked_fill(~support.has_tail_N, 0)
    g_nV = buffers.z_nV.mul_(tail_n[:, None])
    if "uniform" in terms.coefficients:
        g_nV.sub_(terms.coefficients["uniform"][:, None] / g_nV.shape[1])
    if buffers.sharpened_nV is not None:
        g_nV.addcmul_(buffers.sharpened_nV, -terms.coefficients["sharpened"][:, None])
    # Slots that are no outcome repeat the label's id, so they must write the label's value.
    label_n1 = terms.g_nS.masked_fill(~support.is_label_NS, 0).sum(-1, keepdim=True)
    g_nV.scatter_(1, support.ids_NS, torch.where(support.is_outcome_NS, terms.g_nS, label_n1))
    if buffers.slope_nV is not None:
        g_nV.mul_(buffers.slope_nV)
    if scale != 1:
        g_nV.mul_(scale)


def default_chunk_size(num_logits: int) -> int:
    """Positions per chunk, so that `num_logits` float32 values of each fit `CHUNK_BYTES`."""
    rows = CHUNK_BYTES // (4 * num_logits)
    return max(rows // 16 * 16, 1)


def _check_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    *,
    num_labels: int,
    chunk_size: int | None,
) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        found = f"{list(hidden_ND.shape)} and {list(weight_VD.shape)}"
        raise InputError(f"hidden states must be [N, D] and the head's weight [V, D], got {found}")
    if len(hidden_ND) != num_labels:
        raise InputError(f"{len(hidden_ND)} hidden states for {num_labels} labels, expected equally many")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise InputError(f"the head's bias must be [V] with V = {len(weight_VD)}, got {list(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise InputError(f"logit_softcap must be > 0, or None for no cap; got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1 position, got {chunk_size}")


def _product_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    """What h and W are multiplied in: autocast's dtype, as a linear layer would take it, or their own."""
    dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _divisor(num_items: int | float | Tensor | None, num_rows: int) -> float | Tensor:
    if num_items is None:
        return float(max(num_rows, 1))
    if isinstance(num_items, Tensor):
        return num_items
    if not num_items > 0:
        raise InputError(f"num_items must be > 0, the target tokens of the global batch; got {num_items}")
    return float(num_items)
