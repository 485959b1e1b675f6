"""What an objective teaches: its induced target Q and its gradient g = p - Q, from the loss itself.

Shapes: N positions, P points of a curve, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logitcache_train.atoms import CachedTopK
from logitcache_train.loss import target_loss
from logitcache_train.objectives import Objective

TOKENS = ("observed token y", "teacher's favourite", "student's favourite", "neither's")
"""The vocabulary of the curves."""

STUDENT_OTHERS = (0.25, 0.60, 0.15)
"""How the student divides 1 - p_y among the other tokens, whatever p_y is."""

TEACHER = (0.30, 0.50, 0.10, 0.10)
"""The distribution of every cache."""

SITUATION = (
    "A vocabulary of four tokens: the student divides 1 - p_y as 25, 60, 15 % among the others; teacher and reference"
    " give y 30 %, the others 50, 10, 10 %; every column is 1."
)


@dataclass(frozen=True, eq=False)
class InducedTarget:
    """What a loss drives the student towards, and how."""

    target_NV: Tensor
    """Q; sums to one, and may leave [0, 1] where coefficients are negative or sum to more than one."""
    gradient_NV: Tensor
    """The loss's gradient at the logits, p - Q; sums to zero."""


def induced_target(
    logits_NV: Tensor,
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> InducedTarget:
    """The induced target of each position; arguments and errors as in `loss.target_loss`.

    Log-probs are logits, too. Distributions over the whole vocabulary become caches by
    `CachedTopK.from_log_probs(log_probs_NV, labels_N, k=V)`.
    """
    logits_NV = logits_NV.detach().requires_grad_()
    with torch.enable_grad():
        loss = target_loss(logits_NV, labels_N, obj, cached, columns).sum()
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    return InducedTarget(logits_NV.detach().softmax(-1) - gradient_NV, gradient_NV)


@dataclass(frozen=True, eq=False)
class Curves:
    """Target and gradient of each of `TOKENS` over the student's probability of the first."""

    p_label_P: Tensor
    target_PV: Tensor
    gradient_PV: Tensor


def curves(obj: Objective, num_points: int = 199) -> Curves:
    """The curves of an objective in the `SITUATION`, for p_y = i / (num_points + 1), in float64."""
    p_label_P = torch.arange(1, num_points + 1, dtype=torch.float64) / (num_points + 1)
    others_V = p_label_P.new_tensor((0.0, *STUDENT_OTHERS))
    p_PV = (1 - p_label_P)[:, None] * others_V
    p_PV[:, 0] = p_label_P
    labels_P = torch.zeros(num_points, dtype=torch.long)
    log_q_PV = p_PV.new_tensor(TEACHER).log().expand_as(p_PV)
    cache = CachedTopK.from_log_probs(log_q_PV, labels_P, len(TOKENS))
    columns = dict.fromkeys(obj.columns, torch.ones_like(p_label_P))
    induced = induced_target(p_PV.log(), labels_P, obj, dict.fromkeys(obj.roles, cache), columns)
    return Curves(p_label_P, induced.target_NV, induced.gradient_NV)
