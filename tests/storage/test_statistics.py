"""Row statistics against a loop over the rows in float64."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache_storage import statistics
from logitcache_storage.statistics import row_statistics, sum_statistics
from logitcache_storage.testing import make_topk


@pytest.mark.parametrize("k", [1, 5, 13])
@pytest.mark.parametrize("mass", [0.8, 1.0])
def test_against_a_loop(k: int, mass: float, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(1).integers(13, size=40).astype(np.int32)
    topk = make_topk(40, k, 13, labels=labels).keep_mass(mass)
    monkeypatch.setattr(statistics, "ROWS_AT_ONCE", 16)
    found = row_statistics(topk, labels)
    for row in range(40):
        kept = [float(x) for x in topk.log_probs[row, : topk.num_kept[row]]]
        outcomes = [*kept, float(topk.log_tail[row])]
        entropy = -sum(np.exp(x) * x for x in outcomes if x > -np.inf)
        assert found.entropy[row] == pytest.approx(entropy, abs=1e-9)
        assert found.top_1_probability[row] == pytest.approx(np.exp(kept[0]), abs=1e-9)
        assert found.kept_mass[row] == pytest.approx(sum(np.exp(x) for x in kept), abs=1e-9)
        ids = topk.ids[row, : topk.num_kept[row]].tolist()
        assert found.label_rank[row] == (ids.index(labels[row]) + 1 if labels[row] in ids else 0)
    sums = sum_statistics(topk, found)
    assert sums["entropy_sum"] == pytest.approx(found.entropy.sum())
    assert sums["kept_mass_sum"] == pytest.approx(found.kept_mass.sum())
    assert sums["label_log_prob_sum"] == pytest.approx(topk.label_log_prob.astype(np.float64).sum())
    assert sums["num_kept_sum"] == topk.num_kept.sum()
    assert sums["label_is_top_1"] == (topk.ids[:, 0] == labels).sum()
    assert sums["label_in_top_k"] == sum(
        label in row[:n] for label, row, n in zip(labels, topk.ids, topk.num_kept, strict=True)
    )


def test_padding_is_no_label() -> None:
    """Beyond num_kept the ids are 0, which may be the label."""
    topk = make_topk(30, 6, 13).keep_mass(0.3)
    labels = np.zeros(30, np.int32)
    expected = [0 in row[:n] for row, n in zip(topk.ids, topk.num_kept, strict=True)]
    assert ((row_statistics(topk, labels).label_rank > 0) == expected).all()
    assert not all(expected)


def test_no_rows() -> None:
    topk = make_topk(0, 3, 9)
    assert set(sum_statistics(topk, row_statistics(topk, np.zeros(0, np.int32))).values()) == {0.0}
