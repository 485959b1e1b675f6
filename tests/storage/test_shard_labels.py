"""Labels of whole shards, with samples out of order and samples that share rows."""

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError
from logitcache_storage.sample_index import SampleIndex
from logitcache_storage.shard_labels import ShardLabels
from logitcache_storage.testing import make_identity, make_samples, write_cache

TOKENS = {b"a" * 16: [7, 1, 2, 3], b"b" * 16: [9, 4, 5]}


def labels_of(rows):
    """`rows`: (key, shard, first_row); every token but the first is a target."""
    keys = [key * 16 for key, _, _ in rows]
    ids = [np.array(TOKENS[key], np.int32) for key in keys]
    shard, first_row = (np.array([row[column] for row in rows], np.uint16) for column in (1, 2))
    lengths = np.array([len(i) for i in ids], np.uint16)
    return ShardLabels(
        SampleIndex(shard, first_row, lengths, lengths - 1),
        lambda: np.frombuffer(b"".join(keys), "V16"),
        lambda samples: [(ids[i], np.arange(1, len(ids[i]), dtype=np.int32)) for i in samples],
    )


def test_agrees_with_reading_sample_by_sample(tmp_path):
    samples, topks = make_samples(23, 5, 40)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=5, vocab_size=40, shard_rows=31))
    cache = Cache.open(str(tmp_path))
    labels = ShardLabels(cache.index, cache.keys, cache.read_tokens)
    shards = cache.index.shard.tolist()
    for shard, record in cache.shards.items():
        expected = np.concatenate([cache[i].labels for i in range(len(cache)) if shards[i] == shard])
        np.testing.assert_array_equal(labels.of(shard, record.num_rows), expected)


def test_samples_of_equal_key_share_rows_and_may_stand_anywhere():
    labels = labels_of([(b"b", 1, 3), (b"a", 0, 0), (b"a", 1, 0), (b"b", 1, 3), (b"a", 1, 0)])
    assert labels.of(1, 5).tolist() == [1, 2, 3, 4, 5]
    assert labels.of(0, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "num_rows", "problem"),
    [
        ([(b"a", 0, 0)], 4, "does not cover its 4 rows"),
        ([(b"a", 0, 1)], 4, "does not cover its 4 rows"),
        ([(b"a", 0, 0), (b"b", 0, 2)], 4, "does not cover its 4 rows"),
        ([(b"a", 0, 0), (b"b", 0, 0)], 3, "different keys stand at the same row"),
        ([(b"a", 1, 0)], 3, "no sample stands in it"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows, num_rows, problem):
    with pytest.raises(CorruptionError, match=problem):
        labels_of(rows).of(0, num_rows)
