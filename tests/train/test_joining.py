"""Caches of one corpus in another order, with samples missing, of other corpora and of other tokenizers."""

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.data import CachedSamples
from logitcache_train.joining import check_same_tokenizers, join_by_key
from logitcache_train.objectives import objective

V, K, NUM_SAMPLES = 50, 4, 30


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory):
    made, topks = make_samples(NUM_SAMPLES, K, V, seed=0)

    def make(order, *, shard_rows=30, **identity):
        url = str(tmp_path_factory.mktemp("joining") / "cache")
        identity = make_identity(vocab_size=V, k=K, shard_rows=shard_rows, container="arrow", **identity)
        write_cache(url, [made[i] for i in order], [topks[i] for i in order], identity=identity)
        return Cache.open(url)

    return make


@pytest.fixture(scope="module")
def primary(make_cache):
    return make_cache(range(NUM_SAMPLES))


def keys(cache):
    return [key.hex() for key in cache.samples.column("key").to_pylist()]


def test_samples_are_found_whatever_the_order_and_the_shards(make_cache, primary):
    order = np.random.default_rng(0).permutation(NUM_SAMPLES)
    other = make_cache(order, shard_rows=13)
    found = join_by_key(primary, {"teacher": [primary, other]}, missing="error")
    assert found.lacking == {} and found.kept.tolist() == list(range(NUM_SAMPLES))
    assert found.places["teacher"][0].tolist() == list(range(NUM_SAMPLES))
    assert [keys(other)[i] for i in found.places["teacher"][1]] == keys(primary)


def test_missing_samples_are_refused_with_their_number_a_key_and_the_remedy(make_cache, primary):
    other = make_cache([i for i in range(NUM_SAMPLES) if i not in (7, 4, 20)])
    with pytest.raises(
        MismatchError, match=r"the reference cache .* lacks 3 of the 30 samples of .* --missing drop"
    ) as e:
        join_by_key(primary, {"reference": [other]}, missing="error")
    assert keys(primary)[4] in str(e.value)


def test_dropping_leaves_the_samples_that_every_cache_has(make_cache, primary):
    first = make_cache([i for i in reversed(range(NUM_SAMPLES)) if i != 3])
    second = make_cache([i for i in range(NUM_SAMPLES) if i not in (3, 8, 9)])
    caches = {"teacher": [primary, first], "reference": [second]}
    found = join_by_key(primary, caches, missing="drop")
    assert found.kept.tolist() == [i for i in range(NUM_SAMPLES) if i not in (3, 8, 9)]
    assert found.lacking == {first.store.url: 1, second.store.url: 3}
    for cache, places in ((first, found.places["teacher"][1]), (second, found.places["reference"][0])):
        assert [keys(cache)[i] for i in places] == [keys(primary)[i] for i in found.kept]

    samples = CachedSamples(caches, objective("asft"), window_shards=2, missing="drop", also=("teacher",))
    assert len(samples) == NUM_SAMPLES - 3 == len(samples.num_tokens)
    for index, place in enumerate(found.kept):
        sample, expected = samples[index], primary[place]
        assert sample.key == expected.key and np.array_equal(sample.input_ids, expected.input_ids)
        assert samples.num_tokens[index] == len(expected.input_ids)
        assert samples.num_targets[index] == len(expected.target_positions)
        # All caches hold the same rows here.
        assert all(topk.equals(expected.topk) for topk in (*sample.topks["teacher"], *sample.topks["reference"]))


def test_the_order_fingerprint_tells_what_was_left_out(make_cache, primary):
    def fingerprint(order):
        caches = {"teacher": [primary], "reference": [make_cache(order)]}
        return CachedSamples(caches, objective("asft"), window_shards=2, missing="drop").order_fingerprint()

    whole, without, other = (fingerprint([i for i in range(NUM_SAMPLES) if i != left_out]) for left_out in (None, 3, 4))
    assert len({whole, without, other}) == 3
    assert without == fingerprint([i for i in reversed(range(NUM_SAMPLES)) if i != 3])


def test_caches_without_a_common_sample_leave_nothing_to_train_on(make_cache, tmp_path):
    some, others = make_cache(range(10)), make_cache(range(10, 20))
    with pytest.raises(InputError, match=r"none of the 10 samples of .* is in every cache .* nothing is left to train"):
        join_by_key(some, {"teacher": [others]}, missing="drop")


def test_a_cache_that_no_role_reads_is_not_joined(make_cache, primary):
    half = make_cache(range(5))
    samples = CachedSamples({"teacher": [primary], "reference": [half]}, objective("kd"), window_shards=2)
    assert samples.roles == ("teacher",) and len(samples) == NUM_SAMPLES


def test_caches_of_different_tokenizers_are_refused(make_cache, primary):
    check_same_tokenizers([primary, make_cache([1, 0])])
    other = make_cache(range(5), tokenizer=tokenizer_identity({"a": 0}, {}, None))
    with pytest.raises(MismatchError, match=r"caches of tokenizers with different vocabulary: \w{12} and \w{12};"):
        check_same_tokenizers([primary, other])
    template = make_cache(range(5), tokenizer=tokenizer_identity({}, {}, "{{ messages }}"))
    check_same_tokenizers([primary, template])
