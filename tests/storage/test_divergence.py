"""Divergences of truncated rows, against full-vocabulary distributions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage import divergence
from logitcache_storage.divergence import compare_rows, compare_sample
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.topk import TopKLogProbs

V = 23
FLOAT32 = 1e-5
"""Nats: log-probs of up to ten nats in float32 are off by 1e-6, over the two dozen terms of a row."""


def random_distributions(num_rows: int, seed: int, near: np.ndarray | None = None) -> np.ndarray:
    """Rows over V tokens, [N, V]; with `near`, distributions a little off those."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, V)) * rng.uniform(0.3, 3, size=(num_rows, 1))
    if near is not None:
        logits = np.log(near) + 0.3 * logits
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def truncated(probs: np.ndarray, k: int, num_kept: list[int] | None = None) -> TopKLogProbs:
    """The k most likely of each row, and the mass of the others."""
    order = np.argsort(-probs, axis=1)[:, :k].astype(np.int32)
    kept = np.full(len(probs), k) if num_kept is None else np.asarray(num_kept)
    inside = np.arange(k) < kept[:, None]
    chosen = np.where(inside, np.take_along_axis(probs, order, axis=1), 0.0)
    with np.errstate(divide="ignore"):
        tails = [math.fsum(np.delete(row, ids[:n])) for row, ids, n in zip(probs, order, kept, strict=True)]
        return TopKLogProbs(
            np.where(inside, order, 0),
            np.log(chosen).astype(np.float32),
            kept.astype(np.int32),
            np.log(tails).astype(np.float32),
            np.log(probs[:, 3]).astype(np.float32),
        )


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def js(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def kept_ids(topk: TopKLogProbs, row: int) -> set[int]:
    return set(topk.ids[row, : topk.num_kept[row]].tolist())


def check(p_NV: np.ndarray, q_NV: np.ndarray, a: TopKLogProbs, b: TopKLogProbs) -> None:
    """Every number of every row: equal to what the definition says, and a bound of what it should be a bound of."""
    found = compare_rows(a, b)
    for row, (p, q) in enumerate(zip(p_NV, q_NV, strict=True)):
        both = sorted(kept_ids(a, row) & kept_ids(b, row))
        outside = [i for i in range(V) if i not in both]
        coarse_p = [*p[both], math.fsum(p[outside])]
        coarse_q = [*q[both], math.fsum(q[outside])]
        assert found.kl_ab[row] == pytest.approx(kl(coarse_p, coarse_q), abs=FLOAT32)
        assert found.kl_ba[row] == pytest.approx(kl(coarse_q, coarse_p), abs=FLOAT32)
        assert found.js[row] == pytest.approx(js(coarse_p, coarse_q), abs=FLOAT32)
        assert 0 <= found.kl_ab[row] <= kl(list(p), list(q)) + FLOAT32
        assert 0 <= found.kl_ba[row] <= kl(list(q), list(p)) + FLOAT32
        assert 0 <= found.js[row] <= min(js(list(p), list(q)) + FLOAT32, math.log(2))
        assert found.rest_mass_a[row] == pytest.approx(coarse_p[-1], abs=FLOAT32)
        assert found.rest_mass_b[row] == pytest.approx(coarse_q[-1], abs=FLOAT32)
        assert found.top_1_agrees[row] == float(p.argmax() == q.argmax())
        assert found.top_k_overlap[row] == len(both) / min(a.num_kept[row], b.num_kept[row])
        assert found.label_difference[row] == pytest.approx(math.log(q[3] / p[3]), abs=FLOAT32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, V), st.integers(1, V), st.booleans(), st.data())
def test_the_definition_and_the_bound(seed: int, k_a: int, k_b: int, near: bool, data: st.DataObject) -> None:
    p = random_distributions(6, seed)
    q = random_distributions(6, seed + 1, near=p if near else None)
    kept_a, kept_b = (data.draw(st.lists(st.integers(1, k), min_size=6, max_size=6)) for k in (k_a, k_b))
    check(p, q, truncated(p, k_a, kept_a), truncated(q, k_b, kept_b))


def test_with_the_whole_vocabulary_it_is_exact() -> None:
    p, q = random_distributions(50, 0), random_distributions(50, 1)
    found = compare_rows(truncated(p, V), truncated(q, V))
    assert found.kl_ab == pytest.approx([kl(list(a), list(b)) for a, b in zip(p, q, strict=True)], abs=FLOAT32)
    assert found.js == pytest.approx([js(list(a), list(b)) for a, b in zip(p, q, strict=True)], abs=FLOAT32)
    assert found.rest_mass_a.max() < 1e-6


def test_a_row_and_itself() -> None:
    topk = truncated(random_distributions(20, 2), 5)
    found = compare_rows(topk, topk)
    assert not found.kl_ab.any() and not found.kl_ba.any() and not found.label_difference.any()
    assert found.js.max() < 1e-15
    assert found.top_1_agrees.all() and (found.top_k_overlap == 1).all()


def test_nothing_is_known_of_rows_that_share_no_id() -> None:
    p, q = np.full((1, V), 0.01 / (V - 2)), np.full((1, V), 0.01 / (V - 2))
    p[0, :2], q[0, 2:4] = 0.495, 0.495
    found = compare_rows(truncated(p, 2), truncated(q, 2))
    assert found.kl_ab[0] == pytest.approx(0, abs=FLOAT32) and found.rest_mass_a[0] == pytest.approx(1)
    assert found.top_k_overlap[0] == 0


def test_where_the_second_leaves_no_mass_the_divergence_is_large_and_finite() -> None:
    row = {
        "num_kept": np.ones(1, np.int32),
        "label_log_prob": np.zeros(1, np.float32),
        "ids": np.zeros((1, 1), np.int32),
    }
    half = TopKLogProbs(log_probs=np.log([[0.5]]).astype("f"), log_tail=np.log([0.5]).astype("f"), **row)
    all_of_it = TopKLogProbs(log_probs=np.zeros((1, 1), "f"), log_tail=np.full(1, -np.inf, "f"), **row)
    found = compare_rows(half, all_of_it)
    assert 300 < found.kl_ab[0] < 400
    assert found.kl_ba[0] == pytest.approx(math.log(2), abs=FLOAT32)


def test_no_rows_and_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = random_distributions(31, 4), random_distributions(31, 5)
    a, b = truncated(p, 4), truncated(q, 7)
    assert len(compare_rows(a[:0], b[:0]).kl_ab) == 0
    whole = compare_rows(a, b)
    monkeypatch.setattr(divergence, "ENTRIES_AT_ONCE", 40)
    assert np.array_equal(compare_rows(a, b).js, whole.js)
    with pytest.raises(InputError, match="31 rows cannot be compared with 30"):
        compare_rows(a, b[:30])


def test_one_sample() -> None:
    from logitcache_storage.cache import Sample

    topk = truncated(random_distributions(3, 6), 4)
    ids, positions = np.arange(5, dtype=np.int32), np.arange(1, 4, dtype=np.int32)
    one, same, other = (Sample(key, "s", ids, positions, topk) for key in ("a" * 32, "a" * 32, "b" * 32))
    assert len(compare_sample(one, same).kl_ab) == 3
    with pytest.raises(MismatchError, match="other tokens or other targets"):
        compare_sample(one, other)
