"""Two caches of one corpus: joined by key whatever their order and form, in bounded memory, refused by name."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import compare
from logitcache_storage.cache import Cache
from logitcache_storage.commit import load_commit
from logitcache_storage.compare import Comparing, compare_caches
from logitcache_storage.divergence import compare_sample
from logitcache_storage.errors import CorruptionError, InputError, MismatchError
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.samples import target_positions
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache

SAMPLES, TOPKS = make_samples(60, k=6, vocab_size=50, seed=3)
LABELS = [ids[target_positions(ranges.ravel())] for ids, ranges in SAMPLES]
OTHERS = [make_topk(len(labels), 9, 50, seed=1000 + i, labels=labels) for i, labels in enumerate(LABELS)]


def new_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def cache_of(order, topks, url: str | None = None, **settings) -> Cache:
    """A cache of these samples in this order; `commit_shards` and `storage_options` as `write_cache` has them."""
    others = {name: settings.pop(name) for name in ("commit_shards", "storage_options") if name in settings}
    usual = {"k": topks[0].k, "precision": "fp32", "container": "arrow", "shard_rows": 50}
    identity = make_identity(**{**usual, **settings})
    url = url or new_url()
    write_cache(url, [SAMPLES[i] for i in order], [topks[i] for i in order], identity=identity, **others)
    return Cache.open(url, others.get("storage_options"))


def check(a: Cache, b: Cache, top: int = 10) -> None:
    """All means, against one sample after the other."""
    found = compare_caches(a, b, top=top)
    by_key = {sample.key: sample for sample in b}
    pairs = [(i, sample, by_key[sample.key]) for i, sample in enumerate(a) if sample.key in by_key]
    rows = [compare_sample(ours, theirs) for _, ours, theirs in pairs]
    assert found.num_samples == len(pairs) and found.num_rows == sum(len(r.js) for r in rows)
    for mine, theirs in (
        ("kl_ab", "kl_ab"),
        ("kl_ba", "kl_ba"),
        ("js", "js"),
        ("top_1_agreement", "top_1_agrees"),
        ("top_k_overlap", "top_k_overlap"),
        ("label_difference", "label_difference"),
        ("rest_mass_a", "rest_mass_a"),
        ("rest_mass_b", "rest_mass_b"),
    ):
        expected = np.concatenate([getattr(r, theirs) for r in rows])
        assert getattr(found, mine) == pytest.approx(expected.mean(), rel=1e-9, abs=1e-12), mine
    every = np.concatenate([r.label_difference for r in rows])
    assert found.label_distance == pytest.approx(np.abs(every).mean(), rel=1e-9)
    kl = np.concatenate([r.kl_ab for r in rows])
    for b_ in found.histogram:
        assert b_.num_rows == ((kl >= b_.low) & (kl < (np.inf if b_.high is None else b_.high))).sum()
    assert sum(b_.num_rows for b_ in found.histogram) == found.num_rows
    worst = sorted(zip([float(r.kl_ab.mean()) for r in rows], pairs, strict=True), key=lambda w: -w[0])[:top]
    assert [s.key for s in found.most_different] == [ours.key for _, (_, ours, _) in worst]
    for sample, (mean, (i, ours, theirs)) in zip(found.most_different, worst, strict=True):
        assert sample.kl_ab == pytest.approx(mean) and sample.index_a == i and sample.source_id == ours.source_id
        assert b[sample.index_b].key == theirs.key and sample.num_rows == len(ours.topk)


@pytest.mark.parametrize("entries", [1, 700, 1 << 21])
def test_another_order_another_form(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are read at once."""
    monkeypatch.setattr(compare, "ENTRIES_AT_ONCE", entries)
    order = np.random.default_rng(0).permutation(60)
    a = cache_of(range(60), TOPKS)
    b = cache_of(order, OTHERS, shard_rows=31, container="zarr" if entries > 1 else "arrow", precision="u10")
    check(a, b)
    check(b, a, top=0)


def test_at_most_so_many_rows_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ENTRIES_AT_ONCE", 600)
    a, b = cache_of(range(60), TOPKS, shard_rows=1000), cache_of(range(60), OTHERS, shard_rows=1000)
    read, lengths = compare.read_rows, []

    def counted(*args):
        lengths.append(args[-1].stop - args[-1].start)
        return read(*args)

    monkeypatch.setattr(compare, "read_rows", counted)
    total = sum(map(len, TOPKS))
    compare_caches(a, b)
    longest_sample = max(map(len, TOPKS))
    assert sum(lengths) == 2 * total and max(lengths) <= 600 // 15 + longest_sample


def test_the_same_rows_in_another_precision() -> None:
    a = cache_of(range(60), TOPKS)
    exact, coarse = (
        compare_caches(a, cache_of(range(60), TOPKS)),
        compare_caches(a, cache_of(range(60), TOPKS, precision="u8")),
    )
    assert exact.kl_ab == exact.kl_ba == exact.label_distance == 0 and exact.top_1_agreement == 1
    assert 0 < coarse.kl_ab < 1e-3 and coarse.top_1_agreement == 1 and coarse.top_k_overlap == 1
    assert coarse.settings == ("precision: 'fp32', 'u8'",)


def test_samples_of_one_cache_only_are_counted_and_named() -> None:
    a, b = cache_of(range(40), TOPKS), cache_of(range(10, 60), OTHERS)
    check(a, b)
    found = compare_caches(a, b)
    assert (found.num_samples, found.only_a.num_samples, found.only_b.num_samples) == (30, 10, 20)
    assert found.only_a.examples == tuple(f"test:{i}" for i in range(1, 6))
    assert found.only_b.examples == tuple(f"test:{i}" for i in range(31, 36))


def test_a_cache_that_is_being_built() -> None:
    a, b = cache_of(range(60), TOPKS), cache_of(range(60), OTHERS, commit_shards=2)
    check(a, b)
    assert compare_caches(a, b).only_a.num_samples == 60 - len(b)


def test_samples_that_occur_twice_count_once() -> None:
    a, b = cache_of([0, 1, 0, 2, 1], TOPKS), cache_of([2, 2, 0], OTHERS)
    found = compare_caches(a, b)
    assert found.num_samples == 2 and found.num_rows == len(TOPKS[0]) + len(TOPKS[2])
    assert found.only_a.num_samples == 2 and found.only_b.num_samples == 0


def test_nothing_in_common() -> None:
    with pytest.raises(InputError, match=r"no sample in common \(20 and 40 committed samples\)"):
        compare_caches(cache_of(range(20), TOPKS), cache_of(range(20, 60), OTHERS))
    with pytest.raises(InputError, match=r"\(0 and 60 committed"):
        compare_caches(cache_of(range(20), TOPKS, commit_shards=0), cache_of(range(60), OTHERS))


@pytest.mark.parametrize(
    ("tokenizer", "part"),
    [
        (tokenizer_identity({"a": 0}, {}, None), "vocabulary"),
        (tokenizer_identity({}, {"eos": "a"}, None), "special tokens"),
    ],
)
def test_other_token_ids_are_refused(tokenizer, part) -> None:
    a, b = cache_of(range(9), TOPKS), cache_of(range(9), TOPKS, tokenizer=tokenizer)
    with pytest.raises(MismatchError, match=f"tokenizers of another {part} .*do not mean the same"):
        compare_caches(a, b)


def test_another_chat_template_and_a_padded_head_are_no_hindrance() -> None:
    a = cache_of(range(9), TOPKS)
    check(a, cache_of(range(9), OTHERS, tokenizer=tokenizer_identity({}, {}, "{{ x }}"), vocab_size=64))


def test_damage_is_an_error(tmp_path: Path) -> None:
    a, b = cache_of(range(60), TOPKS), cache_of(range(60), TOPKS, url=str(tmp_path))
    broken = tmp_path / load_commit(b.store, 1).objects[0].path
    broken.write_bytes(bytes(broken.stat().st_size))
    with pytest.raises(CorruptionError, match="crc32c"):
        compare_caches(a, b)


def test_on_every_kind_of_store(store_location) -> None:
    options = store_location.storage_options
    a = cache_of(range(60), TOPKS, url=store_location.url, storage_options=options)
    check(a, cache_of(range(60), OTHERS, container="zarr"))


def test_a_comparison_in_steps_ends_where_the_whole_one_does():
    a, b = cache_of(range(60), TOPKS), cache_of(range(59, -1, -1), OTHERS)
    whole, comparing = compare_caches(a, b, top=5), Comparing(a, b, top=5, rows_at_once=20, spread=True)
    assert comparing.num_samples == 60 and comparing.num_rows == whole.num_rows
    seen = []
    while not comparing.is_done:
        seen.append(comparing.advance())
        part = comparing.result()
        assert part.num_rows == sum(seen) == comparing.num_compared and len(part.most_different) <= 5
    found = comparing.result()
    assert comparing.advance() == 0 and found.num_samples == 60
    assert found.histogram == whole.histogram
    assert [s.key for s in found.most_different] == [s.key for s in whole.most_different]
    for name in ("kl_ab", "kl_ba", "js", "label_difference", "label_distance", "rest_mass_a"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_the_first_steps_are_spread_all_over_the_cache():
    a, b = cache_of(range(60), TOPKS), cache_of(range(60), OTHERS)
    comparing, places = Comparing(a, b, top=60, rows_at_once=1, spread=True), set()
    for _ in range(12):
        comparing.advance()
        places = {s.index_a for s in comparing.result().most_different}
    gaps = np.diff([0, *sorted(places), 60])
    assert len(places) == 12 and gaps.max() <= 12  # 5 if they were even; 49 at the beginning of the cache


def test_what_is_damaged_is_named_once_and_passed_by(tmp_path):
    a, b = cache_of(range(60), TOPKS, str(tmp_path / "a"), container="arrow"), cache_of(range(60), OTHERS)
    damaged = min(a.shards)
    (path,) = (tmp_path / "a/shards").glob(f"{damaged:05d}-*.arrow")
    path.write_bytes(bytes(path.stat().st_size))
    comparing, problems = Comparing(Cache.open(str(tmp_path / "a")), b, spread=True), 0
    while not comparing.is_done:
        try:
            comparing.advance()
        except CorruptionError:
            problems += 1
    left = sum(record.num_rows for shard, record in a.shards.items() if shard != damaged)
    assert problems == 1 and comparing.num_compared == left
