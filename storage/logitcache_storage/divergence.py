"""How far apart two sparse distributions are, and what can be said of it when neither is known in full.

P and Q are two distributions of the next token. A keeps the ids S_A of P and the mass outside them, B the ids S_B of Q.
What both give to an id that only one keeps is known on one side only, so both are coarsened to what is known of both:
each id of I = S_A ∩ S_B is an outcome of its own, and everything else is one more, "the rest".

    KL(A || B) = sum over i in I of P_i log(P_i / Q_i) + P_rest log(P_rest / Q_rest)
    JS(A, B)   = KL(P || M) / 2 + KL(Q || M) / 2,  M = (P + Q) / 2

Rows without any id (k = 0) leave nothing but the rest: their divergences are 0, which says nothing.

Merging outcomes never increases a divergence (the data-processing inequality: Cover and Thomas, Elements of
Information Theory, 2nd edition, section 2.8), so these are lower bounds of the divergences over the whole vocabulary,
and exact where both keep all of it. How much they can miss is told by the mass of the rest on either side.

Shapes: N rows, k ids per row, R pairs of entries of equal id.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from logitcache_storage.cache import Sample
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.topk import TopKLogProbs

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ENTRIES_AT_ONCE = 1 << 21
"""Entries of both sides that are compared at once; with temporaries about 150 MB."""

LOG_FLOOR = -700.0
"""Least log-mass of the rest in a denominator, so that an empty rest gives a large number and not infinity; raising a
denominator only lowers the divergence."""


@dataclass(frozen=True, eq=False)
class RowComparison:
    """Two distributions at each of N target positions."""

    kl_ab: Floats
    """KL(A || B), [N], nats, >= 0; a lower bound, like the next two."""
    kl_ba: Floats
    """KL(B || A), [N]."""
    js: Floats
    """Jensen-Shannon divergence, [N], in [0, log 2]."""
    top_1_agrees: Floats
    """1 where both have the same first choice, else 0, [N]; 0 where one of the two keeps no id."""
    top_k_overlap: Floats
    """Ids that both keep, as a share of those of the row that keeps fewer, [N], in [0, 1]; 0 where that is none."""
    label_difference: Floats
    """Log-prob of the observed token in B minus that in A, [N], nats."""
    rest_mass_a: Floats
    """Mass that A gives to ids that not both keep, [N]: nothing is known of how the two differ within it."""
    rest_mass_b: Floats
    """The same of B, [N]."""


def compare_rows(a: TopKLogProbs, b: TopKLogProbs) -> RowComparison:
    """Compare N rows with N rows; k may differ.

    Raises:
        InputError: the numbers of rows differ.
    """
    if len(a) != len(b):
        raise InputError(f"{len(a)} rows cannot be compared with {len(b)}")
    step = max(1, ENTRIES_AT_ONCE // max(1, a.k + b.k))
    parts = [_compare(a[i : i + step], b[i : i + step]) for i in range(0, max(1, len(a)), step)]
    return RowComparison(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(RowComparison)))


def compare_sample(a: Sample, b: Sample) -> RowComparison:
    """Compare one sample as two caches hold it, one entry per target token.

    Raises:
        MismatchError: these are different samples.
    """
    if a.key != b.key:
        raise MismatchError(f"sample {a.key} cannot be compared with {b.key}: other tokens or other targets")
    return compare_rows(a.topk, b.topk)


def _compare(a: TopKLogProbs, b: TopKLogProbs) -> RowComparison:
    rows, slots_a, slots_b = _shared_entries(a, b)
    p_R, log_rest_p, rest_p = _coarsened(a, rows, slots_a)
    q_R, log_rest_q, rest_q = _coarsened(b, rows, slots_b)

    def divergence(log_p_R: Floats, log_q_R: Floats, log_p: Floats, log_q: Floats) -> Floats:
        kept = np.bincount(rows, np.exp(log_p_R) * (log_p_R - log_q_R), minlength=len(a))
        with np.errstate(invalid="ignore"):
            rest = np.exp(log_p) * (log_p - np.maximum(log_q, LOG_FLOOR))
        return np.asarray(np.maximum(kept + np.where(np.isneginf(log_p), 0.0, rest), 0.0))

    m_R, log_rest_m = np.logaddexp(p_R, q_R) - np.log(2), np.logaddexp(log_rest_p, log_rest_q) - np.log(2)
    to_middle = divergence(p_R, m_R, log_rest_p, log_rest_m) + divergence(q_R, m_R, log_rest_q, log_rest_m)
    shared = np.bincount(rows, minlength=len(a))
    return RowComparison(
        kl_ab=divergence(p_R, q_R, log_rest_p, log_rest_q),
        kl_ba=divergence(q_R, p_R, log_rest_q, log_rest_p),
        js=np.minimum(to_middle / 2, np.log(2)),
        top_1_agrees=(a.ids[:, :1] == b.ids[:, :1]).any(1).astype(np.float64),
        top_k_overlap=shared / np.maximum(1, np.minimum(a.num_kept, b.num_kept)),
        label_difference=b.label_log_prob.astype(np.float64) - a.label_log_prob,
        rest_mass_a=rest_p,
        rest_mass_b=rest_q,
    )


def _shared_entries(a: TopKLogProbs, b: TopKLogProbs) -> tuple[Integers, Integers, Integers]:
    """Rows, entries of A and entries of B, [R] each, of the ids that both rows keep."""
    # One sort of all ids of a row: an id that both keep stands twice, A's entry first. Entries that are not kept get
    # an id below zero that no other entry of the row has.
    slot = np.arange(a.k + b.k, dtype=np.int64)
    bits = len(slot).bit_length()
    kept = np.concatenate([a.kept, b.kept], axis=1)
    ids = np.concatenate([a.ids, b.ids], axis=1)
    entries = np.where(kept, ids, -1 - slot) << bits | slot
    entries.sort(axis=1)
    rows, first = np.nonzero((entries[:, 1:] ^ entries[:, :-1]) >> bits == 0)
    slots = entries & ((1 << bits) - 1)
    return rows, slots[rows, first], slots[rows, first + 1] - a.k


def _coarsened(topk: TopKLogProbs, rows: Integers, slots: Integers) -> tuple[Floats, Floats, Floats]:
    """(log-probs of the shared entries [R], log-prob of the rest [N], mass of the rest [N]), normalised by row."""
    log_probs = np.where(topk.kept, topk.log_probs, -np.inf).astype(np.float64)
    shared_R = log_probs[rows, slots]
    log_probs[rows, slots] = -np.inf
    rest = np.exp(log_probs).sum(1) + np.exp(topk.log_tail.astype(np.float64))
    mass = rest + np.bincount(rows, np.exp(shared_R), minlength=len(topk))
    with np.errstate(divide="ignore"):
        return shared_R - np.log(mass)[rows], np.log(rest) - np.log(mass), rest / mass
