"""Does what is cached agree with what the teacher says when it is asked again?

Two things may set them apart. The encoding moves the log-probs of kept ids, by no more than `LABEL_TOLERANCE`. And the
teacher's own arithmetic depends on batch, kernel and device, by what its dtype can resolve; that moves all of them. The
label's log-prob and the tail are kept exactly, so the arithmetic alone must explain what they differ by.

Shapes: N rows, k ids kept in the cache, K >= k ids of the new answer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from logitcache_storage.divergence import compare_rows
from logitcache_storage.encoding import RANGE_NATS
from logitcache_storage.invariants import LABEL_TOLERANCE
from logitcache_storage.topk import TopKLogProbs

Floats = npt.NDArray[np.float64]

ARITHMETIC_NATS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}
"""How far one log-prob may move from run to run of the same teacher, by its dtype.

A logit of 30 lies on steps of 2e-6, 0.02 and 0.12 nats; a deep model, other kernels and other batches add up a few."""

MEAN_SHARE = 0.1
"""What the mean over all rows may be, as a share of what one row may be: rounding has no direction."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Differences between cached and new rows, [N] each."""

    kept: Floats
    """Largest |difference| of a kept id's log-prob, nats."""
    kept_sum: Floats
    """Sum of them over the row."""
    num_kept: Floats
    label: Floats
    """|Difference| of the label's log-prob, nats."""
    tail: Floats
    """|Difference| of the log of the mass outside the kept ids, nats; infinite where only one has none."""
    kl: Floats
    """KL(cached || new) over the ids that both keep and the rest, nats."""
    same_top_1: Floats
    """1 where the most likely id is the same, else 0."""
    severity: Floats
    """The largest difference as a multiple of what is allowed there; above 1 the row does not agree."""

    @staticmethod
    def join(parts: list[Agreement]) -> Agreement:
        """The rows of all parts, one behind the other."""
        return Agreement(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Agreement)))


@dataclass(frozen=True)
class Difference:
    """What one kind of log-prob differs by, in nats."""

    largest: float
    mean: float


@dataclass(frozen=True)
class RescoreReport:
    """What came of asking the teacher again."""

    teacher: str
    seed: int
    num_samples: int
    num_rows: int
    kept: Difference | None
    """None where the cache keeps no ids (k = 0), like all that is said of distributions."""
    label: Difference
    tail: Difference | None
    kl_mean: float | None
    """KL(cached || new), nats per row."""
    kl_largest: float | None
    top_1_agreement: float | None
    """Share of the rows with the same most likely id."""
    allowed: float
    """Nats that the arithmetic may move a log-prob by; kept ids may be off by the encoding's share as well."""
    agrees: bool
    worst_key: str
    """The sample with the row that is furthest off, measured by what is allowed there."""
    worst_source_id: str
    worst_position: int
    """Where in its tokens the target of that row stands."""
    worst_severity: float
    """As a multiple of what is allowed."""


def agreement(cached: TopKLogProbs, new: TopKLogProbs, *, precision: str, dtype: str) -> Agreement:
    """Compare N cached rows with the teacher's new answer, which should keep more ids than the cache does.

    Of rows that keep no ids (k = 0) the label alone can differ.

    Args:
        cached: as decoded.
        new: of the same positions, before any encoding.
        precision: of the cache.
        dtype: of the teacher, a key of `ARITHMETIC_NATS`.
    """
    rounding = ARITHMETIC_NATS[dtype]
    label = np.abs(cached.label_log_prob.astype(np.float64) - new.label_log_prob)
    if not cached.k:
        none = np.zeros(len(cached))
        return Agreement(none, none, none, label, none, none, none, severity=label / rounding)
    expected, tail = _on_ids_of(cached, new)
    if precision in ("u8", "u10"):
        expected = np.maximum(expected, expected[:, :1] - RANGE_NATS)
    nats, part = LABEL_TOLERANCE[precision]
    off = np.abs(np.where(cached.kept, cached.log_probs, 0.0) - np.where(cached.kept, expected, 0.0))
    allowed = nats + part * np.abs(expected) + rounding
    tail_off = _distance(cached.log_tail.astype(np.float64), tail)
    compared = compare_rows(cached, new)
    return Agreement(
        kept=off.max(1),
        kept_sum=off.sum(1),
        num_kept=cached.num_kept.astype(np.float64),
        label=label,
        tail=tail_off,
        kl=compared.kl_ab,
        same_top_1=compared.top_1_agrees,
        severity=np.maximum((off / allowed).max(1), np.maximum(label, tail_off) / rounding),
    )


def agrees(rows: Agreement, *, dtype: str) -> bool:
    """Whether no row is further off than it may be, and the exact columns not on the mean."""
    mean_allowed = MEAN_SHARE * ARITHMETIC_NATS[dtype]
    return bool((rows.severity <= 1).all() and rows.label.mean() <= mean_allowed and rows.tail.mean() <= mean_allowed)


def _on_ids_of(cached: TopKLogProbs, new: TopKLogProbs) -> tuple[Floats, Floats]:
    """The new log-probs of the cached ids, [N, k] with 0 where none is kept, and the new log of the rest, [N].

    An id that the new answer does not keep is somewhere below all that it keeps: it counts as near as that allows.
    """
    width = 1 + int(max(cached.ids.max(initial=0), new.ids.max(initial=0)))
    row = np.arange(len(cached), dtype=np.int64)[:, None] * width
    new_keys = (row + np.where(new.kept, new.ids, 0))[new.kept]
    new_log_probs = new.log_probs[new.kept].astype(np.float64)
    order = np.argsort(new_keys)
    wanted = (row + cached.ids)[cached.kept]
    place = order[np.minimum(np.searchsorted(new_keys[order], wanted), len(order) - 1)]
    is_there = new_keys[place] == wanted
    lowest = np.where(new.kept, new.log_probs, np.inf).min(1).astype(np.float64)
    nearest = np.minimum(cached.log_probs, lowest[:, None])[cached.kept]
    expected = np.zeros(cached.ids.shape)
    expected[cached.kept] = np.where(is_there, new_log_probs[place], nearest)
    outside = np.where(new.kept, new.log_probs, -np.inf).astype(np.float64)
    outside[tuple(axis[place[is_there]] for axis in np.nonzero(new.kept))] = -np.inf
    with np.errstate(divide="ignore"):
        return expected, np.logaddexp(new.log_tail.astype(np.float64), np.log(np.exp(outside).sum(1)))


def _distance(a: Floats, b: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))
