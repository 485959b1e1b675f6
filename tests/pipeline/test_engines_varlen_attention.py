"""Attention over packed rows against a float64 softmax of each sequence by itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from logitcache_pipeline.engines.varlen_attention import varlen_attention

LAYER = SimpleNamespace(is_causal=True)
"""What the function asks of an attention layer."""


def oracle(query_HLd, key_GLd, value_GLd, scaling, window):
    """[L, H, d] float64: token i sees the tokens j with i - window < j <= i."""
    groups = len(query_HLd) // len(key_GLd)
    key_HLd, value_HLd = (np.repeat(a, groups, axis=0) for a in (key_GLd, value_GLd))
    i, j = np.indices((query_HLd.shape[1],) * 2)
    seen = (j <= i) & (i - j < (window or len(i) + 1))
    scores = np.where(seen, scaling * query_HLd @ key_HLd.swapaxes(1, 2), -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (weights / weights.sum(axis=2, keepdims=True) @ value_HLd).swapaxes(0, 1)


def packed_row(lengths, seed, num_heads=4, num_groups=2, size=8):
    rng = np.random.default_rng(seed)
    heads = (num_heads, num_groups, num_groups)
    qkv = [torch.from_numpy(rng.normal(size=(1, h, sum(lengths), size)).astype(np.float32)) for h in heads]
    borders = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return qkv, {"cu_seq_lens_q": borders, "max_length_q": max(lengths)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.none() | st.integers(1, 25),
    st.sampled_from([0.1, 8**-0.5]),
    st.integers(0, 2**32 - 1),
)
def test_every_sequence_attends_to_itself_alone(lengths, window, scaling, seed):
    qkv, borders = packed_row(lengths, seed)
    found, _ = varlen_attention(LAYER, *qkv, None, scaling=scaling, sliding_window=window, **borders)
    start = 0
    for length in lengths:
        own = (t[0, :, start : start + length].double().numpy() for t in qkv)
        assert_allclose(found[0, start : start + length], oracle(*own, scaling, window), atol=1e-5)
        start += length


def test_the_scale_is_that_of_the_size_of_a_head_where_none_is_given():
    qkv, borders = packed_row([3, 5], 0)
    expected, _ = varlen_attention(LAYER, *qkv, None, scaling=8**-0.5, **borders)
    assert torch.equal(varlen_attention(LAYER, *qkv, None, **borders)[0], expected)


@pytest.mark.parametrize(
    ("name", "value"), [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("position_bias", torch.zeros(1))]
)
def test_what_it_does_not_know_is_refused_unless_it_is_switched_off(name, value):
    qkv, borders = packed_row([3, 5], 0)
    with pytest.raises(NotImplementedError, match=f"SimpleNamespace asks its attention for {name}"):
        varlen_attention(LAYER, *qkv, None, **borders, **{name: value})
    varlen_attention(LAYER, *qkv, None, **borders, **{name: None})


def test_masks_layers_that_see_the_future_and_rows_without_borders_are_refused():
    qkv, borders = packed_row([3, 5], 0)
    with pytest.raises(NotImplementedError, match="for attention_mask"):
        varlen_attention(LAYER, *qkv, torch.ones(8, 8), **borders)
    for layer, argument in ((SimpleNamespace(is_causal=False), None), (LAYER, False)):
        with pytest.raises(NotImplementedError, match="is_causal=False"):
            varlen_attention(layer, *qkv, None, is_causal=argument, **borders)
    with pytest.raises(NotImplementedError, match="no borders of sequences"):
        varlen_attention(LAYER, *qkv, None)
