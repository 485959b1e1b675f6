"""The coarse vocabulary: support, cached tail, student tail, guided residual.

Shapes: N positions, k cached ids, S = k + 1 slots, V vocabulary.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_storage.topk import TopKLogProbs
from logitcache_train.atoms import CachedTopK, build_support, coarse_student, coarse_target, cross_entropy

INF = torch.inf


def topk(ids, probs, tail, label, num_kept=None):
    """One row from probabilities."""
    return CachedTopK(
        ids=torch.tensor([ids]),
        log_probs=torch.tensor([probs]).log(),
        num_kept=torch.tensor([len(ids) if num_kept is None else num_kept]),
        log_tail=torch.tensor([tail]).log(),
        label_log_prob=torch.tensor([label]).log(),
    )


def cached_distribution(support):
    """{token: probability} of the first row, and the tail."""
    slots = zip(support.ids_NS[0], support.is_outcome_NS[0], support.log_q_NS[0].exp(), strict=True)
    return {int(token): float(q) for token, outcome, q in slots if outcome}, float(support.log_tau_N[0].exp())


def support_of(cache, label, vocab_size=10, dtype=torch.float64):
    return build_support(torch.tensor([label]), cache, vocab_size, dtype)


def test_label_inside_the_top_k():
    support = support_of(topk([4, 2], [0.5, 0.3], 0.2, 0.3), label=2)
    q, tau = cached_distribution(support)
    assert q == pytest.approx({4: 0.5, 2: 0.3}) and tau == pytest.approx(0.2)
    assert support.is_label_NS.tolist() == [[False, True, False]]


def test_label_outside_the_top_k_comes_out_of_the_tail():
    q, tau = cached_distribution(support_of(topk([4, 2], [0.5, 0.3], 0.2, 0.15), label=7))
    assert q == pytest.approx({4: 0.5, 2: 0.3, 7: 0.15}) and tau == pytest.approx(0.05)


def test_entries_beyond_num_kept_are_no_outcomes():
    cache = topk([4, 0, 0], [0.5, 0.3, 0.1], 0.5, 0.1, num_kept=1)
    q, tau = cached_distribution(support_of(cache, label=0))
    assert q == pytest.approx({4: 0.5, 0: 0.1}) and tau == pytest.approx(0.4)


def test_ids_beyond_the_vocabulary_carry_no_mass():
    q, tau = cached_distribution(support_of(topk([12, 2], [0.5, 0.3], 0.2, 0.3), label=2, vocab_size=10))
    assert q == pytest.approx({2: 0.6}) and tau == pytest.approx(0.4)


def test_support_that_is_the_vocabulary_has_no_tail():
    support = support_of(topk([0, 1], [0.5, 0.3], 0.2, 0.2), label=2, vocab_size=3)
    q, tau = cached_distribution(support)
    assert not support.has_tail_N.item() and tau == 0 and q == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2})


def test_label_mass_above_the_tail_leaves_an_empty_tail():
    q, tau = cached_distribution(support_of(topk([4], [0.8], 0.2, 0.21), label=7))
    assert tau == 0 and q == pytest.approx({4: 0.8 / 1.01, 7: 0.21 / 1.01})


def test_quantised_rows_are_renormalised():
    q, tau = cached_distribution(support_of(topk([4, 2], [0.52, 0.31], 0.2, 0.31), label=2))
    assert sum(q.values()) + tau == pytest.approx(1, abs=1e-12) and q[4] / q[2] == pytest.approx(0.52 / 0.31)


def test_slots_without_outcome_repeat_the_label():
    support = support_of(topk([4, 9, 2], [0.5, 0.2, 0.1], 0.2, 0.5, num_kept=2), label=4, vocab_size=6)
    assert support.ids_NS.tolist() == [[4, 4, 4, 4]]
    assert support.is_outcome_NS.tolist() == [[True, False, False, False]]


def student_of(z_V, ids, label):
    """The coarse student of one row of float32 logits, the support without a cache distribution."""
    cache = topk(ids, [1 / len(ids)] * len(ids), 0.0, 1 / len(ids))
    support = build_support(torch.tensor([label]), cache, len(z_V), torch.float32)
    z_NV = torch.tensor([z_V], dtype=torch.float32)
    outside_NV = z_NV.scatter(1, support.ids_NS, -INF)
    max_N = outside_NV.amax(-1)
    sum_N = (outside_NV - max_N.masked_fill(max_N == -INF, 0)[:, None]).exp().sum(-1)
    return coarse_student(z_NV.gather(1, support.ids_NS), max_N, sum_N.log(), support), support


def test_a_confident_student_keeps_its_rest():
    # 1 - p_y = 1e-12, far below float32's spacing at 1; shifted to logits of 1e4, where that spacing is 1e-3
    for shift in (0.0, 1e4):
        z_V = [shift, shift - 30.0, shift - 30.0, shift - 31.0]
        student, _ = student_of(z_V, [1], label=0)
        rest = 2 * np.exp(-30.0) + np.exp(-31.0)
        assert student.log_p_label_N.item() == pytest.approx(-rest, rel=1e-5)
        assert student.log_p_rest_N.exp().item() == pytest.approx(rest, rel=1e-5)
        tail = np.exp(-30.0) + np.exp(-31.0)
        assert student.log_rho_N.exp().item() == pytest.approx(tail, rel=1e-5)


def test_a_tail_that_underflows_keeps_its_log():
    student, _ = student_of([1e4, 0.0, 0.0, -5.0], [1], label=0)
    assert student.log_rho_N.item() == pytest.approx(-1e4 + np.log1p(np.exp(-5.0)))
    assert student.log_p_rest_N.item() == pytest.approx(-1e4 + np.log(2 + np.exp(-5.0)))


def test_no_tail_and_a_vocabulary_of_one():
    student, _ = student_of([0.0, 0.0], [1], label=0)
    assert student.log_rho_N.item() == -INF and student.log_p_label_N.exp().item() == pytest.approx(0.5)
    student, _ = student_of([3.0], [0], label=0)
    assert student.log_p_label_N.item() == 0 and student.log_p_rest_N.item() == -INF


probabilities = st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(lambda w: sum(w) > 0)


@settings(max_examples=60, deadline=None)
@given(weights=probabilities, k=st.integers(1, 5), label=st.integers(0, 5), eta=st.sampled_from([0, 0.3, 0.7, 1]))
def test_guided_is_the_normalised_product_also_at_zeros(weights, k, label, eta):
    q_V = np.array(weights) / sum(weights)
    ids = np.argsort(-q_V, kind="stable")[:k].tolist()
    cache = topk(ids, q_V[ids].tolist(), max(1 - q_V[ids].sum(), 0.0), float(q_V[label]))
    z_V = [0.3, -1.0, 2.0, 0.0, 1.0, -0.5]
    p_V = np.exp(z_V) / np.exp(z_V).sum()
    student, _ = student_of(z_V, ids, label)
    support = build_support(torch.tensor([label]), cache, 6, torch.float32)
    on_support_NS, tail_N = coarse_target({"guided": torch.ones(1)}, student, support, float(eta))

    inside = sorted({*ids, label})
    p = np.append(p_V[inside], 1 - p_V[inside].sum())
    q = np.append(q_V[inside], max(1 - q_V[inside].sum(), 0))
    q[q < 1e-9] = 0
    product = p ** (1 - eta) * q**eta
    expected = dict(zip([*inside, "tail"], product / product.sum(), strict=True))
    for token, outcome, value in zip(support.ids_NS[0], support.is_outcome_NS[0], on_support_NS[0], strict=True):
        assert float(value) == pytest.approx(expected[int(token)] if outcome else 0, abs=2e-3)
    assert float(on_support_NS.sum() + tail_N) == pytest.approx(1, abs=1e-6)
    if eta == 0:
        torch.testing.assert_close(on_support_NS, student.log_p_NS.exp())


def test_cross_entropy_of_an_absent_target_is_zero_where_the_student_has_no_mass():
    student, _ = student_of([0.0, 0.0], [1], label=0)  # no tail: log rho = -inf
    loss_N = cross_entropy(torch.tensor([[0.0, 1.0]]), torch.zeros(1), student)
    assert torch.isfinite(loss_N).all()


def test_cached_topk_from_numpy_slices_and_refuses_wrong_shapes():
    arrays = {
        "ids": np.zeros((3, 2), np.int32),
        "log_probs": np.zeros((3, 2), np.float32),
        "num_kept": np.ones(3, np.int32),
        "log_tail": np.zeros(3, np.float32),
        "label_log_prob": np.zeros(3, np.float32),
    }
    for array in arrays.values():
        array.flags.writeable = False  # as arrays mapped from a file are
    with warnings.catch_warnings(action="error"):
        cache = CachedTopK.from_numpy(TopKLogProbs(**arrays))
    assert len(cache) == 3 and len(cache[1:]) == 2 and cache.to("cpu").ids.dtype == torch.int32
    with pytest.raises(InputError, match=r"ids and log_probs \[N, k\] and three \[N\] columns"):
        CachedTopK(**{name: torch.tensor(a.copy()) for name, a in arrays.items()} | {"log_tail": torch.zeros(2)})
