"""Batches arrive from loader workers as they were sent, in one piece of memory."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from logitcache_storage.testing import make_topk
from logitcache_train.collate import Mixing, TrainingSample, collate
from logitcache_train.mixture import CachedMixture
from logitcache_train.shipping import ALIGNMENT, ship


def make_batch(num_targets, *, layout="packed", num_caches=1):
    ids = np.arange(num_targets + 1, dtype=np.int32)
    topks = tuple(make_topk(num_targets, 5, 50, seed=i) for i in range(num_caches))
    columns = {"critical": np.linspace(0, 1, num_targets)}
    sample = TrainingSample(f"key {num_targets}", ids, ids[1:], {"teacher": topks}, columns)
    return collate([sample], num_items=7, layout=layout, mixing=Mixing("geometric", (0.25, 0.75)[:num_caches]))


def tensors_of(batch):
    found = {name: value for name, value in batch.items() if name != "targets"}
    batch["targets"]._mapped(lambda tensor: found.setdefault(len(found), tensor))
    return list(found.values())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_arrives_as_it_was_sent(num_workers):
    sent = [make_batch(0), make_batch(1), make_batch(13, num_caches=2), make_batch(200, layout="padded")]
    loader = DataLoader(sent, batch_size=None, collate_fn=ship, num_workers=num_workers)
    for before, after in zip(sent, loader, strict=True):
        assert list(after) == list(before)
        for expected, found in zip(tensors_of(before), tensors_of(after), strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape) and found.equal(expected)
        targets = after["targets"]
        assert (targets.keys, targets.num_items) == (before["targets"].keys, 7)
    mixture = list(loader)[2]["targets"].cached["teacher"]
    assert isinstance(mixture, CachedMixture) and (mixture.mean, mixture.weights) == ("geometric", (0.25, 0.75))


def test_its_tensors_share_one_piece_of_shared_memory_and_can_be_written():
    (batch,) = DataLoader([make_batch(33)], batch_size=None, collate_fn=ship, num_workers=1)
    tensors = tensors_of(batch)
    assert len(tensors) == 10 and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.is_shared() and tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
    tensors[0].zero_()
    assert not tensors[0].any() and tensors[1].any()
