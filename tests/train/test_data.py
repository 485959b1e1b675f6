"""Samples as the caches hold them, and the same global batches for every world size."""

import itertools

import numpy as np
import pytest

from logitcache_storage import patience
from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError, StoreUnavailableError
from logitcache_storage.objects import LocalStore
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.batches import micro_batches
from logitcache_train.data import CachedSamples, GlobalBatchSampler
from logitcache_train.objectives import OBJECTIVES, objective

V, K = 50, 4


def make_cache(folder, *, num_samples=40, seed=0, shard_rows=30, columns=None, samples=None, topk_seed=None, **kwargs):
    made, topks = make_samples(num_samples, K, V, seed=seed)
    samples = made if samples is None else samples
    if topk_seed is not None:
        topks = make_samples(num_samples, K, V, seed=seed)[1][::-1]
    identity = make_identity(vocab_size=V, k=K, shard_rows=shard_rows, precision="fp32")
    write_cache(str(folder), samples, topks, identity=identity, columns=columns, **kwargs)
    return Cache.open(str(folder))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def sampler(samples, *, rank=0, world_size=1, accumulation_steps=1, batch_tokens=60, seed=7):
    return GlobalBatchSampler(
        samples,
        batch_tokens=batch_tokens,
        window_shards=3,
        seed=seed,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
    )


def test_a_sample_is_what_the_cache_says(cache):
    samples = CachedSamples({"teacher": [cache]}, objective("kd"), window_shards=2)
    assert len(samples) == len(cache)
    for i in (0, 17, 39, 3):
        found, expected = samples[i], cache[i]
        assert found.key == expected.key
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.target_positions, expected.target_positions)
        assert found.topks["teacher"][0].equals(expected.topk)


def test_a_store_that_is_away_for_a_while_is_waited_for(cache, monkeypatch, caplog):
    opened, expected = Cache.open(cache.store.url), cache[17].topk
    failures, original = iter([True] * 3), LocalStore._file

    def stumbling(self, path):
        if next(failures, False):
            raise TimeoutError("no answer")
        return original(self, path)

    monkeypatch.setattr(LocalStore, "_file", stumbling)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)
    samples = CachedSamples({"teacher": [opened]}, objective("kd"), window_shards=2)
    assert samples[17].topks["teacher"][0].equals(expected)
    assert caplog.text.count("no answer; check the network") == caplog.text.count("again, for 15 minutes at most") == 3
    failures = itertools.repeat(True)
    monkeypatch.setattr("logitcache_train.data.STORE_PATIENCE_SECONDS", 0.01)
    with pytest.raises(StoreUnavailableError, match="no answer"):
        CachedSamples({"teacher": [opened]}, objective("kd"), window_shards=2)[3]


def test_an_objective_without_a_teacher_reads_no_shard(cache, monkeypatch):
    monkeypatch.setattr(Cache, "read_shard", lambda *_: pytest.fail("read a shard"))
    samples = CachedSamples({"teacher": [cache]}, objective("dft"), window_shards=2)
    assert samples[5].topks == {}


def test_decoded_shards_in_memory_are_bounded_and_each_is_read_once_an_epoch(cache, monkeypatch):
    samples = CachedSamples({"teacher": [cache]}, objective("kd"), window_shards=3)
    read, original = [], Cache.read_shard
    monkeypatch.setattr(Cache, "read_shard", lambda self, shard: read.append(shard) or original(self, shard))
    bound = sum(sorted((r.num_rows for r in cache.shards.values()), reverse=True)[:4])
    for part in sampler(samples):
        samples.__getitems__(part)
        held = samples._rows["teacher"][0]._shards.values()
        assert sum(map(len, held)) <= bound
    assert len(cache.shards) > 2 * 3
    assert sorted(read) == sorted(cache.shards)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_topology_sees_the_same_global_batches_and_each_sample_once(cache, world_size, accumulation_steps):
    samples = CachedSamples({"teacher": [cache]}, objective("sft"), window_shards=3)
    alone = sampler(samples)
    ranks = [
        sampler(samples, rank=r, world_size=world_size, accumulation_steps=accumulation_steps)
        for r in range(world_size)
    ]
    for epoch in (0, 1):
        for s in (alone, *ranks):
            s.set_epoch(epoch)
        batches = [part.batch.tolist() for part in alone]
        assert len(batches) == len(alone) == ranks[0].num_batches
        assert sorted(i for batch in batches for i in batch) == list(range(len(cache)))
        steps = list(zip(*ranks, strict=True))
        assert len(steps) == len(batches) * accumulation_steps == len(ranks[0])
        for j, batch in enumerate(batches):
            parts = [p for step in steps[j * accumulation_steps : (j + 1) * accumulation_steps] for p in step]
            seen = [micro_batches(p.batch, samples.num_tokens[p.batch], p.num_parts)[p.index] for p in parts]
            assert sorted(np.concatenate(seen).tolist()) == sorted(batch)


def test_more_ranks_than_samples_give_samples_without_targets(cache):
    samples = CachedSamples({"teacher": [cache]}, objective("kd"), window_shards=3)
    part = next(iter(sampler(samples, world_size=8, batch_tokens=1)))
    micros = [samples.__getitems__(type(part)(part.batch, i, 8)) for i in range(8)]
    num_items = int(samples.num_targets[part.batch].sum())
    assert all(m.num_items == num_items for m in micros)
    assert sum(len(s.target_positions) for m in micros for s in m.samples) == num_items
    assert len(part.batch) < 8
    for micro in micros[len(part.batch) :]:
        assert [len(s.target_positions) for s in micro.samples] == [0]
        assert len(micro.samples[0].topks["teacher"][0]) == 0


def test_a_second_cache_is_joined_by_key(tmp_path, cache):
    made, topks = make_samples(40, K, V, seed=0)
    shuffle = np.random.default_rng(0).permutation(40)
    identity = make_identity(vocab_size=V, k=K, shard_rows=17, precision="fp32")
    url = str(tmp_path / "reference")
    write_cache(url, [made[i] for i in shuffle], [topks[i] for i in shuffle], identity=identity)
    reference = Cache.open(url)
    samples = CachedSamples({"teacher": [cache], "reference": [reference]}, objective("asft"), window_shards=2)
    for i in (0, 11, 39):
        assert samples[i].topks["reference"][0].equals(cache[i].topk)


def test_a_second_cache_that_lacks_samples_is_refused(tmp_path, cache):
    reference = make_cache(tmp_path / "reference", commit_shards=2)
    with pytest.raises(MismatchError, match=r"the reference cache .* lacks \d+ of the 40 samples .* first with key"):
        CachedSamples({"teacher": [cache], "reference": [reference]}, objective("asft"), window_shards=2)


def test_a_missing_role_is_refused(cache):
    with pytest.raises(InputError, match="'asft' needs a reference cache, given: teacher; add --cache reference=URL"):
        CachedSamples({"teacher": [cache]}, objective("asft"), window_shards=2)


def test_a_cache_without_samples_is_refused(tmp_path):
    empty = make_cache(tmp_path / "empty", commit_shards=0)
    with pytest.raises(InputError, match="has no sample yet; 'logitcache status'"):
        CachedSamples({"teacher": [empty]}, objective("sft"), window_shards=2)


def columns_cache(folder, make_value):
    made, _ = make_samples(6, K, V, seed=0)
    values = [make_value(ids, ranges) for ids, ranges in made]
    return make_cache(folder, num_samples=6, columns={"critical": values})


@pytest.mark.parametrize(
    "make_value",
    [
        lambda ids, ranges: [float(i) for i in range(len(ids))],
        lambda ids, ranges: [float(i) for a, b in ranges for i in range(a, b)],
    ],
    ids=["one for each token", "one for each target"],
)
def test_a_column_of_lists_belongs_to_target_positions(tmp_path, make_value):
    cache = columns_cache(tmp_path / "c", make_value)
    samples = CachedSamples({"teacher": [cache]}, objective("critical_tokens"), window_shards=2)
    for i in range(6):
        assert samples[i].columns["critical"].tolist() == samples[i].target_positions.tolist()


def test_a_column_of_numbers_holds_for_every_target(tmp_path):
    cache = columns_cache(tmp_path / "c", lambda ids, ranges: len(ids))
    sample = CachedSamples({"teacher": [cache]}, objective("critical_tokens"), window_shards=2)[2]
    assert sample.columns["critical"].tolist() == [len(sample.input_ids)] * len(sample.target_positions)


@pytest.mark.parametrize("value", [None, [1.0] * 99, [[1.0]]], ids=["null", "wrong length", "nested"])
def test_a_column_that_fits_nothing_is_refused_with_its_sample(tmp_path, value):
    usual = [[2.0]] if value == [[1.0]] else [2.0]
    made, _ = make_samples(6, K, V, seed=0)
    values = [value if i == 1 else usual for i in range(len(made))]
    cache = make_cache(tmp_path / "c", num_samples=6, columns={"critical": values})
    samples = CachedSamples({"teacher": [cache]}, objective("critical_tokens"), window_shards=2)
    with pytest.raises(InputError, match=rf"column 'critical' of sample {cache[1].key}: expected a number"):
        samples[1]


def test_a_missing_column_is_refused(cache):
    with pytest.raises(InputError, match=r"'critical_tokens' needs the column 'critical', which .* does not have"):
        CachedSamples({"teacher": [cache]}, objective("critical_tokens"), window_shards=2)


def test_the_sequence_column_tells_samples_of_a_micro_batch_apart(cache):
    samples = CachedSamples({"reference": [cache]}, OBJECTIVES["iw_sft"], window_shards=3)
    micro = samples.__getitems__(next(iter(sampler(samples))))
    assert len(micro.samples) > 1
    assert [set(s.columns["sequence"].tolist()) for s in micro.samples] == [{i} for i in range(len(micro.samples))]


def test_token_ids_beyond_the_student_are_refused(tmp_path, cache):
    samples = CachedSamples({"teacher": [cache]}, objective("sft"), window_shards=3)
    samples.check_token_ids(V, student="s")
    with pytest.raises(MismatchError, match=r"sample [0-9a-f]{32} has the token id \d+, and s has 20 tokens"):
        samples.check_token_ids(20, student="s")

    highest = [int(cache[i].input_ids.max()) for i in range(len(cache))]
    owners = {cache[i].key for i in range(len(cache)) if highest[i] == V - 1}
    with pytest.raises(MismatchError, match=rf"sample ({'|'.join(owners)}) has the token id {V - 1}, and s has"):
        samples.check_token_ids(V - 1, student="s")
    # Samples that are left out are no reason to refuse a student.
    made = make_samples(len(cache), K, V)
    fitting = [i for i in range(len(cache)) if highest[i] < V - 1]
    write_cache(
        str(tmp_path), *([part[i] for i in fitting] for part in made), identity=make_identity(vocab_size=V, k=K)
    )
    caches = {"reference": [cache], "teacher": [Cache.open(str(tmp_path))]}
    left = CachedSamples(caches, objective("kd"), window_shards=3, missing="drop")
    left.check_token_ids(V - 1, student="s")
    with pytest.raises(MismatchError, match=f"{max(highest[i] for i in fitting)}, and s has 20 tokens") as refused:
        left.check_token_ids(20, student="s")
    assert any(cache[i].key in str(refused.value) for i in fitting)


def test_the_order_fingerprint_follows_the_committed_shards(tmp_path, cache):
    def found(c):
        return CachedSamples({"teacher": [c]}, objective("sft"), window_shards=1).order_fingerprint()

    again, partial = make_cache(tmp_path / "again"), make_cache(tmp_path / "partial", commit_shards=2)
    assert found(again) == found(cache)
    assert found(partial) != found(cache)
