"""Rows, labels and padding of a micro-batch, position by position."""

import numpy as np
import pytest
import torch

from logitcache_storage.testing import make_topk
from logitcache_train.collate import TrainingSample, collate


def sample(ids, positions, *, key="k", k=3, seed=0, column=None):
    positions = np.array(positions, dtype=np.int32)
    topk = make_topk(len(positions), k, 50, seed=seed)
    columns = {} if column is None else {"critical": np.array(column, dtype=np.float32)}
    return TrainingSample(key, np.array(ids, dtype=np.int32), positions, {"teacher": (topk,)}, columns)


SAMPLES = [
    sample([10, 11, 12, 13, 14], [1, 2, 4], key="a", seed=1, column=[1, 0, 1]),
    sample([20, 21], [1], key="b", seed=2, column=[0]),
    sample([30, 31, 32], [2], key="c", seed=3, column=[1]),
]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_each_row_is_the_token_before_its_label(layout):
    found = collate(SAMPLES, num_items=9, layout=layout)
    targets = found["targets"]
    tokens_before = found["input_ids"].flatten()[targets.rows_N]
    assert tokens_before.tolist() == [10, 11, 13, 20, 31]
    assert targets.labels_N.tolist() == [11, 12, 14, 21, 32]
    assert targets.num_items == 9
    assert targets.columns["critical"].tolist() == [1, 0, 1, 0, 1]


def test_padding_is_on_the_right_and_has_no_mask():
    found = collate(SAMPLES, num_items=5, layout="padded")
    assert set(found) == {"input_ids", "targets"}
    assert found["input_ids"].tolist() == [[10, 11, 12, 13, 14], [20, 21, 0, 0, 0], [30, 31, 32, 0, 0]]


def test_packed_positions_start_again():
    found = collate(SAMPLES, num_items=5, layout="packed")
    assert found["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 30, 31, 32]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]


def test_cached_rows_stand_in_the_order_of_the_samples():
    targets = collate(SAMPLES, num_items=5, layout="padded")["targets"]
    start = 0
    for s in SAMPLES:
        rows = slice(start, start + len(s.target_positions))
        for name in ("ids", "log_probs", "num_kept", "log_tail", "label_log_prob"):
            assert np.array_equal(getattr(targets.cached["teacher"], name)[rows], getattr(s.topks["teacher"][0], name))
        start = rows.stop
    assert start == len(targets.labels_N)


def test_a_sample_without_targets_has_no_rows():
    found = collate([SAMPLES[0].without_targets()], num_items=5, layout="padded")
    targets = found["targets"]
    assert found["input_ids"].shape == (1, 5)
    assert len(targets.rows_N) == len(targets.labels_N) == len(targets.columns["critical"]) == 0
    assert targets.cached["teacher"].ids.shape == (0, 3)


def test_bad_rows_are_named_by_their_samples():
    targets = collate(SAMPLES, num_items=5, layout="padded")["targets"]
    assert targets.keys_of([0, 2]) == ["a"]
    assert targets.keys_of([2, 3, 4]) == ["a", "b", "c"]
    empty_first = collate([SAMPLES[0].without_targets(), SAMPLES[1]], num_items=5, layout="padded")["targets"]
    assert empty_first.keys_of([0]) == ["b"]


def test_targets_move_as_a_whole():
    targets = collate(SAMPLES, num_items=5, layout="padded")["targets"].to("meta")
    tensors = [targets.rows_N, targets.labels_N, targets.columns["critical"], *vars(targets.cached["teacher"]).values()]
    assert all(tensor.device == torch.device("meta") for tensor in tensors)
    assert targets.keys == ("a", "b", "c")
