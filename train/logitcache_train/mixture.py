"""Several teachers as one cached distribution: a weighted mean on the union of their supports and its tail.

U is the union of the supports S_i (the cached ids of teacher i and the label). Teacher i knows q_i on S_i and the
mass tau_i outside, whose inside follows the student as with one teacher:

    log rho_i = log(1 - sum_{S_i} p)            log-sum-exp of p on U outside S_i, and of the student's tail of U
    q_i(a)    = tau_i p_a / rho_i               a in U outside S_i
    q_i(tail) = tau_i rho_U / rho_i             the rest of tau_i, outside U

    arithmetic   q ~ sum_i w_i q_i
    geometric    q ~ prod_i q_i^w_i             sum_i w_i = 1

Outside U every q_i is proportional to p, hence so are both means, and the mixture is exact on U and one tail.

Shapes: N positions, S slots of one support, U slots of the union, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_train.atoms import CachedTopK, CoarseStudent, Support

Mean = Literal["arithmetic", "geometric"]

MEANS: tuple[Mean, ...] = ("arithmetic", "geometric")


@dataclass(frozen=True, eq=False)
class CachedMixture:
    """Several teachers' caches of the same N positions, to be used wherever one is."""

    parts: tuple[CachedTopK, ...]
    weights: tuple[float, ...]
    """One for each part, >= 0; they are divided by their sum. A part of weight 0 is not looked at."""
    mean: Mean = "arithmetic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "weights", check_mixture(self.weights, self.mean))
        if len(self.parts) != len(self.weights):
            raise InputError(f"a mixture needs a weight for each part, got {len(self.weights)} for {len(self.parts)}")
        if len(lengths := {len(part) for part in self.parts}) > 1:
            raise InputError(
                f"the parts of a mixture have {sorted(lengths)} rows; they must be of the same target positions"
            )

    @property
    def label_log_prob(self) -> Tensor:
        """Log of the label's probability under an arithmetic mean, [N].

        Raises:
            InputError: a geometric mean is normalised over the vocabulary, for which it takes the student.
        """
        if self.mean == "geometric":
            raise InputError(
                "the label's log-prob in a geometric mean of teachers depends on the student, where their top-k"
                " differ; an objective that reads it needs one cache or an arithmetic mean"
            )
        logs = [math.log(weight) + part.label_log_prob for part, weight in self._used()]
        return torch.stack(logs).logsumexp(0)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice | Tensor) -> CachedMixture:
        return self.map(lambda tensor: tensor[rows])

    def map(self, fn: Callable[[Tensor], Tensor]) -> CachedMixture:
        """The same with `fn` applied to every tensor."""
        return CachedMixture(tuple(part.map(fn) for part in self.parts), self.weights, self.mean)

    def to(self, device: torch.device | str) -> CachedMixture:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def support(self, labels_N: Tensor, vocab_size: int, dtype: torch.dtype) -> Support:
        """The union of the parts' supports."""
        supports = [part.support(labels_N, vocab_size, dtype) for part, _ in self._used()]
        labels_N1 = labels_N[:, None]
        # Sorted, so that the first slot of each token is its outcome and a search finds it.
        sorted_NU = torch.cat([support.ids_NS for support in supports], dim=-1).sort(dim=-1).values
        is_first_NU = torch.ones_like(sorted_NU, dtype=torch.bool)
        is_first_NU[:, 1:] = sorted_NU[:, 1:] != sorted_NU[:, :-1]
        has_tail_N = is_first_NU.sum(-1) < vocab_size
        is_outcome_NU = torch.nn.functional.pad(is_first_NU, (0, 1), value=False)
        ids_NU = torch.where(is_outcome_NU, torch.cat([sorted_NU, labels_N1], dim=-1), labels_N1)
        return _UnionSupport(
            ids_NU,
            is_outcome_NU,
            is_outcome_NU & (ids_NU == labels_N1),
            has_tail_N,
            parts=tuple(_Part.place(support, sorted_NU) for support in supports),
            weights=tuple(weight for _, weight in self._used()),
            mean=self.mean,
        )

    def _used(self) -> list[tuple[CachedTopK, float]]:
        return [(part, weight) for part, weight in zip(self.parts, self.weights, strict=True) if weight > 0]


def check_mixture(weights: Sequence[float], mean: str) -> tuple[float, ...]:
    """The weights divided by their sum.

    Raises:
        InputError: no weights, one that is negative or no number, none above zero, or an unknown mean.
    """
    if mean not in MEANS:
        raise InputError(f"unknown mean {mean!r} of teachers; choose from {', '.join(MEANS)}")
    numbers = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights)
    total = math.fsum(weights) if numbers else 0.0
    if not 0 < total < math.inf:
        raise InputError(f"weights of teachers must be numbers >= 0, at least one of them above, got {list(weights)}")
    return tuple(weight / total for weight in weights)


@dataclass(frozen=True, eq=False)
class _Part:
    """One teacher on the union."""

    log_q_NU: Tensor
    """-inf outside S_i."""
    is_own_NU: Tensor
    """The slots of S_i."""
    log_tau_N: Tensor

    @classmethod
    def place(cls, support: Support, sorted_NU: Tensor) -> _Part:
        """A teacher's own support, moved into the slots of the union (and one at the end that is no outcome)."""
        assert support.log_q_NS is not None and support.log_tau_N is not None
        slots_NS = torch.searchsorted(sorted_NU, support.ids_NS)
        width = (len(sorted_NU), sorted_NU.shape[1] + 1)
        # Slots of S_i that are no outcome share the slot of the label, whose log-prob is the larger one.
        log_q_NU = support.log_q_NS.new_full(width, -torch.inf).scatter_reduce(1, slots_NS, support.log_q_NS, "amax")
        return cls(log_q_NU, torch.zeros_like(log_q_NU, dtype=torch.bool).scatter(1, slots_NS, True), support.log_tau_N)

    def spread(self, student: CoarseStudent) -> tuple[Tensor, Tensor]:
        """log q_i on U and on the tail of U, with tau_i spread like the student."""
        # From logits, relative to the largest outside S_i: where log rho_i = -1e4, log p_a - log rho_i is off by 1e-3.
        z_NU, tail_max_N = student.z_NS.detach().masked_fill(self.is_own_NU, -torch.inf), student.tail_max_N
        max_N = torch.maximum(z_NU.amax(-1), tail_max_N)
        z_NU = z_NU - max_N[:, None]
        tail_N = student.tail_log_sum_N.detach() + (tail_max_N - max_N)
        log_share_N = self.log_tau_N - torch.logaddexp(z_NU.logsumexp(-1), tail_N)
        # Without tau_i nothing is spread, also where there is no token outside S_i.
        is_empty_N = self.log_tau_N == -torch.inf
        log_q_NU = (z_NU + log_share_N[:, None]).masked_fill(is_empty_N[:, None], -torch.inf)
        log_tail_N = (tail_N + log_share_N).masked_fill(is_empty_N, -torch.inf)
        return torch.where(self.is_own_NU, self.log_q_NU, log_q_NU), log_tail_N


@dataclass(frozen=True, eq=False)
class _UnionSupport(Support):
    """The union of several supports."""

    parts: tuple[_Part, ...] = ()
    weights: tuple[float, ...] = ()
    mean: Mean = "arithmetic"

    def cached(self, student: CoarseStudent) -> tuple[Tensor, Tensor]:
        """Log of the mean on U and on the tail, with the tails spread like this student."""
        spread = [part.spread(student) for part in self.parts]
        log_q_NU, log_tail_N = (self._mean_of(logs) for logs in zip(*spread, strict=True))
        log_total_N = torch.logaddexp(log_q_NU.logsumexp(-1), log_tail_N)
        return log_q_NU - log_total_N[:, None], log_tail_N - log_total_N

    def _mean_of(self, logs: Sequence[Tensor]) -> Tensor:
        if self.mean == "arithmetic":
            weighted = [math.log(weight) + log for weight, log in zip(self.weights, logs, strict=True)]
            return torch.stack(weighted).logsumexp(0)
        return torch.stack([weight * log for weight, log in zip(self.weights, logs, strict=True)]).sum(0)
