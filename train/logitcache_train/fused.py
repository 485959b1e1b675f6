"""The fused loss: from hidden states and the head's weight, by chunks of positions, with no [N, V] tensor.

For a chunk of positions the products h W^T are made, reduced to a few numbers per row, and overwritten by the
gradient

    g_a = T exp(z_a - lse_tail) - dense_a       a outside S,  T = C rho - t_tail
    g_a = C p_a - t_a - dense_a                 a in S

with C = sum_j c_j, t the weighted sum of label, cached and guided (`atoms.coarse_target`), and dense_a =
c_uniform / V + c_sharpened sharpened_a. Outside S the exponent is taken relative to the tail's own
log-sum-exp, so that a tail which underflows against the rest still gets its exact share. Then dh = g W and
dW += g^T h.
All of it happens in the forward pass; the backward pass only scales.

What runs over the vocabulary is in `kernels`, a pass that reduces the tail and one that writes its gradient; what is
between them, on S and per row, is here and in `atoms`.

Shapes: N target positions, n of a chunk, S slots of the support, V vocabulary that carries mass, D hidden.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_train.atoms import Support, build_support, coarse_student, coarse_target, cross_entropy
from logitcache_train.head import Head, HeadGradients, Precomputed
from logitcache_train.kernels.tail import DenseAtoms, TailFactors, TailPasses, TailSums, choose_passes
from logitcache_train.loss import reduction_dtype
from logitcache_train.objectives import Objective
from logitcache_train.positions import Inputs, Positions, check_finite, check_inputs, row_metrics, total

CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
"""Bytes of a chunk with its work space, by device type, where `chunk_size` is not given. On a GPU the larger chunk
pays, because dW is read and written once per chunk."""

Observe = Callable[[Head, Tensor, slice], dict[str, Tensor]]
"""What else to know of a chunk, [n] each, from its products h W^T, [n, V], which stay as they are, and its rows."""


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
    observe: Observe | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fused_target_loss`, and the metrics of `loss.target_metrics` from the same pass; with those of `observe`."""
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
        metrics = _sweep(hidden_ND, head, inputs, chunk_size, gradients, observe)
    loss = Precomputed.apply(metrics["loss"].sum(), divisor, *sources, *gradients.tensors)  # type: ignore[no-untyped-call]
    return loss, metrics


def _sweep(
    hidden_ND: Tensor,
    head: Head,
    inputs: Inputs,
    chunk_size: int | None,
    gradients: HeadGradients,
    observe: Observe | None,
) -> dict[str, Tensor]:
    """Visit the positions chunk by chunk and add up their gradients; returns the metrics of each, [N]."""
    obj = inputs.obj
    atoms = DenseAtoms(obj.has("uniform"), obj.values["beta"] if obj.has("sharpened") else None)
    passes = choose_passes(head, atoms, max_rows=min(chunk_size or len(inputs), len(inputs)))
    chunk_size = chunk_size or default_chunk_size(head.weight_VD, passes.work_bytes)
    chunks = split_rows(len(inputs), chunk_size, inputs.columns[obj.pool_by] if inputs.needs_all_rows else None)
    num_rows = max(rows.stop - rows.start for rows, _ in chunks)
    buffer_nV = head.weight_VD.new_empty(num_rows, len(head.weight_VD))

    def multiply(rows: slice) -> tuple[Tensor, Tensor]:
        hidden_nD = hidden_ND[rows].to(buffer_nV.dtype)
        return hidden_nD, torch.mm(hidden_nD, head.weight_VD.T, out=buffer_nV[: len(hidden_nD)])

    pooled_N = torch.zeros(len(inputs), dtype=reduction_dtype(buffer_nV.dtype), device=buffer_nV.device)
    if split := [rows for rows, is_split in chunks if is_split]:
        for rows in split:
            pooled_N[rows] = _reduce(multiply(rows)[1], inputs[rows], head, passes).at.statistic()
        pooled_N = inputs.pool(pooled_N)
    parts = []
    for rows, is_split in chunks:
        hidden_nD, products_nV = multiply(rows)
        observed = {} if observe is None else observe(head, products_nV, rows)
        reduced = _reduce(products_nV, inputs[rows], head, passes)
        terms = _weigh(reduced, pooled_N[rows] if is_split else None)
        parts.append(terms.metrics | observed)
        if gradients.wanted:
            _overwrite_with_gradient(reduced, terms, head, passes)
            gradients.add(rows, reduced.chunk_nV, hidden_nD, head)
    metrics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    check_finite(metrics["loss"], metrics.pop("lse"))
    return metrics


def split_rows(num_rows: int, size: int, group_N: Tensor | None) -> list[tuple[slice, bool]]:
    """Chunks of at most `size` consecutive rows, and whether a chunk holds but a part of some group.

    A group of adjacent rows with equal `group_N` is not cut if it fits into a chunk.
    """
    groups = [] if group_N is None else group_N.tolist()
    starts = [0, *(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]), num_rows]
    chunks: list[slice] = []
    while not chunks or chunks[-1].stop < num_rows:
        start = chunks[-1].stop if chunks else 0
        stop = min(start + size, num_rows)
        if group_N is not None and stop < num_rows:
            nearest = bisect_right(starts, stop) - 1
            if starts[nearest] > start and starts[nearest + 1] - starts[nearest] <= size:
                stop = starts[nearest]
        chunks.append(slice(start, stop))
    members = [set(groups[rows]) for rows in chunks]
    num_chunks = Counter(chain.from_iterable(members))
    return [(rows, any(num_chunks[g] > 1 for g in found)) for rows, found in zip(chunks, members, strict=True)]


@dataclass(frozen=True, eq=False)
class _Reduced:
    """A chunk and what its rows were reduced to."""

    chunk_nV: Tensor
    """Products outside S; what is on S may be overwritten."""
    support: Support
    at: Positions
    tail: TailSums
    slope_nS: Tensor | None
    """The derivative of the soft cap on S."""
    dense: dict[str, _DenseAtom]


@dataclass(frozen=True, eq=False)
class _DenseAtom:
    """`uniform` or `sharpened`, over the whole vocabulary."""

    mean_z_n: Tensor
    """sum_a atom_a z_a, with z relative to the row's largest logit."""
    atom_nS: Tensor
    """The atom on S."""
    tail_factor_n: Tensor
    """What 1 (for `uniform`) or exp((z_a - tail_max) / beta) (for `sharpened`) is multiplied with outside S."""


def _reduce(chunk_nV: Tensor, inputs: Inputs, head: Head, passes: TailPasses) -> _Reduced:
    wide = reduction_dtype(chunk_nV.dtype)
    support = build_support(inputs.labels_N, inputs.topk, inputs.vocab_size, wide)
    z_nS = head.finish_logits(chunk_nV.gather(1, support.ids_NS).to(wide), support.ids_NS)
    slope_nS = None if head.softcap is None else head.slope(z_nS)
    tail = passes.reduce(chunk_nV, support)
    z_nS = z_nS.masked_fill(~support.is_outcome_NS, -torch.inf)
    # Relative to the row's largest logit, because the differences taken below cancel at logits of 1e4.
    max_n = torch.maximum(z_nS.amax(-1), tail.max_n)
    z_nS, tail_max_n = z_nS - max_n[:, None], tail.max_n - max_n
    student = coarse_student(z_nS, tail_max_n, tail.exp_n.log(), support)

    def top_logits(k: int) -> Tensor:
        outside_nk = passes.largest(chunk_nV, support, k) - max_n[:, None]
        return torch.cat([z_nS, outside_nk], dim=-1).topk(min(k, inputs.vocab_size)).values

    dense = {}
    if tail.z_n is not None:
        dense["uniform"] = _uniform(z_nS, tail_max_n, tail.z_n, support, inputs.vocab_size)
    if tail.sharp_n is not None and tail.sharp_z_n is not None:
        beta = inputs.obj.values["beta"]
        dense["sharpened"] = _sharpened(z_nS, tail_max_n, tail.sharp_n, tail.sharp_z_n, support, beta)
    return _Reduced(chunk_nV, support, Positions(inputs, student, top_logits), tail, slope_nS, dense)


def _uniform(z_nS: Tensor, tail_max_n: Tensor, tail_z_n: Tensor, support: Support, vocab_size: int) -> _DenseAtom:
    num_tail_n = vocab_size - support.is_outcome_NS.sum(-1)
    tail_n = tail_z_n + num_tail_n * tail_max_n.masked_fill(~support.has_tail_N, 0)
    sum_n = z_nS.masked_fill(~support.is_outcome_NS, 0).sum(-1) + tail_n
    share_n = torch.full_like(sum_n, 1 / vocab_size)
    return _DenseAtom(sum_n / vocab_size, support.is_outcome_NS * share_n[:, None], share_n)


def _sharpened(
    z_nS: Tensor, tail_max_n: Tensor, sharp_n: Tensor, sharp_z_n: Tensor, support: Support, beta: float
) -> _DenseAtom:
    log_tail_n = sharp_n.log() + tail_max_n / beta
    log_total_n = torch.logaddexp((z_nS / beta).logsumexp(-1), log_tail_n)
    atom_nS, tail_n = (z_nS / beta - log_total_n[:, None]).exp(), (log_tail_n - log_total_n).exp()
    # The sum over a tail is at least 1: clamped is only that over none.
    factor_n = tail_n / sharp_n.clamp(min=1)
    tail_mean_n = factor_n * sharp_z_n + tail_n * tail_max_n.masked_fill(~support.has_tail_N, 0)
    on_support_n = (atom_nS * z_nS.masked_fill(~support.is_outcome_NS, 0)).sum(-1)
    return _DenseAtom(on_support_n + tail_mean_n, atom_nS, factor_n)


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
    for name, atom in reduced.dense.items():
        c_n = coefficients[name]
        loss_n = loss_n + c_n * (student.lse_N - atom.mean_z_n)
        pull_nS = pull_nS + c_n[:, None] * atom.atom_nS
        pull_tail_n = pull_tail_n + c_n * (1 - atom.atom_nS.sum(-1))
    g_nS = total_n[:, None] * student.log_p_NS.exp() - pull_nS
    metrics = row_metrics(loss_n, coefficients, student, support, pull_nS, pull_tail_n)
    return _Terms(coefficients, g_nS, tail_n, {**metrics, "lse": student.lse_N})


def _overwrite_with_gradient(reduced: _Reduced, terms: _Terms, head: Head, passes: TailPasses) -> None:
    """Turn the chunk into the gradient at h W^T + b."""
    support, g_nS = reduced.support, terms.g_nS
    dense = {name: terms.coefficients[name] * atom.tail_factor_n for name, atom in reduced.dense.items()}
    factors = TailFactors(terms.tail_n / reduced.tail.exp_n.clamp(min=1), dense.get("uniform"), dense.get("sharpened"))
    passes.write_gradient(reduced.chunk_nV, support, reduced.tail, factors)
    if reduced.slope_nS is not None:
        g_nS = g_nS * reduced.slope_nS
    # Slots that are no outcome repeat the label's id, so they must write the label's value.
    label_n1 = g_nS.masked_fill(~support.is_label_NS, 0).sum(-1, keepdim=True)
    g_nS = head.scale * torch.where(support.is_outcome_NS, g_nS, label_n1)
    reduced.chunk_nV.scatter_(1, support.ids_NS, g_nS.to(reduced.chunk_nV.dtype))


def default_chunk_size(weight_VD: Tensor, work_bytes: int) -> int:
    """Positions per chunk, so that their logits in the dtype of `weight_VD` and the work space fit `CHUNK_BYTES`."""
    limit = CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cuda"])
    # A sixteenth is left to what matrix products pack into buffers of their own.
    rows = (limit - limit // 16 - work_bytes) // (weight_VD.dtype.itemsize * len(weight_VD))
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
