"""The table of samples against the samples themselves: from statistics that were stored, and from rows."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import sample_statistics
from logitcache_storage.cache import Cache
from logitcache_storage.commit import MANIFEST_PATH, commit_path, load_commits
from logitcache_storage.errors import InputError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.record_json import dump_record
from logitcache_storage.row_bins import HISTOGRAMS
from logitcache_storage.sample_statistics import SORTABLE, SampleTable, load_statistics
from logitcache_storage.statistics import row_statistics
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache

SAMPLES, TOPKS = make_samples(60, 5, 40, seed=2)
IDENTITY = make_identity(k=5, vocab_size=40, shard_rows=80, container="arrow")


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    return tmp_path / "local"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """To be left as it is."""
    url = str(tmp_path_factory.mktemp("statistics") / "cache")
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY)
    return Cache.open(url)


@pytest.fixture(scope="module")
def table(intact: Cache) -> SampleTable:
    return load_statistics(intact)


@pytest.fixture
def store(intact: Cache, tmp_path: Path) -> ObjectStore:
    """A copy to damage."""
    return open_store(str(shutil.copytree(intact.store.url, tmp_path / "cache")))


def without_statistics(store: ObjectStore) -> None:
    """As an early writer left it."""
    for shard, record in dict(load_commits(store)).items():
        item = record.statistics_object
        assert item is not None
        plain = dataclasses.replace(record, objects=record.row_objects, num_bytes=record.num_bytes - item.size)
        store.put(commit_path(shard), dump_record(plain))
        store.delete(item.path)
    store.delete(MANIFEST_PATH)


def damage(store: ObjectStore, path: str) -> None:
    data = bytearray(store.get(path))
    data[len(data) // 2] ^= 4
    store.put(path, bytes(data))


def check_against_samples(cache: Cache, table: SampleTable) -> None:
    """Every known sample, from its own rows."""
    assert len(table) == len(cache)
    for index in np.flatnonzero(table.known).tolist():
        sample = cache[index]
        rows = row_statistics(sample.topk, sample.labels)
        facts = table.facts(index)
        is_missed = rows.label_rank == 0
        doubts = np.where(is_missed, np.exp(sample.topk.log_probs[:, :1].astype(np.float64)).sum(1), 0)
        expected = {
            "num_tokens": len(sample.input_ids),
            "num_targets": len(sample.labels),
            "mean_label_log_prob": rows.label_log_prob.mean(),
            "min_label_log_prob": rows.label_log_prob.min(),
            "mean_entropy": rows.entropy.mean(),
            "max_entropy": rows.entropy.max(),
            "mean_kept_mass": rows.kept_mass.mean(),
            "top_1_rate": (rows.label_rank == 1).mean(),
            "top_k_rate": (~is_missed).mean(),
            "doubt": doubts.max(),
        }
        for name, value in expected.items():
            assert facts[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
            assert table.column(name)[index] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert facts["surprising_row"] == table.surprising_row(index) == int(rows.label_log_prob.argmin())
        assert facts["doubtful_row"] == table.doubtful_row(index) == (int(doubts.argmax()) if doubts.any() else None)
        assert facts["index"] == table.column("index")[index] == index


def same(a: SampleTable, b: SampleTable) -> bool:
    names = [name for name in SORTABLE if not np.array_equal(a.column(name), b.column(name))]
    return not names and all(np.array_equal(a.counts(name), b.counts(name)) for name in HISTOGRAMS)


def test_what_was_stored(intact: Cache, local: Path) -> None:
    calls: list[tuple[int, int]] = []
    table = load_statistics(intact, progress=lambda done, total: calls.append((done, total)))
    assert table.known.all() and not table.problems
    check_against_samples(intact, table)
    num_rows = sum(len(topk) for topk in TOPKS)
    assert calls[-1] == (num_rows, num_rows) and calls == sorted(calls)
    assert all(table.counts(name).sum() == num_rows for name in HISTOGRAMS)
    assert not local.exists()  # nothing was computed


def test_an_early_writers_cache_is_computed_once(store: ObjectStore, local: Path) -> None:
    stored = load_statistics(Cache.open(store.url))
    without_statistics(store)
    cache = Cache.open(store.url)
    first = load_statistics(cache)
    assert same(first, stored) and first.known.all()
    for record in cache.shards.values():
        for item in record.objects:
            store.delete(item.path)
    assert same(load_statistics(cache), stored)
    for path in (local / "logitcache" / "statistics").iterdir():
        path.unlink()
    lost = load_statistics(cache)
    assert not lost.known.any() and set(lost.problems) == set(cache.shards)


def test_without_a_place_to_keep_it(store: ObjectStore, local: Path, caplog: pytest.LogCaptureFixture) -> None:
    without_statistics(store)
    local.write_text("not a folder")
    cache = Cache.open(store.url)
    table = load_statistics(cache)
    assert table.known.all() and "statistics are not kept" in caplog.text
    check_against_samples(cache, table)


def test_golden_caches_of_early_writers() -> None:
    for folder in sorted((Path(__file__).parent / "golden").glob("v1-*/")):
        cache = Cache.open(str(folder))
        table = load_statistics(cache)
        assert table.known.all() and not table.problems
        check_against_samples(cache, table)


def test_damaged_statistics_are_computed_and_named(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache.open(store.url)
    good = load_statistics(cache)
    item = cache.shards[1].statistics_object
    assert item is not None
    damage(store, item.path)
    table = load_statistics(cache)
    assert same(table, good) and not table.problems
    assert item.path in caplog.text and "crc32c" in caplog.text


def test_a_shard_that_cannot_be_read(store: ObjectStore) -> None:
    cache = Cache.open(store.url)
    good = load_statistics(cache)
    for item in cache.shards[1].objects:
        damage(store, item.path)
    table = load_statistics(cache)
    inside = cache.index.shard == 1
    assert list(table.problems) == [1] and "crc32c" in table.problems[1]
    assert np.array_equal(table.known, ~inside) and inside.any()
    check_against_samples(cache, table)
    lost = int(np.flatnonzero(inside)[0])
    facts = table.facts(lost)
    assert facts["mean_entropy"] is None and facts["doubtful_row"] is None and facts["num_targets"] > 0
    for by in SORTABLE:
        assert sorted(table.order(by).tolist()) == np.flatnonzero(~inside).tolist()
    assert not table.between("doubt", 0.0)[inside].any() and table.between("doubt", 0.0)[~inside].all()
    assert table.counts("entropy").sum() == good.counts("entropy").sum() - cache.shards[1].num_rows


def test_statistics_of_other_samples_are_refused(store: ObjectStore) -> None:
    """All checksums are right, but the object is that of another shard with as many rows."""
    cache = Cache.open(store.url)
    table = SampleTable(cache)
    found = sample_statistics.read_statistics(cache, cache.shards[0])
    assert found is not None
    found.columns["num_rows"] = found.columns["num_rows"][::-1]
    with pytest.raises(Exception, match="shard 0: its statistics are of other samples"):
        table._add(0, np.flatnonzero(cache.index.shard == 0), found)
    assert not table.known.any()


@pytest.mark.parametrize("by", SORTABLE)
def test_orders(table: SampleTable, by: str) -> None:
    values = table.column(by).tolist()
    for descending, share in itertools.product([False, True], [None, 1.0, 0.5, 0.05]):
        mask = None if share is None else np.random.default_rng(0).uniform(size=len(table)) < share
        wanted = [i for i in range(len(table)) if mask is None or mask[i]]
        expected = sorted(wanted, key=lambda i: (-values[i] if descending else values[i], i))
        for _ in range(2):  # the second time from memory
            assert table.order(by, descending=descending, among=mask).tolist() == expected


def test_a_bar_leads_to_its_samples(intact: Cache, table: SampleTable) -> None:
    ranks = [row_statistics(s.topk, s.labels).label_rank for s in intact]
    assert table.in_bin("label_rank", 0).tolist() == [bool((rank == 1).any()) for rank in ranks]
    assert table.in_bin("label_rank", 31).tolist() == [bool((rank == 0).any()) for rank in ranks]
    for name in HISTOGRAMS:
        for number, count in enumerate(table.counts(name)):
            assert bool(count) == table.in_bin(name, number).any()
    doubt = table.column("doubt")
    assert table.between("doubt", 0.5, 0.8).tolist() == [0.5 <= d <= 0.8 for d in doubt.tolist()]
    assert table.between("num_tokens", high=10).tolist() == (intact.index.num_tokens <= 10).tolist()


def test_what_there_is_not(table: SampleTable) -> None:
    with pytest.raises(InputError, match="unknown column 'surprising_row'; choose from index"):
        table.order("surprising_row")
    for name, number in (("rank", 0), ("entropy", 32), ("entropy", -1)):
        with pytest.raises(InputError, match=f"no bin {number} of '{name}'"):
            table.in_bin(name, number)


def test_an_unfinished_cache_without_some_samples(tmp_path: Path) -> None:
    url = str(tmp_path / "partial")
    excluded = {2: "killed its worker", 9: "too long"}
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY, commit_shards=3, excluded=excluded)
    cache = Cache.open(url)
    table = load_statistics(cache)
    assert 0 < len(cache) < 60 and table.known.all()
    check_against_samples(cache, table)
    stored, store = table, open_store(url)
    without_statistics(store)
    assert same(load_statistics(Cache.open(url)), stored)


def test_nothing_committed(tmp_path: Path) -> None:
    write_cache(str(tmp_path / "empty"), SAMPLES, TOPKS, identity=IDENTITY, commit_shards=0)
    table = load_statistics(Cache.open(str(tmp_path / "empty")))
    assert len(table) == 0 and table.order("doubt").tolist() == [] and not table.problems


def test_rows_without_ids(tmp_path: Path) -> None:
    """A reference cache keeps the label's log-prob alone, and no statistics."""
    url = str(tmp_path / "reference")
    topks = [type(topk).of_labels(topk.label_log_prob) for topk in TOPKS]
    write_cache(url, SAMPLES, topks, identity=dataclasses.replace(IDENTITY, k=0, role="reference"))
    cache = Cache.open(url)
    assert all(record.statistics_object is None for record in cache.shards.values())
    table = load_statistics(cache)
    check = [float(topk.label_log_prob.mean()) for topk in TOPKS]
    assert table.column("mean_label_log_prob").tolist() == pytest.approx(check, rel=1e-5)
    assert not table.column("doubt").any() and not table.column("mean_kept_mass").any()


def test_samples_that_share_rows(tmp_path: Path) -> None:
    """Equal tokens stand once: both samples have the same statistics, and their rows count once."""
    labels = np.array([3, 1], np.int32)
    ids, ranges = np.array([5, 3, 1], np.int32), np.array([[1, 3]], np.int32)
    topk = make_topk(2, 5, 40, labels=labels)
    write_cache(str(tmp_path / "one"), [(ids, ranges)], [topk], identity=IDENTITY)
    cache = Cache.open(str(tmp_path / "one"))
    twice = Cache(cache.store, cache.identity, cache.plan, cache.shards)
    twice.index = cache.index[np.array([0, 0])]
    table = load_statistics(twice)
    assert table.known.tolist() == [True, True] and table.counts("entropy").sum() == 2
    assert table.column("mean_entropy")[0] == table.column("mean_entropy")[1] > 0
