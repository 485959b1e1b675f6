"""Numbers that describe rows: entropy, kept mass, where the label stands."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from logitcache_storage.topk import TopKLogProbs

Floats = npt.NDArray[np.float64]

ROWS_AT_ONCE = 1024
"""Rows looked at together: at k = 64 all intermediate values stay in a core's own cache."""


SUMS = ("entropy_sum", "kept_mass_sum", "label_log_prob_sum", "num_kept_sum", "label_is_top_1", "label_in_top_k")
"""What stands in every commit record."""


@dataclass(frozen=True)
class RowStatistics:
    """Per-row numbers of N rows."""

    entropy: Floats
    """Entropy over the kept ids and the tail as one outcome, [N], nats; a lower bound of the full entropy."""
    kept_mass: Floats
    """Mass on the kept ids, [N], in (0, 1]; 0 where k is 0."""
    top_1_probability: Floats
    """Of the most likely token, [N]; 0 where k is 0."""
    label_log_prob: Floats
    """[N], nats."""
    label_rank: npt.NDArray[np.int64]
    """1 for the most likely token; 0 where the label is not among the kept ids, [N]."""


def row_statistics(topk: TopKLogProbs, labels: npt.NDArray[np.int32]) -> RowStatistics:
    """Statistics of each row, given the observed tokens [N]."""
    blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, max(1, len(topk)), ROWS_AT_ONCE)]
    parts = [_statistics(topk[rows], labels[rows]) for rows in blocks]
    return RowStatistics(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(RowStatistics)))


def sum_statistics(topk: TopKLogProbs, rows: RowStatistics) -> dict[str, float]:
    """Sums over the rows, small enough to stand in every commit record; divide by the number of rows for means."""
    sums = (
        rows.entropy.sum(),
        rows.kept_mass.sum(),
        rows.label_log_prob.sum(),
        topk.num_kept.sum(),
        (rows.label_rank == 1).sum(),
        (rows.label_rank > 0).sum(),
    )
    return dict(zip(SUMS, map(float, sums), strict=True))


def _statistics(topk: TopKLogProbs, labels: npt.NDArray[np.int32]) -> RowStatistics:
    kept = topk.kept
    log_probs = np.where(kept, topk.log_probs, 0.0).astype(np.float64)
    probs = np.exp(log_probs) * kept
    is_tail = np.isfinite(topk.log_tail)
    log_tail = np.where(is_tail, topk.log_tail, 0.0).astype(np.float64)
    entropy = -(probs * log_probs).sum(1) - np.exp(log_tail) * log_tail * is_tail
    is_label = (topk.ids == labels[:, None]) & kept
    return RowStatistics(
        entropy=np.maximum(entropy, 0.0),  # and not -0.0
        kept_mass=probs.sum(1),
        top_1_probability=probs[:, 0] if topk.k else np.zeros(len(topk)),
        label_log_prob=topk.label_log_prob.astype(np.float64),
        label_rank=is_label @ np.arange(1, topk.k + 1),  # one entry at most is the label
    )
