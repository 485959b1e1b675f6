"""Numbers that describe rows: entropy, kept mass, where the label stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitcache_storage.topk import TopKLogProbs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowStatistics:
    """Per-row numbers of N rows."""

    entropy: Floats
    """Entropy over the kept ids and the tail as one outcome, [N], nats; a lower bound of the full entropy."""
    kept_mass: Floats
    """Mass on the kept ids, [N], in (0, 1]."""
    label_log_prob: Floats
    """[N], nats."""
    label_rank: npt.NDArray[np.int64]
    """1 for the most likely token; 0 where the label is not among the kept ids, [N]."""


def row_statistics(topk: TopKLogProbs, labels: npt.NDArray[np.int32]) -> RowStatistics:
    """Statistics of each row, given the observed tokens [N]."""
    kept = topk.kept
    log_probs = np.where(kept, topk.log_probs, -np.inf).astype(np.float64)
    probs = np.exp(log_probs)
    tail = np.exp(topk.log_tail.astype(np.float64))
    entropy = -np.where(probs > 0, probs * np.where(kept, topk.log_probs, 0.0), 0.0).sum(1)
    entropy -= np.where(tail > 0, tail * np.where(tail > 0, topk.log_tail, 0.0), 0.0)
    is_label = (topk.ids == labels[:, None]) & kept
    rank = np.where(is_label.any(1), is_label.argmax(1) + 1, 0)
    return RowStatistics(entropy, probs.sum(1), topk.label_log_prob.astype(np.float64), rank)


def sum_statistics(topk: TopKLogProbs, labels: npt.NDArray[np.int32]) -> dict[str, float]:
    """Sums over the rows, small enough to stand in every commit record; divide by the number of rows for means."""
    rows = row_statistics(topk, labels)
    return {
        "entropy_sum": float(rows.entropy.sum()),
        "kept_mass_sum": float(rows.kept_mass.sum()),
        "label_log_prob_sum": float(rows.label_log_prob.sum()),
        "num_kept_sum": float(topk.num_kept.sum()),
        "label_is_top_1": float((rows.label_rank == 1).sum()),
        "label_in_top_k": float((rows.label_rank > 0).sum()),
    }
