"""Target positions: what belongs to each, what a coefficient may look at, and what is logged.

Both losses share this file and `atoms.py`; they differ only in how they get from logits to a coarse student.

Shapes: N target positions, S slots of the support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_train.atoms import Cached, CachedTopK, CoarseStudent, Support, to_tensor
from logitcache_train.mixture import CachedMixture
from logitcache_train.objectives import ATOMS, Objective


class BadRowsError(InputError):
    """Some positions cannot be trained on; `rows` are their indices, for callers that know their samples."""

    def __init__(self, message: str, bad_N: Tensor) -> None:
        self.rows: list[int] = bad_N.nonzero().flatten().tolist()
        more = f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else ""
        super().__init__(message.format(", ".join(map(str, self.rows[:8])) + more))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What belongs to each position besides the student; made by `check_inputs`."""

    obj: Objective
    labels_N: Tensor
    cached: Mapping[str, Cached]
    columns: Mapping[str, Tensor]
    vocab_size: int
    """How many tokens carry mass: the smaller of the head's rows and the cache's vocabulary."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, rows: slice) -> Inputs:
        cached = {role: topk[rows] for role, topk in self.cached.items()}
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Inputs(self.obj, self.labels_N[rows], cached, columns, self.vocab_size)

    @property
    def topk(self) -> Cached | None:
        """The cache behind the atoms `cached` and `guided`."""
        return None if self.obj.role is None else self.cached[self.obj.role]

    @property
    def needs_all_rows(self) -> bool:
        """Whether a coefficient depends on other positions than its own."""
        return self.obj.pooled is not None and self.obj.pool_by in self.columns

    def pool(self, statistic_N: Tensor) -> Tensor:
        """The mean of a statistic over the positions of equal `pool_by` column."""
        if not self.needs_all_rows:
            return statistic_N
        _, group_N = torch.unique(self.columns[self.obj.pool_by], return_inverse=True)
        sums_G = torch.zeros_like(statistic_N).index_add_(0, group_N, statistic_N)
        counts_G = torch.zeros_like(statistic_N).index_add_(0, group_N, torch.ones_like(statistic_N))
        return (sums_G / counts_G)[group_N]


def check_inputs(
    labels_N: Tensor,
    obj: Objective,
    cached: Mapping[str, Any] | None,
    columns: Mapping[str, Any] | None,
    *,
    num_logits: int,
    vocab_size: int | None,
) -> Inputs:
    """Check all that can be known before the student is looked at.

    Raises:
        InputError: a role or a column is missing, or numbers of rows differ.
        BadRowsError: a label is outside the vocabulary.
    """
    cached, columns = cached or {}, columns or {}
    _require_all(obj, "cache role", obj.roles, cached, "on the command line: --cache {}=URL")
    _require_all(obj, "column", obj.columns, columns, "it must be a column of the corpus")
    size = num_logits if vocab_size is None else min(num_logits, vocab_size)
    if labels_N.ndim != 1:
        raise InputError(f"labels must be [N], got {list(labels_N.shape)}")
    outside_N = (labels_N < 0) | (labels_N >= size)
    if outside_N.any():
        raise BadRowsError(
            f"labels of rows {{}} are outside the vocabulary of {size} tokens, the first is"
            f" {int(labels_N[outside_N][0])}; give target positions only, to a student with all their tokens",
            outside_N,
        )
    device = labels_N.device
    caches = {role: _to_cached(cached[role], device) for role in (*obj.roles, *obj.optional_roles) if role in cached}
    data = {name: to_tensor(columns[name], device) for name in (*obj.columns, *obj.optional_columns) if name in columns}
    for name, num_rows in [(n, len(rows)) for part in (caches, data) for n, rows in part.items()]:
        if num_rows != len(labels_N):
            raise InputError(f"{name!r} has {num_rows} rows, expected one for each of {len(labels_N)} labels")
    return Inputs(obj, labels_N.long(), caches, data, size)


@dataclass(frozen=True, eq=False)
class Positions:
    """What a coefficient may look at; every value is detached and has one entry for each of N positions."""

    inputs: Inputs
    student: CoarseStudent
    top_logits: Callable[[int], Tensor]
    """The k largest logits of each position, [N, min(k, V)], up to a constant for each position."""
    pooled: Tensor | None = None
    """The objective's pooled statistic, [N]."""

    @property
    def log_p_label(self) -> Tensor:
        """log p_y of the student."""
        return self.student.log_p_label_N.detach()

    @property
    def p_label(self) -> Tensor:
        """p_y of the student."""
        return self.log_p_label.exp()

    @property
    def p_rest(self) -> Tensor:
        """1 - p_y of the student, right also where p_y rounds to 1."""
        return self.student.log_p_rest_N.exp()

    def top_k_entropy(self, k: int) -> Tensor:
        """Entropy of the student's top-k, renormalised and divided by log k: in [0, 1]."""
        top_Nk = self.top_logits(k).softmax(-1)
        # A vocabulary of one token has the entropy 0, not 0 / log 1.
        entropy_N: Tensor = torch.special.entr(top_Nk).sum(-1)
        return entropy_N / math.log(max(top_Nk.shape[-1], 2))

    def has_cache(self, role: str) -> bool:
        """Whether this cache was given."""
        return role in self.inputs.cached

    def label_log_prob(self, role: str) -> Tensor:
        """The label's log-prob in this cache."""
        cache: Cached = self._declared(self.inputs.cached, role, "label_roles")
        return cache.label_log_prob.to(self.log_p_label.dtype)

    def column(self, name: str) -> Tensor:
        """A per-position column."""
        column_N: Tensor = self._declared(self.inputs.columns, name, "columns")
        return column_N.to(self.log_p_label.dtype)

    def statistic(self) -> Tensor:
        """The statistic of each position that the objective pools, [N]."""
        assert callable(self.inputs.obj.pooled)
        return torch.as_tensor(self.inputs.obj.pooled(self, self.inputs.obj.par))

    def coefficients(self, pooled_N: Tensor | None = None) -> dict[str, Tensor]:
        """The coefficient of each atom the objective has, [N].

        `pooled_N` is the pooled statistic, where it takes more positions than these to know it.
        """
        obj, like_N = self.inputs.obj, self.log_p_label
        if obj.pooled is not None:
            pooled_N = self.inputs.pool(self.statistic()) if pooled_N is None else pooled_N
        at = replace(self, pooled=pooled_N)
        values: dict[str, Tensor] = {}
        for atom in filter(obj.has, ATOMS):
            coefficient = getattr(obj, atom)
            value = coefficient(at, obj.par) if callable(coefficient) else coefficient
            values[atom] = torch.as_tensor(value, dtype=like_N.dtype, device=like_N.device).expand_as(like_N)
        return values

    def _declared(self, found: Mapping[str, Any], name: str, where: str) -> Any:
        if name not in found:
            raise InputError(f"objective {self.inputs.obj.name!r} reads {name!r}: declare it in its {where}")
        return found[name]


def total(coefficients: Mapping[str, Tensor], like_N: Tensor) -> Tensor:
    """The sum of all coefficients, [N]: what p is multiplied with in the gradient."""
    return sum(coefficients.values(), torch.zeros_like(like_N))


def row_metrics(
    loss_N: Tensor,
    coefficients: Mapping[str, Tensor],
    student: CoarseStudent,
    support: Support,
    pull_NS: Tensor,
    pull_tail_N: Tensor,
) -> dict[str, Tensor]:
    """What is logged of each position, see `logitcache_train.loss.target_metrics`.

    `pull` is sum_j c_j atom_j on the support and on the tail, so that Q = (1 - sum_j c_j) p + pull.
    """
    total_N = total(coefficients, loss_N)
    q_NS = (1 - total_N)[:, None] * student.log_p_NS.exp() + pull_NS
    q_tail_N = (1 - total_N) * student.log_rho_N.exp() + pull_tail_N
    # A target with negative entries (gem has them) has no entropy: they count as empty.
    entropy_N = torch.special.entr(q_NS.clamp(min=0)).sum(-1) + torch.special.entr(q_tail_N.clamp(min=0))
    metrics = {
        "loss": loss_N,
        "p_label": student.log_p_label_N.exp(),
        "gamma": coefficients.get("label", torch.zeros_like(loss_N)) / total_N.clamp(min=1),
        "target_entropy": entropy_N,
    }
    if (log_q := support.cached(student)) is not None:
        metrics["teacher_tail"] = log_q[1].exp()
    return {name: value.detach() for name, value in metrics.items()}


def check_finite(loss_N: Tensor, lse_N: Tensor) -> None:
    """Refuse a batch with a loss that is not a number, by row.

    Raises:
        BadRowsError: the logits or the losses of some rows are not finite.
    """
    bad_logits_N = ~torch.isfinite(lse_N)
    bad_N = bad_logits_N | ~torch.isfinite(loss_N)
    if not bad_N.any():
        return
    if bad_logits_N.any():
        raise BadRowsError(
            f"the logits of rows {{}} of {len(bad_N)} hold NaN or infinite values; the student has diverged or"
            " its weights are damaged: try a lower learning rate or a wider dtype",
            bad_logits_N,
        )
    raise BadRowsError(
        f"the loss of rows {{}} of {len(bad_N)} is not finite: a logit is -inf, a coefficient is no number (a"
        " division by zero, say), an eta outside [0, 1] gives a token infinite weight, or the cached log-probs are"
        " damaged or leave no mass on the student's vocabulary",
        bad_N,
    )


def _to_cached(cache: Any, device: torch.device) -> Cached:
    if isinstance(cache, CachedMixture):
        return cache.to(device)
    return CachedTopK.from_numpy(cache, device=device)


def _require_all(obj: Objective, what: str, needed: Iterable[str], found: Mapping[str, Any], remedy: str) -> None:
    for name in needed:
        if name not in found:
            given = ", ".join(sorted(found)) or "none"
            raise InputError(f"objective {obj.name!r} needs the {what} {name!r}, given: {given}; {remedy.format(name)}")
