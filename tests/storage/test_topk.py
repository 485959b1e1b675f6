"""Sparse distributions: shapes, slices, and the smallest set that reaches a mass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_storage.testing import make_topk
from logitcache_storage.topk import TopKLogProbs


def test_shapes_that_do_not_fit() -> None:
    good = make_topk(4, 3, 9)
    for name, value in {
        "ids": good.ids[:, :2],
        "log_probs": good.log_probs[:3],
        "num_kept": good.num_kept[:3],
        "log_tail": good.log_tail[:, None],
        "label_log_prob": good.label_log_prob[:1],
    }.items():
        with pytest.raises(InputError, match="needs ids and log_probs"):
            TopKLogProbs(**{**good.__dict__, name: value})
    with pytest.raises(InputError):
        TopKLogProbs(**{**good.__dict__, "ids": good.ids[0]})


def test_rows_and_concatenate() -> None:
    topk = make_topk(10, 3, 9)
    assert len(topk) == 10 and topk.k == 3
    assert TopKLogProbs.concatenate([topk[:4], topk[4:4], topk[4:]]).equals(topk)
    assert topk[np.array([7, 0])].equals(TopKLogProbs.concatenate([topk[7:8], topk[:1]]))
    assert not topk[:4].equals(topk[:5])
    assert not topk[:4].equals(topk[1:5])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 12),
    mass=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 0.9999, 1.0]),
)
def test_smallest_set_that_reaches_a_mass(seed: int, k: int, mass: float) -> None:
    topk = make_topk(5, k, 12, seed=seed)
    found = topk.keep_mass(mass)
    for row in range(5):
        probs = np.exp(topk.log_probs[row].astype(np.float64))
        needed = next((n for n in range(1, k + 1) if probs[:n].sum() >= mass), k)
        assert found.num_kept[row] == needed
        assert np.array_equal(found.ids[row], [*topk.ids[row, :needed], *[0] * (k - needed)])
        assert np.array_equal(found.log_probs[row], [*topk.log_probs[row, :needed], *[-np.inf] * (k - needed)])
        tail = np.exp(np.float64(topk.log_tail[row])) + probs[needed:].sum()
        assert np.exp(np.float64(found.log_tail[row])) == pytest.approx(tail, rel=1e-6, abs=1e-12)
    assert np.array_equal(found.label_log_prob, topk.label_log_prob)
    assert found.keep_mass(mass).equals(found)
    assert found.kept.sum() == found.num_kept.sum()
