"""The readable loss, from logits.

    loss = sum_j sg(c_j) CE(sg(atom_j), p)                         so that the gradient at the logits is p - Q
    CE(atom, p) = -sum_S atom_a log p_a - atom_tail log rho        for label, cached and guided
    CE(atom, p) = lse(z) - sum_a atom_a z_a                        for uniform and sharpened

The student's own atom pulls nowhere and is left out. The value of the loss is this cross-entropy; where the
usual loss of an objective has another value (a KL instead of a CE, say) it has the same gradient.

Shapes: N target positions, S slots of the support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_train.atoms import Support, build_support, coarse_student, coarse_target, cross_entropy
from logitcache_train.objectives import Objective
from logitcache_train.positions import Positions, check_finite, check_inputs, row_metrics


def target_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The loss of each target position, [N], in nats; its gradient at the logits is p - Q.

    Args:
        logits_NV: the student's logits, [N, V] float; reductions are made in float32 (float64 for float64).
        labels_N: observed tokens, [N], each in [0, V).
        obj: a row of the table, from `objective(name, ...)` or your own.
        cached: role (`teacher`, `reference`) to the cached top-k of these positions: a `CachedTopK`, or
            anything with the fields of `TopKLogProbs`.
        columns: name to per-position data, [N].
        vocab_size: the cache's vocabulary size, where the student's head may be padded beyond it; logits at
            or above it carry no mass and get no gradient.

    Raises:
        InputError: a role or a column is missing, shapes disagree, a label is outside the vocabulary, or
            logits, cached values or a coefficient are not finite; the message names rows.
    """
    return _evaluate(logits_NV, labels_N, obj, cached, columns, vocab_size)[0]


def target_metrics(
    logits_NV: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """What to log of each position, detached, [N] each; arguments and errors as in `target_loss`.

    `loss`; `p_label`; `gamma`, the weight of the label in Q, c_label / max(1, sum_j c_j); `target_entropy`,
    the entropy of Q on the support and its tail in nats; and with a cached distribution `teacher_tail`, its
    mass outside the support.
    """
    with torch.no_grad():
        return _evaluate(logits_NV, labels_N, obj, cached, columns, vocab_size)[1]


def target_coefficients(
    logits_NV: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """The coefficient of each atom that the objective has, detached, [N] each; what they lack to one is the student's.

    Arguments and errors as in `target_loss`.
    """
    with torch.no_grad():
        return _positions(logits_NV, labels_N, obj, cached, columns, vocab_size)[1].coefficients()


def _positions(
    logits_NV: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None,
    columns: Mapping[str, Any] | None,
    vocab_size: int | None,
) -> tuple[Tensor, Positions, Support]:
    """(logits from zero downwards [N, V], what belongs to each position, the support of each)."""
    if logits_NV.ndim != 2 or len(logits_NV) != len(labels_N):
        raise InputError(f"logits must be [N, V] with N = {len(labels_N)} labels, got {list(logits_NV.shape)}")
    inputs = check_inputs(labels_N, obj, cached, columns, num_logits=logits_NV.shape[1], vocab_size=vocab_size)
    z_NV = logits_NV[:, : inputs.vocab_size].to(reduction_dtype(logits_NV.dtype))
    z_NV = z_NV - z_NV.detach().amax(-1, keepdim=True)
    support = build_support(inputs.labels_N, inputs.topk, inputs.vocab_size, z_NV.dtype)
    student = coarse_student(z_NV.gather(1, support.ids_NS), *_tail_log_sum(z_NV, support), support)
    at = Positions(inputs, student, lambda k: z_NV.detach().topk(min(k, inputs.vocab_size)).values)
    return z_NV, at, support


def _evaluate(
    logits_NV: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None,
    columns: Mapping[str, Any] | None,
    vocab_size: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    z_NV, at, support = _positions(logits_NV, labels_N, obj, cached, columns, vocab_size)
    student, coefficients = at.student, at.coefficients()
    pull_NS, pull_tail_N = coarse_target(coefficients, student, support, obj.values.get("eta"))
    loss_N = cross_entropy(pull_NS, pull_tail_N, student)
    for atom, atom_NV in _dense_atoms(z_NV.detach(), obj):
        c_N = coefficients[atom]
        loss_N = loss_N + c_N * (student.lse_N - (atom_NV * z_NV).sum(-1))
        atom_NS = atom_NV.gather(1, support.ids_NS) * support.is_outcome_NS
        pull_NS = pull_NS + c_N[:, None] * atom_NS
        pull_tail_N = pull_tail_N + c_N * (1 - atom_NS.sum(-1))
    check_finite(loss_N, student.lse_N)
    return loss_N, row_metrics(loss_N, coefficients, student, support, pull_NS, pull_tail_N)


def _tail_log_sum(z_NV: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """The largest logit outside S, and the log of the tail's sum relative to it; -inf without a tail."""
    outside_NV = z_NV.scatter(1, support.ids_NS, -torch.inf)
    max_N = outside_NV.detach().amax(-1)
    # The gradient of a log-sum-exp over nothing is NaN: rows without a tail get a dummy, then cut off.
    shifted_NV = torch.where(support.has_tail_N[:, None], outside_NV - max_N[:, None], 0.0)
    return max_N, shifted_NV.logsumexp(-1).masked_fill(~support.has_tail_N, -torch.inf)


def _dense_atoms(z_NV: Tensor, obj: Objective) -> list[tuple[str, Tensor]]:
    atoms = []
    if obj.has("uniform"):
        atoms.append(("uniform", torch.full_like(z_NV, 1 / z_NV.shape[-1])))
    if obj.has("sharpened"):
        atoms.append(("sharpened", (z_NV / obj.values["beta"]).softmax(-1)))
    return atoms


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
