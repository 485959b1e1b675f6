"""The head against a float64 softmax over the full vocabulary; logits set exactly through an identity of hidden states.

Bounds: 2e-5 is the measure the cache promises in float32. Values made by `exact_head` carry only the rounding of the
reduction: a sum of V float32 terms, below V * 2^-24, and the roundings of at most four numbers of the result's size,
each 2^-24 of it (which matters from about 100 nats on).
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from logitcache_pipeline.head import (
    Head,
    largest_entries,
    merge_parts,
    normalise,
    reduce_logits,
    reduce_part,
    top_k_log_probs,
)
from logitcache_storage.errors import LogitCacheError

NATS = 2e-5


def oracle(logits_NV, labels_N, k, kept_ids):
    """Sorted log-probs, tail over everything but `kept_ids` and label log-prob, in float64 numpy."""
    z = np.asarray(logits_NV, dtype=np.float64)
    log_probs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    outside = log_probs.copy()
    np.put_along_axis(outside, kept_ids.astype(np.int64), -np.inf, axis=1)
    with np.errstate(invalid="ignore"):
        tail = np.logaddexp.reduce(outside, axis=1)
    return -np.sort(-log_probs, axis=1)[:, :k], tail, log_probs[np.arange(len(z)), labels_N]


def check(scored, logits_NV, labels_N, k, atol=NATS, rtol=0.0):
    top, tail, label = oracle(logits_NV, labels_N, k, scored.ids)
    assert_allclose(scored.log_probs, top, rtol=rtol, atol=atol)
    assert_allclose(scored.log_tail, tail, rtol=rtol, atol=atol)
    assert_allclose(scored.label_log_prob, label, rtol=rtol, atol=atol)
    assert_array_equal(scored.num_kept, k)
    assert (np.diff(scored.log_probs, axis=1) <= 0).all()
    assert all(len(set(row)) == k for row in scored.ids.tolist())
    assert {a.dtype for a in (scored.ids, scored.num_kept)} == {np.dtype(np.int32)}


def exact_head(logits_NV, **options):
    """A head and hidden states whose logits are these, to the bit: h = identity, W = logits transposed."""
    logits_NV = torch.as_tensor(logits_NV, dtype=torch.float32)
    return Head(logits_NV.t().contiguous(), **options), torch.eye(len(logits_NV))


@pytest.mark.parametrize(
    ("N", "D", "V", "k"),
    [(1, 1, 2, 1), (7, 13, 252, 1), (5, 8, 507, 64), (33, 16, 123, 123), (11, 24, 3001, 17), (3, 5, 41, 40)],
)
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
def test_matches_the_full_vocabulary_in_chunks(N, D, V, k, rows_per_chunk):
    generator = torch.Generator().manual_seed(N * V + k)
    hidden_ND = torch.randn(N, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    bias_V = torch.randn(V, generator=generator)
    labels_N = torch.randint(V, (N,), generator=generator)
    head = Head(weight_VD, bias_V, chunk_bytes=4 * V * rows_per_chunk)
    assert head.rows_per_chunk == rows_per_chunk
    logits_NV = hidden_ND.double() @ weight_VD.double().t() + bias_V.double()
    check(top_k_log_probs(head, hidden_ND, labels_N, k).wait(), logits_NV, labels_N, k)


def test_scale_and_softcap_follow_the_product():
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(9, 12, generator=generator), torch.randn(77, 12, generator=generator)
    labels_N = torch.randint(77, (9,), generator=generator)
    logits_NV = np.tanh((hidden_ND.double() @ weight_VD.double().t() * 0.7).numpy() / 3.0) * 3.0
    scored = top_k_log_probs(Head(weight_VD, scale=0.7, softcap=3.0), hidden_ND, labels_N, 5).wait()
    check(scored, logits_NV, labels_N, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_rounded_in_the_weights_dtype_and_nothing_after_it(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(9, 12, generator=generator, dtype=torch.float32).to(dtype)
    weight_VD = torch.randn(77, 12, generator=generator, dtype=torch.float32).to(dtype)
    labels_N = torch.randint(77, (9,), generator=generator)
    scored = top_k_log_probs(Head(weight_VD), hidden_ND, labels_N, 5).wait()
    check(scored, (hidden_ND @ weight_VD.t()).double(), labels_N, 5)


def test_the_tail_of_a_confident_row_is_exact():
    # 1 - sum is 0 here, and the tail is 150 nats below float32's smallest number relative to the top logit.
    logits_NV = np.array([[250.0, 0.0, -1.0, 3.0, -2.5, 0.5, 1.0, -4.0, 0.25]], dtype=np.float32)
    head, hidden = exact_head(logits_NV)
    scored = top_k_log_probs(head, hidden, torch.tensor([4]), 1).wait()
    assert scored.log_tail[0] < -240.0
    check(scored, logits_NV, [4], 1)


def test_nothing_is_outside_when_k_is_the_vocabulary():
    logits_NV = np.random.default_rng(0).normal(size=(4, 19)).astype(np.float32)
    head, hidden = exact_head(logits_NV)
    scored = top_k_log_probs(head, hidden, torch.arange(4), 19).wait()
    assert_array_equal(scored.log_tail, -np.inf)
    check(scored, logits_NV, range(4), 19)


def test_impossible_tokens_outside_the_top_k_leave_an_empty_tail():
    logits = np.full((1, 300), -np.inf, dtype=np.float32)
    logits[0, [5, 250, 299]] = [1.0, 3.0, 2.0]
    head = Head(torch.from_numpy(logits.T.copy()))
    scored = top_k_log_probs(head, torch.ones(1, 1), torch.tensor([299]), 3).wait()
    assert_array_equal(scored.ids, [[250, 299, 5]])
    assert_array_equal(scored.log_tail, [-np.inf])


def test_no_rows_give_no_rows():
    head, _ = exact_head(np.zeros((2, 5)))
    scored = top_k_log_probs(head, torch.empty(0, 2), torch.empty(0, dtype=torch.int64), 3).wait()
    assert len(scored) == 0
    assert scored.k == 3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 3000), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 5.0, 60.0]))
def test_any_row_adds_up_to_one(k, V, seed, spread):
    rng = np.random.default_rng(seed)
    k = min(k, V)
    logits_NV = rng.normal(scale=spread, size=(3, V)).astype(np.float32)
    labels_N = rng.integers(V, size=3)
    head, hidden = exact_head(logits_NV)
    scored = top_k_log_probs(head, hidden, torch.from_numpy(labels_N), k).wait()
    check(scored, logits_NV, labels_N, k, atol=max(NATS, V * 2.0**-24), rtol=4 * 2.0**-24)
    assert_allclose(np.exp(scored.log_probs.astype(np.float64)).sum(1) + np.exp(scored.log_tail), 1.0, atol=1e-5)


def test_nothing_is_kept_where_k_is_zero():
    logits_NV = np.random.default_rng(0).normal(scale=4.0, size=(5, 1003)).astype(np.float32)
    head, hidden = exact_head(logits_NV)
    scored = top_k_log_probs(head, hidden, torch.arange(5), 0).wait()
    assert scored.ids.shape == (5, 0)
    assert_allclose(scored.log_tail, 0.0, atol=NATS)
    check(scored, logits_NV, range(5), 0)


@st.composite
def split_rows(draw):
    """Logits, labels and k, and a split of the vocabulary into parts of any size."""
    V = draw(st.integers(1, 900))
    k = draw(st.integers(0, min(V, 70)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits_NV = rng.normal(scale=draw(st.sampled_from([0.1, 5.0, 60.0])), size=(3, V)).astype(np.float32)
    # Tokens that are impossible, but as many as are kept and the label are not.
    possible = np.argsort(rng.random((3, V)), axis=1) < max(k, draw(st.integers(1, V)))
    labels_N = possible.argmax(axis=1)
    logits_NV[~possible] = -np.inf
    borders = sorted(draw(st.sets(st.integers(1, V - 1), max_size=5))) if V > 1 else []
    return logits_NV, labels_N, k, np.array([0, *borders, V])


@settings(max_examples=100, deadline=None)
@given(split_rows())
def test_parts_of_the_vocabulary_merge_to_the_whole(rows):
    logits_NV, labels_N, k, borders = rows
    z, labels = torch.from_numpy(logits_NV), torch.from_numpy(labels_N)
    parts = [reduce_part(z[:, start:stop].clone(), labels, k, first_id=int(start)) for start, stop in pairwise(borders)]
    whole = normalise(reduce_part(z.clone(), labels, k))
    V = logits_NV.shape[1]
    atol, rtol = max(NATS, V * 2.0**-24), 4 * 2.0**-24
    for found in (normalise(merge_parts(parts, k)), normalise(merge_parts(parts[::-1], k)), whole):
        ids, log_probs, log_tail, label = (t.numpy() for t in found)
        expected = oracle(logits_NV, labels_N, k, ids)
        for a, b in zip((log_probs, log_tail, label), expected, strict=True):
            assert_allclose(a, b, rtol=rtol, atol=atol)
        assert_array_equal(np.sort(ids), np.sort(whole[0]))


def test_a_logit_that_is_no_number_survives_the_merge():
    z = torch.zeros(1, 40)
    z[0, 33] = torch.nan
    parts = [
        reduce_part(part.clone(), torch.tensor([2]), 4, first_id=i) for i, part in ((0, z[:, :20]), (20, z[:, 20:]))
    ]
    log_probs, label = normalise(merge_parts(parts, 4))[1::2]
    assert not log_probs.isfinite().any()
    assert not label.isfinite().any()


def test_what_was_selected_may_be_far_above_the_rest():
    # Below 2^-149 of the largest, the terms are zero unless they are taken relative to the largest of the rest.
    z = torch.full((1, 3000), -300.0)
    z[0, 7] = 0.0
    ids, log_probs, log_tail, _ = reduce_logits(z, torch.tensor([7]), 1)
    assert ids.item() == 7
    assert log_probs.item() == 0.0
    assert_allclose(log_tail, np.log(2999.0) - 300.0, rtol=2.0**-22)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 80), st.integers(0, 2**32 - 1), st.booleans())
def test_two_stages_select_what_sorting_selects(V, k, seed, ties):
    rng = np.random.default_rng(seed)
    k = min(k, V)
    values = rng.integers(0, 6, (2, V)) if ties else rng.normal(size=(2, V))
    values = torch.from_numpy(values.astype(np.float32))
    top, columns = largest_entries(values, k)
    assert_array_equal(top, -np.sort(-values.numpy(), axis=1)[:, :k])
    assert_array_equal(values.gather(1, columns), top)
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("column", [0, 1500, 2002])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_named(bad, column):
    weight_VD = torch.ones(2003, 1)
    weight_VD[column] = bad
    with pytest.raises(LogitCacheError, match=r"NaN or infinite in 2 of 2 rows, first in row 0"):
        top_k_log_probs(Head(weight_VD), torch.ones(2, 1), torch.tensor([3, 4]), 8).wait()


@pytest.mark.parametrize(("k", "label"), [(2, 0), (1, 1)])
def test_an_impossible_label_or_kept_token_is_named(k, label):
    head = Head(torch.tensor([[2.0], [-torch.inf], [-torch.inf]]))
    with pytest.raises(LogitCacheError, match="first in sample 7 at 3; score in bfloat16"):
        top_k_log_probs(head, torch.ones(1, 1), torch.tensor([label]), k).wait("sample 7 at 3".format)
