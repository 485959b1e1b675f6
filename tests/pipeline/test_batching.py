from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from logitcache_pipeline.batching import collate, num_input_tokens, token_budget_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 200), st.sampled_from(["padded", "packed"]), st.none() | st.integers(1, 60))
def test_batches_keep_to_the_budget_and_hold_every_sequence_once(lengths, budget, layout, never_across):
    batches = token_budget_batches(lengths, budget, layout=layout, never_across=never_across)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        mine = [lengths[i] for i in batch]
        inputs, _ = collate([np.zeros(length, dtype=np.int32) for length in mine], layout)
        assert num_input_tokens(mine, layout) == inputs["input_ids"].size
        assert inputs["input_ids"].size <= budget or len(mine) == 1
        assert never_across is None or len({length > never_across for length in mine}) == 1


@given(LENGTHS, st.integers(1, 200))
def test_no_sequence_would_have_fitted_into_the_batch_before(lengths, budget):
    batches = token_budget_batches(lengths, budget, layout="padded")
    for batch, after in pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > budget
        assert min(lengths[i] for i in batch) >= max(lengths[i] for i in after)


SEQUENCES = [np.array(s, dtype=np.int32) for s in ([5, 6, 7], [8], [9, 10])]


def test_padded_sequences_start_at_their_row():
    inputs, starts = collate(SEQUENCES, "padded")
    assert inputs.keys() == {"input_ids"}
    assert_array_equal(inputs["input_ids"], [[5, 6, 7], [8, 0, 0], [9, 10, 0]])
    assert_array_equal(starts, [0, 3, 6])


def test_packed_sequences_are_told_apart_by_positions_and_borders():
    inputs, starts = collate(SEQUENCES, "packed")
    assert_array_equal(inputs["input_ids"], [[5, 6, 7, 8, 9, 10]])
    assert_array_equal(inputs["position_ids"], [[0, 1, 2, 0, 0, 1]])
    assert_array_equal(starts, [0, 3, 4])
    for side in "qk":
        assert_array_equal(inputs[f"cu_seq_lens_{side}"], [0, 3, 4, 6])
        assert inputs[f"cu_seq_lens_{side}"].dtype == np.int32
        assert inputs[f"max_length_{side}"] == 3


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_token_is_found_where_collate_says(layout):
    inputs, starts = collate(SEQUENCES, layout)
    flat = inputs["input_ids"].reshape(-1)
    for sequence, start in zip(SEQUENCES, starts, strict=True):
        assert_array_equal(flat[start : start + len(sequence)], sequence)
    assert flat.dtype == np.int64
