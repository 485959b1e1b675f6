"""A cache at a glance, against its samples."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.inspect.data import table_data
from logitcache_storage.inspect.overview import Overview, overview
from logitcache_storage.sample_statistics import SampleTable, load_statistics
from logitcache_storage.statistics import row_statistics
from logitcache_storage.testing import make_identity, make_samples, write_cache

SAMPLES, TOPKS = make_samples(40, 6, 30, seed=4)
IDENTITY = make_identity(k=6, vocab_size=30, shard_rows=60, container="arrow")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    url = str(tmp_path_factory.mktemp("overview"))
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY)
    return Cache.open(url)


def test_numbers_and_histograms(cache: Cache) -> None:
    view = overview(cache, load_statistics(cache))
    assert (view.num_samples, view.planned_samples, view.is_complete) == (40, 40, True)
    assert view.num_tokens == sum(len(ids) for ids, _ in SAMPLES)
    assert view.totals.num_rows == view.planned_rows == sum(map(len, TOPKS))
    rows = [row_statistics(sample.topk, sample.labels) for sample in cache]
    values = {name: np.concatenate([getattr(r, name) for r in rows]) for name in ("entropy", "label_log_prob")}
    values["label_rank"] = np.concatenate([np.where(r.label_rank == 0, 99, r.label_rank) for r in rows])
    values["kept_mass"] = np.concatenate([-np.expm1(sample.topk.log_tail.astype(np.float64)) for sample in cache])
    assert [found.name for found in view.histograms] == ["entropy", "kept_mass", "label_rank", "label_log_prob"]
    for found in view.histograms:
        assert found.num_rows == view.totals.num_rows and len(found.counts) == len(found.bins)
        for bin, count in zip(found.bins, found.counts, strict=True):
            inside = (values[found.name] >= bin.low) & (values[found.name] <= bin.high)
            assert count == inside.sum(), (found.name, bin)


def test_without_a_table(cache: Cache) -> None:
    view = overview(cache)
    assert view.histograms == () and view.totals.entropy is not None
    assert overview(cache, SampleTable(cache)).histograms[0].num_rows == 0


def test_a_build_in_progress(tmp_path: Path) -> None:
    write_cache(str(tmp_path), SAMPLES, TOPKS, identity=IDENTITY, commit_shards=0)
    empty = Cache.open(str(tmp_path))
    view = overview(empty, load_statistics(empty))
    assert (view.num_samples, view.num_shards, view.is_complete, view.num_tokens) == (0, 0, False, 0)
    assert view.planned_samples == 40 and view.totals.entropy is None
    write_cache(str(tmp_path), SAMPLES, TOPKS, identity=IDENTITY, commit_shards=2)
    view = overview(Cache.open(str(tmp_path)))
    assert 0 < view.num_samples < 40 and (view.num_shards, view.is_complete) == (2, False)


def test_rows_of_a_page(cache: Cache) -> None:
    table = load_statistics(cache)
    found = table_data(cache, table, [7, 0, 7])
    assert [row["index"] for row in found] == [7, 0, 7]
    for row in found:
        sample = cache[row["index"]]
        assert (row["key"], row["source_id"]) == (sample.key, sample.source_id)
        assert row["mean_label_log_prob"] == pytest.approx(float(sample.topk.label_log_prob.mean()), rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_plain_values(cache: Cache) -> None:
    view: Overview = overview(cache, load_statistics(cache))
    assert json.loads(json.dumps(asdict(view)["totals"]))["num_rows"] == view.totals.num_rows
