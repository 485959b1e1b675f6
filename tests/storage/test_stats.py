"""Statistics against float64 recomputation from decoded samples."""

import dataclasses

import numpy as np
import pytest

from logitcache_storage import stats
from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError
from logitcache_storage.manifest import Manifest, manifest_bytes, parse_manifest
from logitcache_storage.stats import choose_shards, distributions, total
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache

K, VOCAB = 7, 31


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("stats"))
    samples, topks = make_samples(41, K, VOCAB, seed=5)
    write_cache(
        url,
        samples,
        topks,
        identity=make_identity(k=K, vocab_size=VOCAB, shard_rows=40, precision="fp32"),
    )
    return Cache.open(url)


@pytest.fixture(scope="module")
def rows(cache):
    """Every row written out: entropy, kept mass, label log-prob, rank (0 outside)."""
    found = []
    for sample in cache:
        for ids, log_probs, log_tail, label_log_prob, label in zip(
            sample.topk.ids,
            sample.topk.log_probs.astype(np.float64),
            sample.topk.log_tail.astype(np.float64),
            sample.topk.label_log_prob,
            sample.labels,
            strict=True,
        ):
            outcomes = np.exp([*log_probs, log_tail])
            rank = ids.tolist().index(label) + 1 if label in ids else 0
            found.append((-(outcomes * np.log(outcomes)).sum(), outcomes[:-1].sum(), float(label_log_prob), rank))
    return np.array(found)


def test_a_manifest_says_the_same_at_once(cache):
    manifest, records = cache.shards, dict(cache.shards)
    assert isinstance(manifest, Manifest)
    found, expected = total(manifest), total(records)
    for field in dataclasses.fields(found):
        assert getattr(found, field.name) == pytest.approx(getattr(expected, field.name), rel=1e-12), field.name
    assert expected == total(records.values())
    lacking = dataclasses.replace(records[1], statistics={"num_kept_sum": 1.0})
    data = manifest_bytes({**records, 1: lacking})
    with pytest.raises(CorruptionError, match="the manifest lacks the statistic 'entropy_sum' of some shard"):
        total(parse_manifest(data, len(records), where="here"))
    empty = total(parse_manifest(manifest_bytes({}), 0, where="here"))
    assert empty == total({}) and empty.entropy is None and empty.num_rows == 0


def test_totals_are_the_means_over_all_rows(cache, rows):
    found = total(cache.shards.values())
    assert (found.num_rows, found.num_shards) == (len(rows), len(cache.shards))
    assert found.num_bytes == sum(record.num_bytes for record in cache.shards.values())
    # float32 columns summed in float64: 1e-6 relative is an ulp of float32 with room for the sum.
    assert found.entropy == pytest.approx(rows[:, 0].mean(), rel=1e-6)
    assert found.kept_mass == pytest.approx(rows[:, 1].mean(), rel=1e-6)
    assert found.label_log_prob == pytest.approx(rows[:, 2].mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(-rows[:, 2].mean()), rel=1e-5)
    assert found.top_1_rate == pytest.approx((rows[:, 3] == 1).mean())
    assert found.top_k_rate == pytest.approx((rows[:, 3] > 0).mean())
    assert found.num_kept == K


def test_of_no_shard_there_is_nothing_to_say():
    found = total([])
    assert (found.num_rows, found.num_bytes) == (0, 0)
    assert found.entropy is None and found.perplexity is None and found.bytes_per_row is None


def test_a_record_without_a_statistic_is_named(cache):
    record = cache.shards[1]
    poor = dataclasses.replace(record, statistics={**record.statistics, "entropy_sum": None})
    with pytest.raises(CorruptionError, match="shard 1: no statistic 'entropy_sum'"):
        total([poor])


def test_quantiles_and_ranks_over_all_rows(cache, rows):
    found = distributions(cache, sorted(cache.shards))
    assert found.num_rows == len(rows)
    for column, name in enumerate(("entropy", "kept_mass", "label_log_prob")):
        expected = np.quantile(rows[:, column], [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
        np.testing.assert_allclose(list(found.quantiles[name].values()), expected, rtol=1e-5, atol=1e-6)
    ranks = rows[:, 3]
    assert found.label_rank == {
        "1": (ranks == 1).sum(),
        "2": (ranks == 2).sum(),
        "3-4": ((ranks >= 3) & (ranks <= 4)).sum(),
        "5-7": (ranks >= 5).sum(),
        ">7": (ranks == 0).sum(),
    }


def test_only_the_chosen_shards_are_read(cache):
    found = distributions(cache, [1])
    assert found.shards == (1,) and found.num_rows == cache.shards[1].num_rows == sum(found.label_rank.values())
    nothing = distributions(cache, [])
    assert nothing.num_rows == 0 and nothing.quantiles == {}


def test_the_samples_table_is_not_read_as_a_whole(cache):
    """Of a hundred million samples it would not fit."""
    other = Cache.open(cache.store.url)
    assert distributions(other, sorted(other.shards)) == distributions(cache, sorted(cache.shards))
    assert "samples" not in vars(other)


def test_more_rows_than_fit_are_thinned_for_quantiles_and_counted_for_ranks(cache, rows, monkeypatch):
    monkeypatch.setattr(stats, "MAX_ROWS_IN_MEMORY", len(rows) // 3)
    found = distributions(cache, sorted(cache.shards))
    assert sum(found.label_rank.values()) == found.num_rows == len(rows)
    assert rows[:, 0].min() <= found.quantiles["entropy"]["p50"] <= rows[:, 0].max()


def test_shards_are_chosen_evenly_and_within_bounds(cache):
    records = {n: dataclasses.replace(cache.shards[0], shard=n, num_rows=100_000) for n in range(100)}
    assert choose_shards(records) == list(range(0, 100, 10))  # ten hold a million rows
    assert choose_shards(records, 4) == [0, 25, 50, 75]
    assert choose_shards(records, 0) == []
    assert choose_shards(cache.shards) == choose_shards(cache.shards, 10**9) == sorted(cache.shards)
    assert choose_shards({}) == []


@pytest.mark.parametrize("k", [1, 2, 3, 64])
def test_rank_bins_cover_every_rank_once(tmp_path, k):
    labels = np.arange(70, dtype=np.int32)
    topk = make_topk(70, k, 70, labels=labels)
    tokens = np.concatenate([[0], labels]).astype(np.int32)
    write_cache(
        str(tmp_path),
        [(tokens, np.array([[1, 71]], np.int32))],
        [topk],
        identity=make_identity(k=k, vocab_size=70, shard_rows=100),
    )
    histogram = distributions(Cache.open(str(tmp_path)), [0]).label_rank
    edges = [tuple(map(int, name.split("-"))) for name in histogram if not name.startswith(">")]
    covered = [rank for edge in edges for rank in range(edge[0], edge[-1] + 1)]
    assert covered == list(range(1, k + 1)) and sum(histogram.values()) == 70
