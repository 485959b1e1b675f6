"""The atoms on a coarse vocabulary: the support S (cached ids and the label) and one outcome for the rest.

    log rho = log(1 - sum_S p)      the student's tail: log-sum-exp of the logits outside S
    log tau = log(1 - sum_S q)      the cached tail
    cached(a) = tau p_a / rho       for a outside S: inside the tail, the cache follows the student

so `cached` and `guided` need a gather at S and two log-sum-exps, never an exponent over the vocabulary.
Everything stays in log space, because in float32 the 1 - p_y of a confident student is 0 and its log -inf.

Shapes: N target positions, k cached ids, S = k + 1 slots of the support (or 1 without a cache), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from logitcache_storage.errors import InputError


class Cached(Protocol):
    """A cached distribution at N positions: one teacher's (`CachedTopK`), or a mixture of several's."""

    @property
    def label_log_prob(self) -> Tensor:
        """Log-prob of the observed token, [N] float."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Cached: ...

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cached:
        """The same with `fn` applied to every tensor."""
        ...

    def to(self, device: torch.device | str) -> Cached:
        """The same on another device."""
        ...

    def support(self, labels_N: Tensor, vocab_size: int, dtype: torch.dtype) -> Support:
        """The support of each position, see `build_support`."""
        ...


@dataclass(frozen=True, eq=False)
class CachedTopK:
    """`logitcache_storage.TopKLogProbs` as torch tensors."""

    ids: Tensor
    """Token ids, [N, k] integer, distinct where kept."""
    log_probs: Tensor
    """Their log-probs in nats, [N, k] float; -inf beyond `num_kept`."""
    num_kept: Tensor
    """How many entries are kept, [N] integer."""
    log_tail: Tensor
    """Log of the mass outside the kept ids, [N] float; -inf where there is none."""
    label_log_prob: Tensor
    """Log-prob of the observed token, [N] float, whether or not it is among the ids."""

    @classmethod
    def from_numpy(cls, topk: Any, *, device: torch.device | str | None = None) -> CachedTopK:
        """From any object with these field names whose values are arrays or tensors."""
        return cls(*(to_tensor(getattr(topk, f.name), device) for f in fields(cls)))

    @classmethod
    def from_log_probs(cls, log_probs_NV: Tensor, labels_N: Tensor, k: int) -> CachedTopK:
        """The top-k of distributions over a whole vocabulary; with k = V there is no tail."""
        log_probs_Nk, ids_Nk = log_probs_NV.topk(k)
        return cls(
            ids=ids_Nk,
            log_probs=log_probs_Nk,
            num_kept=torch.full_like(labels_N, k),
            log_tail=log_probs_NV.scatter(1, ids_Nk, -torch.inf).logsumexp(-1),
            label_log_prob=log_probs_NV.gather(1, labels_N[:, None])[:, 0],
        )

    def __post_init__(self) -> None:
        shapes = {f.name: tuple(getattr(self, f.name).shape) for f in fields(self)}
        n, k = shapes["ids"] if len(shapes["ids"]) == 2 else (-1, -1)
        if n < 0 or shapes["log_probs"] != (n, k) or any(shapes[f.name] != (n,) for f in fields(self)[2:]):
            raise InputError(f"cached top-k needs ids and log_probs [N, k] and three [N] columns, got {shapes}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> CachedTopK:
        return self.map(lambda tensor: tensor[rows])

    def map(self, fn: Callable[[Tensor], Tensor]) -> CachedTopK:
        """The same with `fn` applied to every tensor."""
        return CachedTopK(*(fn(getattr(self, f.name)) for f in fields(self)))

    def to(self, device: torch.device | str) -> CachedTopK:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def support(self, labels_N: Tensor, vocab_size: int, dtype: torch.dtype) -> Support:
        """The kept ids below `vocab_size` and the label, with the cached distribution on them."""
        labels_N1, ids_Nk = labels_N[:, None], self.ids.long()
        slots_k = torch.arange(ids_Nk.shape[1], device=ids_Nk.device)
        kept_Nk = (slots_k < self.num_kept[:, None]) & (ids_Nk < vocab_size)
        is_label_Nk = kept_Nk & (ids_Nk == labels_N1)
        label_outside_N = ~is_label_Nk.any(-1)
        is_outcome_NS = torch.cat([kept_Nk, label_outside_N[:, None]], dim=-1)
        is_label_NS = torch.cat([is_label_Nk, label_outside_N[:, None]], dim=-1)
        has_tail_N = is_outcome_NS.sum(-1) < vocab_size

        label_N, tail_N = self.label_log_prob.to(dtype), self.log_tail.to(dtype)
        log_q_NS = torch.cat([self.log_probs.to(dtype), label_N[:, None]], dim=-1)
        log_q_NS = torch.where(is_label_NS, label_N[:, None], log_q_NS).masked_fill(~is_outcome_NS, -torch.inf)
        log_tau_N = torch.where(label_outside_N, _log_difference(tail_N, label_N), tail_N)
        log_tau_N = log_tau_N.masked_fill(~has_tail_N, -torch.inf)
        log_total_N = torch.logaddexp(log_q_NS.logsumexp(-1), log_tau_N)
        return Support(
            torch.cat([torch.where(kept_Nk, ids_Nk, labels_N1), labels_N1], dim=-1),
            is_outcome_NS,
            is_label_NS,
            has_tail_N,
            log_q_NS - log_total_N[:, None],
            log_tau_N - log_total_N,
        )


def to_tensor(values: Any, device: torch.device | str | None) -> Tensor:
    """A tensor of an array or a tensor; arrays mapped from a file, which cannot be written to, are copied."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()
    return torch.as_tensor(values, device=device)


@dataclass(frozen=True, eq=False)
class Support:
    """The support of N positions, and the cached distribution on it if there is one."""

    ids_NS: Tensor
    """Token of each slot; the last is the label's, and slots that are no outcome repeat the label's id."""
    is_outcome_NS: Tensor
    """Which slots are outcomes, each token of S exactly once."""
    is_label_NS: Tensor
    """The one slot of the label."""
    has_tail_N: Tensor
    """Whether any token of the vocabulary is outside S."""
    log_q_NS: Tensor | None = None
    """Cached log-probs, -inf where there is no outcome; with the tail they sum to one."""
    log_tau_N: Tensor | None = None
    """Log of the cached tail, -inf where it is empty."""

    def cached(self, student: CoarseStudent) -> tuple[Tensor, Tensor] | None:
        """Log of the cached distribution on S and on the tail, if there is one; a mixture takes the student for it."""
        return None if self.log_q_NS is None or self.log_tau_N is None else (self.log_q_NS, self.log_tau_N)


def build_support(labels_N: Tensor, cached: Cached | None, vocab_size: int, dtype: torch.dtype) -> Support:
    """The support of each position: its kept cached ids below `vocab_size`, and its label.

    The label's cached probability is `label_log_prob`; where the label is not among the kept ids it comes out
    of the cached tail. Ids at or above `vocab_size` carry no mass. What remains is renormalised, which also
    undoes the rounding of a quantised cache.
    """
    if cached is not None:
        return cached.support(labels_N, vocab_size, dtype)
    one_N1 = torch.ones_like(labels_N, dtype=torch.bool)[:, None]
    has_tail_N = torch.full_like(labels_N, vocab_size > 1, dtype=torch.bool)
    return Support(labels_N[:, None], one_N1, one_N1, has_tail_N)


@dataclass(frozen=True, eq=False)
class CoarseStudent:
    """The student on S and its tail, in log space."""

    log_p_NS: Tensor
    """-inf where the slot is no outcome."""
    log_rho_N: Tensor
    """Log of the student's tail, -inf where S is the whole vocabulary."""
    log_p_label_N: Tensor
    log_p_rest_N: Tensor
    """log(1 - p_y), from the log-sum-exp of everything but the label; detached."""
    lse_N: Tensor
    """Log-sum-exp of the given logits over the vocabulary."""
    z_NS: Tensor
    """The logits it was made of, -inf where the slot is no outcome; of them, differences are exact."""
    tail_max_N: Tensor
    tail_log_sum_N: Tensor


def coarse_student(z_NS: Tensor, tail_max_N: Tensor, tail_log_sum_N: Tensor, support: Support) -> CoarseStudent:
    """The student on the coarse vocabulary, differentiable in the logits.

    Args:
        z_NS: logits gathered at the support's ids.
        tail_max_N: the largest logit outside S, -inf where there is none.
        tail_log_sum_N: log of the sum over the tail of exp(z - tail_max), -inf where there is none.
        support: the support.
    """
    z_NS = z_NS.masked_fill(~support.is_outcome_NS, -torch.inf)
    max_N = torch.maximum(z_NS.detach().amax(-1), tail_max_N)
    # Differences first: at logits of 1e4 a float32 log-sum-exp is only good to 5e-4, a difference to 1e-7.
    shifted_NS = z_NS - max_N[:, None]
    tail_N = tail_log_sum_N + (tail_max_N - max_N)
    log_sum_N = torch.logaddexp(shifted_NS.logsumexp(-1), tail_N)
    log_p_NS = shifted_NS - log_sum_N[:, None]
    rest_NS = shifted_NS.detach().masked_fill(support.is_label_NS, -torch.inf)
    log_rest_N = torch.logaddexp(rest_NS.logsumexp(-1), tail_N.detach())
    return CoarseStudent(
        log_p_NS=log_p_NS,
        log_rho_N=tail_N - log_sum_N,
        log_p_label_N=log_p_NS.masked_fill(~support.is_label_NS, 0).sum(-1),
        log_p_rest_N=log_rest_N - log_sum_N.detach(),
        lse_N=log_sum_N + max_N,
        z_NS=z_NS,
        tail_max_N=tail_max_N,
        tail_log_sum_N=tail_log_sum_N,
    )


def coarse_target(
    coefficients: Mapping[str, Tensor], student: CoarseStudent, support: Support, eta: float | None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of `label`, `cached` and `guided` on S and on the tail, [N, S] and [N], detached.

    It sums to the sum of their coefficients, not to one: the student takes the remainder.
    """
    target_NS = torch.zeros_like(student.log_p_NS)
    tail_N = torch.zeros_like(student.log_rho_N)
    if "label" in coefficients:
        target_NS = target_NS + coefficients["label"][:, None] * support.is_label_NS
    if "cached" in coefficients or "guided" in coefficients:
        log_q = support.cached(student)
        assert log_q is not None
        for atom in filter(coefficients.__contains__, ("cached", "guided")):
            log_NS, log_tail_N = log_q if atom == "cached" else _guided(student, support, log_q, eta)
            target_NS = target_NS + coefficients[atom][:, None] * log_NS.exp()
            tail_N = tail_N + coefficients[atom] * log_tail_N.exp()
    return target_NS.detach(), tail_N.detach()


def cross_entropy(target_NS: Tensor, tail_N: Tensor, student: CoarseStudent) -> Tensor:
    """-sum_S t_a log p_a - t_tail log rho, [N]; an outcome without target mass counts 0 even at p_a = 0."""
    on_support_NS = target_NS * student.log_p_NS.masked_fill(target_NS == 0, 0)
    return -on_support_NS.sum(-1) - tail_N * student.log_rho_N.masked_fill(tail_N == 0, 0)


def _guided(
    student: CoarseStudent, support: Support, log_q: tuple[Tensor, Tensor], eta: float | None
) -> tuple[Tensor, Tensor]:
    """log of guided ~ p^(1-eta) q^eta on S and on the tail.

    Outside 0 <= eta <= 1 an outcome that the student (the cache) gives nothing has infinite weight: a NaN here,
    which `positions.check_finite` refuses.
    """
    assert eta is not None
    log_q_NS, log_tau_N = log_q
    log_w_NS = _power(student.log_p_NS.detach(), 1 - eta) + _power(log_q_NS, eta)
    log_w_tail_N = _power(student.log_rho_N.detach(), 1 - eta) + _power(log_tau_N, eta)
    if not 0 <= eta <= 1:  # what does not exist has no weight, though a negative power of its 0 is infinite
        log_w_NS = log_w_NS.masked_fill(~support.is_outcome_NS, -torch.inf)
        log_w_tail_N = log_w_tail_N.masked_fill(~support.has_tail_N, -torch.inf)
    log_total_N = torch.logaddexp(log_w_NS.logsumexp(-1), log_w_tail_N)
    return log_w_NS - log_total_N[:, None], log_w_tail_N - log_total_N


def _power(log_x: Tensor, exponent: float) -> Tensor:
    """log of x^exponent, with 0^0 = 1."""
    return torch.zeros_like(log_x) if exponent == 0 else exponent * log_x


def _log_difference(log_a_N: Tensor, log_b_N: Tensor) -> Tensor:
    """log(a - b), and -inf where b is not below a, as quantisation can make it."""
    empty_N = (log_b_N >= log_a_N) | (log_a_N == -torch.inf)
    return (log_a_N + torch.log(-torch.expm1(log_b_N - log_a_N))).masked_fill(empty_N, -torch.inf)
