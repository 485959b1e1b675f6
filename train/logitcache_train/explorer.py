"""What an objective would teach at one target position, in plain values: for the web view, which knows no torch.

A cache keeps a student's distribution as it keeps a teacher's: some ids, the label, and the mass outside them. That
mass is divided evenly over the rest of the vocabulary, the one division that no kept id can contradict. Everything else
is the loss's own: the caches are handed to it as they are, and Q = p - g comes out of its gradient.

Shapes: V vocabulary; one position throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_storage.topk import TopKLogProbs
from logitcache_train.curves import induced_target
from logitcache_train.loss import target_coefficients
from logitcache_train.objectives import OBJECTIVES, Objective, Parameter, objective

LOG_FLOOR = -600.0
"""Least log-prob of a token, so that no logit is -inf; its probability is still above float64's least."""


def objectives() -> list[dict[str, Any]]:
    """The table of objectives: `name`, `formula`, `source`, `roles`, `columns` and `parameters` of each.

    A parameter has `name`, `default`, `low`, `high` (None where there is no bound), `integer`, `extrapolates` and
    `meaning`.
    """
    return [
        {
            "name": row.name,
            "formula": row.formula,
            "source": row.source,
            "roles": list(row.roles),
            "columns": list(row.columns),
            "parameters": [{"name": name, **_parameter(found)} for name, found in row.parameters.items()],
        }
        for row in OBJECTIVES.values()
    ]


def explore(
    name: str,
    parameters: Mapping[str, float],
    label: int,
    student: TopKLogProbs,
    caches: Mapping[str, TopKLogProbs],
    *,
    vocab_size: int,
    p_label: float | None = None,
    columns: Mapping[str, float] | None = None,
    extrapolate: bool = False,
    top: int = 12,
) -> dict[str, Any]:
    """Student, caches, residual, induced target and gradient at one position, on its likeliest tokens and the rest.

    Args:
        name: of the objective.
        parameters: of the objective; those not given take their default.
        label: the observed token.
        student: one row; what is cached of the student.
        caches: role (`teacher`, `reference`) to one row; those that the objective does not need are shown besides.
        vocab_size: how many tokens there are.
        p_label: the student's probability of the label, where it is to be another one; the others keep their ratios.
        columns: per-position columns by name.
        extrapolate: let `eta` leave [0, 1].
        top: how many tokens besides the label are outcomes of their own.

    Returns:
        `coefficients` of the atoms (the student's is what remains to one), `gamma` (the label's weight in the target,
        as `target_metrics` has it), `scale` (what the gradient is divided by where the coefficients sum to more than
        one, so that the target normalised is a mixture), `p_label`, and `outcomes`: for each `token` (None for all
        others together), `label` (0 or 1), `student`, each role whose cache keeps ids, `residual` (of the normalised
        target; None where it has none), `target`, `gradient`, and `assumed`: those of `student` and the roles whose
        cache does not keep the token, so that its number is a share of the mass outside.

    Raises:
        InputError: an unknown objective or parameter, a value outside its range, a role or column that is missing, or
            a target that is not finite, or a cache without ids that the target is made of.
    """
    obj = objective(name, extrapolate=extrapolate, **parameters)
    needed = _needed(obj, caches)
    as_cached_V = student_log_probs(student, label, vocab_size)
    log_p_V = as_cached_V if p_label is None else _with_label_probability(as_cached_V, label, p_label)
    given = (log_p_V[None], torch.tensor([label]))
    data = {column: torch.tensor([value], dtype=torch.float64) for column, value in (columns or {}).items()}
    induced = induced_target(*given, obj, needed, data)
    seen = {role: induced_target(*given, _copy_of(role), caches).target_NV[0] for role in caches if caches[role].k}
    coefficients = {atom: float(c) for atom, c in target_coefficients(*given, obj, needed, data).items()}
    scale = max(1.0, sum(coefficients.values()))
    gamma = coefficients.get("label", 0.0) / scale
    parts = {"student": log_p_V.exp(), **seen, "target": induced.target_NV[0], "gradient": induced.gradient_NV[0]}
    outcomes = _outcomes(_tokens(label, [as_cached_V.exp(), *seen.values()], top), parts)
    for outcome in outcomes:
        outcome["label"] = int(outcome["token"] == label)
        outcome["residual"] = _residual(outcome, gamma, scale)
        outcome["assumed"] = _assumed(outcome["token"], label, {"student": student, **caches})
    return {
        "objective": name,
        "parameters": dict(obj.values),
        "coefficients": {**coefficients, "student": 1 - sum(coefficients.values())},
        "gamma": gamma,
        "scale": scale,
        "p_label": float(log_p_V[label].exp()),
        "outcomes": outcomes,
    }


def _needed(obj: Objective, caches: Mapping[str, TopKLogProbs]) -> dict[str, TopKLogProbs]:
    """The caches that the objective must have; a distribution must be there where it is made of one."""
    needed = {role: rows for role, rows in caches.items() if role in obj.roles}
    if obj.role in needed and not needed[obj.role].k:
        raise InputError(
            f"objective {obj.name!r} needs the distribution of the {obj.role}, whose cache keeps no ids (k = 0)"
        )
    return needed


def student_log_probs(topk: TopKLogProbs, label: int, vocab_size: int) -> Tensor:
    """What a row keeps, as a distribution over the whole vocabulary, [V] float64; what is outside, evenly."""
    num_kept = int(topk.num_kept[0])
    ids = torch.as_tensor(topk.ids[0, :num_kept]).long()
    largest = max([label, *ids.tolist()])
    if largest >= vocab_size:
        raise InputError(f"token {largest} is outside the vocabulary of {vocab_size} tokens")
    log_p_V = torch.full((vocab_size,), -torch.inf, dtype=torch.float64)
    log_p_V[ids] = torch.as_tensor(topk.log_probs[0, :num_kept]).double()
    tail = math.exp(topk.log_tail[0])
    if log_p_V[label] == -torch.inf:
        tail -= math.exp(topk.label_log_prob[0])
    log_p_V[label] = float(topk.label_log_prob[0])
    outside_V = log_p_V == -torch.inf
    share = tail / max(1, int(outside_V.sum()))
    log_p_V[outside_V] = math.log(share) if share > 0 else LOG_FLOOR
    return log_p_V.clamp(min=LOG_FLOOR).log_softmax(-1)


def _with_label_probability(log_p_V: Tensor, label: int, p_label: float) -> Tensor:
    """The same distribution with another probability of the label."""
    if not 0 < p_label < 1:
        raise InputError(f"the student's probability of the label must be between 0 and 1, got {p_label:g}")
    others = torch.arange(len(log_p_V)) != label
    if not others.any():
        raise InputError("in a vocabulary of one token the label's probability is 1")
    moved_V = log_p_V.index_fill(0, torch.tensor([label]), math.log(p_label))
    moved_V[others] += math.log1p(-p_label) - log_p_V[others].logsumexp(0)
    return moved_V


def _copy_of(role: str) -> Objective:
    """The objective whose target is the cached distribution, as every loss sees it: its tail follows the student."""
    return Objective(f"cached {role}", "", "", cached=1.0, role=role)


def _tokens(label: int, distributions: list[Tensor], top: int) -> list[int]:
    """The label, and the likeliest others."""
    likeliest_V = torch.stack(distributions).amax(0)
    likeliest_V[label] = math.inf
    chosen: list[int] = likeliest_V.topk(min(top + 1, len(likeliest_V))).indices.tolist()
    return chosen


def _outcomes(tokens: list[int], parts: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The values of some tokens, and the sum over all others where there are any."""
    rows: list[dict[str, Any]] = [
        {"token": token, **{name: float(values_V[token]) for name, values_V in parts.items()}} for token in tokens
    ]
    left = {name: values_V.index_fill(0, torch.tensor(tokens), 0.0) for name, values_V in parts.items()}
    others = {"token": None, **{name: float(values_V.sum()) for name, values_V in left.items()}}
    is_all = all(len(values_V) == len(tokens) for values_V in parts.values())
    return rows if is_all else [*rows, others]


def _residual(outcome: Mapping[str, Any], gamma: float, scale: float) -> float | None:
    """What remains of the normalised target p - g / scale without the label's part, as a distribution of its own."""
    if 1 - gamma < 1e-9:
        return None
    normalised = outcome["student"] - outcome["gradient"] / scale
    return float((normalised - gamma * outcome["label"]) / (1 - gamma))


def _assumed(token: int | None, label: int, caches: Mapping[str, TopKLogProbs]) -> list[str]:
    """Those that do not keep this token."""
    if token is None or token == label:
        return []
    return [name for name, topk in caches.items() if token not in topk.ids[0, : topk.num_kept[0]]]


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "default": parameter.default,
        "low": parameter.low if math.isfinite(parameter.low) else None,
        "high": parameter.high if math.isfinite(parameter.high) else None,
        "integer": parameter.integer,
        "extrapolates": parameter.extrapolates,
        "meaning": parameter.meaning,
    }
