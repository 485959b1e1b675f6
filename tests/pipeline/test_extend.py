"""Further data behind a cache: what is added, what is left out, what is refused, who wins, what is continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitcache_pipeline import build as build_module
from logitcache_pipeline.build import build, remaining_tasks
from logitcache_pipeline.columns import JSON_COLUMN
from logitcache_pipeline.extend import KnownSamples, fitted_columns, load_base
from logitcache_pipeline.log import Log
from logitcache_pipeline.prepare import prepare, write_extension
from logitcache_pipeline.settings import BuildSettings
from logitcache_storage import Cache
from logitcache_storage.cli import main
from logitcache_storage.commit import MANIFEST_PATH, committed_shards, load_commits, load_manifest
from logitcache_storage.errors import CacheNotFoundError, CorpusError, MismatchError
from logitcache_storage.objects import open_store
from logitcache_storage.plans import load_plan, load_plans
from logitcache_storage.status import build_status
from logitcache_storage.verify import verify_cache

pytestmark = pytest.mark.timeout(120)

MORE = [
    {"question": "20 + 20?", "answer": "40, I think", "level": 20},
    {"question": "3 + 3?", "answer": "6, I think", "level": 3},  # in the cache
    {"question": "21 + 21?", "answer": "42, I think"},  # without a level
    {"question": "20 + 20?", "answer": "40, I think", "level": 21},  # equal to the first of these
    {"question": "nothing", "answer": " ", "level": 0},
]


def run(settings: BuildSettings) -> list[str]:
    lines: list[str] = []
    build(settings, say=lines.append)
    return lines


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def built(teacher: Path, corpus: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """A finished build of 14 samples, for tests that leave it as it is."""
    cache = str(tmp_path_factory.mktemp("base") / "cache")
    settings = BuildSettings(str(teacher), (str(corpus),), cache, k=9, shard_rows=24, ray_address=ray_address)
    run(settings)
    return settings


@pytest.fixture
def base(built: BuildSettings, tmp_path: Path) -> BuildSettings:
    """A copy to extend."""
    shutil.copytree(built.cache, tmp_path / "cache")
    return replace(built, cache=str(tmp_path / "cache"))


@pytest.fixture
def more(base: BuildSettings, tmp_path: Path) -> BuildSettings:
    """The build that extends it: neither dtype nor rows of a shard are given."""
    data = write(tmp_path / "more.jsonl", MORE)
    return replace(base, data=(data,), extend=True, shard_rows=None)


@pytest.fixture(scope="module")
def extended(built: BuildSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildSettings, list[str]]:
    """A finished extension, for tests that leave it as it is, and what its build said."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(built.cache, folder / "cache")
    data = write(folder / "more.jsonl", MORE)
    settings = replace(built, cache=str(folder / "cache"), data=(data,), extend=True, shard_rows=None)
    return settings, run(settings)


def test_further_data_stand_behind_what_is_there(built, extended):
    settings, lines = extended
    assert lines[-1].startswith("complete: 17 samples")
    (said,) = [line for line in lines if line.startswith("extended by plan 1")]
    assert "5 records, 3 samples" in said
    assert "1 are in the cache already: left out (e.g. more.jsonl:2)" in said
    assert "1 share the rows of an equal sample" in said
    after = files(settings.cache)
    replaced = ("manifest.json", "manifest.parquet", "report.json")
    before = {name: data for name, data in files(built.cache).items() if name not in replaced}
    assert before.items() <= after.items()
    assert verify_cache(settings.cache, deep=True).is_intact
    cache, old = Cache.open(settings.cache), list(Cache.open(built.cache))
    assert cache.is_complete and len(cache) == 17
    assert len(load_manifest(open_store(settings.cache))) == len(cache.plan.shard_num_rows)
    for i, sample in enumerate(old):
        assert cache[i].key == sample.key and cache[i].topk.equals(sample.topk)
    assert [cache[i].source_id for i in (14, 15, 16)] == ["more.jsonl:1", "more.jsonl:3", "more.jsonl:4"]
    assert [cache[i].columns for i in (14, 15, 16)] == [{"level": 20}, {"level": None}, {"level": 21}]
    assert cache[14].key == cache[16].key and cache[14].topk.equals(cache[16].topk)
    assert min(cache.index.shard[14:]) == max(cache.index.shard[:14]) + 1


def test_the_same_again_and_the_original_command_add_nothing(built, extended):
    settings, _ = extended
    before = files(settings.cache)
    assert "continuing: plan 1 of the cache is of these data" in run(settings)
    lines = run(replace(built, cache=settings.cache))
    assert any(line.startswith("extended by plan 1, of corpus") for line in lines)
    assert lines[-1].startswith("complete: 17 samples")
    assert files(settings.cache) == before
    status = build_status(open_store(settings.cache))
    assert status.is_complete and status.num_samples == status.plan.num_samples == 17
    assert status.plan.report["records"] == 21 and status.plan.report["duplicates"] == 2


def test_an_extension_that_died_is_continued_by_either_command(base, more):
    """The plan is written, no shard is scored, and the manifest is still that of the first build."""
    store = open_store(base.cache)
    before = load_commits(store)
    first = load_base(store)
    prepared = prepare(more).behind(first)
    assert write_extension(prepared, first)
    cache = Cache.open(base.cache)
    assert len(cache) == 14 and not cache.is_complete
    assert verify_cache(store, deep=True).is_intact
    tasks = remaining_tasks(store, load_plan(store))
    assert [task.shard for task in tasks] == [len(before), len(before) + 1][: len(tasks)]
    lines = run(base)
    assert f"continuing: {len(before)} of {len(before) + len(tasks)} shards are committed" in lines
    after = load_commits(store)
    assert {shard: after[shard] for shard in before} == dict(before)
    assert len(Cache.open(base.cache)) == 17 and verify_cache(store, deep=True).is_intact


def test_damaged_shards_of_both_plans_are_scored_again_and_no_other(built, extended, tmp_path):
    shutil.copytree(extended[0].cache, tmp_path / "cache")
    settings = replace(built, cache=str(tmp_path / "cache"))
    store = open_store(settings.cache)
    before = load_commits(store)
    damaged = {2, max(before)}
    for shard in damaged:
        (Path(settings.cache) / before[shard].objects[0].path).write_bytes(b"")
    assert main(["verify", settings.cache, "--repair"]) == 0
    assert committed_shards(store) == set(before) - damaged
    lines = run(settings)
    assert f"continuing: {len(before) - 2} of {len(before)} shards are committed" in lines
    after = load_commits(store)
    assert {shard for shard in before if before[shard].attempt != after[shard].attempt} == damaged
    assert verify_cache(store, deep=True).is_intact and not build_status(store).quarantine


def test_a_corpus_that_has_grown_may_be_given_whole(base, more, corpus, tmp_path):
    grown = tmp_path / "grown.jsonl"
    grown.write_text(corpus.read_text() + json.dumps(MORE[0]))
    plans = load_base(open_store(base.cache))
    prepared = prepare(replace(more, data=(str(grown),))).behind(plans)
    assert write_extension(prepared, plans)
    report = load_plans(open_store(base.cache)).extensions[0].plan.report
    assert (report["records"], report["samples"], report["in_cache"]) == (17, 1, 14)


def test_data_without_a_new_sample_is_refused(base, more, corpus, tmp_path):
    data = write(tmp_path / "known.jsonl", MORE[1:2])
    before = files(base.cache)
    with pytest.raises(CorpusError, match=r"none of the 1 records is a sample \(.*1 in cache\)"):
        run(replace(more, data=(data,)))
    assert files(base.cache) == before


def test_the_first_corpus_is_never_added_twice(base):
    before = files(base.cache)
    lines = run(replace(base, extend=True))
    assert "continuing: plan 0 of the cache is of these data" in lines
    assert files(base.cache) == before


def test_a_dry_run_writes_nothing(base, more):
    before = files(base.cache)
    lines = run(replace(more, dry_run=True))
    assert "5 records, 3 samples" in lines[0] and "1 shard of up to 24 target rows" in lines[-1]
    assert run(replace(base, extend=True, dry_run=True)) == [
        "plan 0 of the cache is of these data already: nothing would be added"
    ]
    assert files(base.cache) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 8}, "k: 9, 8"),
        ({"precision": "fp16"}, "precision: 'u8', 'fp16'"),
        ({"shard_rows": 25}, "shard_rows: 24, 25"),
        ({"dtype": "bfloat16"}, "teacher.dtype: 'float32', 'bfloat16'"),
        ({"max_length": 200}, "corpus.settings.max_length: 256, 200"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_other_settings_are_refused_by_name(base, more, change, field, dry_run):
    before = files(base.cache)
    with pytest.raises(MismatchError, match=f"was made with other settings.*\n  {field}\nan extension needs"):
        run(replace(more, dry_run=dry_run, **change))
    assert files(base.cache) == before


def test_without_extend_other_data_are_refused_with_the_remedy(base, more):
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint: .*\n(.*\n)+.*to add these data .*: --extend$"):
        run(replace(more, extend=False, shard_rows=24))
    with pytest.raises(MismatchError, match=r"shard_rows: 24, 4096\n.*\nto add these data .*: --extend$"):
        run(replace(more, extend=False))  # as large as the data ask for
    with pytest.raises(MismatchError, match="k: 9, 8") as caught:
        run(replace(more, extend=False, shard_rows=24, k=8))
    assert "--extend" not in str(caught.value)


def test_there_must_be_a_cache_with_a_plan(base, more, tmp_path):
    with pytest.raises(CacheNotFoundError, match="no cache at"):
        run(replace(more, cache=str(tmp_path / "nothing")))
    (Path(base.cache) / "plans/00000.json").unlink()
    with pytest.raises(CacheNotFoundError, match="its first build has not written its plan yet"):
        run(more)


def test_of_two_extensions_at_once_both_are_added(base, more, tmp_path, monkeypatch):
    """The other one is planned while ours is being planned; ours starts over behind it."""
    store = open_store(base.cache)
    other = replace(more, data=(write(tmp_path / "other.jsonl", MORE[2:3]),))
    ours, first = prepare(more), load_base(store)

    def late(prepared, behind):
        monkeypatch.setattr(build_module, "write_extension", write_extension)
        assert write_extension(prepare(other).behind(first), first)
        return write_extension(prepared, behind)

    monkeypatch.setattr(build_module, "write_extension", late)
    said: list[str] = []
    build_module._extend(store, ours, Log(said.append))
    assert said == ["another build has extended the cache meanwhile: planning behind it"]
    extensions = load_plans(store).extensions
    assert [e.plan.num_samples for e in extensions] == [1, 2]  # one of ours is in the other's
    assert extensions[1].first_shard == extensions[0].first_shard + len(extensions[0].plan.shard_num_rows)
    assert verify_cache(store, deep=True).is_intact


def test_of_two_builds_of_the_same_extension_one_plans(base, more, monkeypatch):
    store = open_store(base.cache)

    def late(prepared, behind):
        assert write_extension(prepared, behind)
        return write_extension(prepared, behind)

    monkeypatch.setattr(build_module, "write_extension", late)
    said: list[str] = []
    build_module._extend(store, prepare(more), Log(said.append))
    assert said[-1] == "continuing: plan 1 of the cache is of these data"
    assert len(load_plans(store).extensions) == 1


def test_a_slow_build_of_the_first_plan_does_not_hide_the_extension(built, extended, tmp_path):
    """It has loaded its plan before the extension was made, and finishes after it."""
    shutil.copytree(extended[0].cache, tmp_path / "cache")
    store, plan = open_store(str(tmp_path / "cache")), load_plan(open_store(built.cache))
    manifest = dict(load_manifest(store))
    build_module.finish(store, plan, Log(lambda line: None))
    assert dict(load_manifest(store)) == manifest
    assert remaining_tasks(store, plan) == []
    store.delete(MANIFEST_PATH)
    store.delete("commits/00001.json")
    assert [task.shard for task in remaining_tasks(store, plan)] == [1]


def field(name: str, kind: pa.DataType, *, is_json: bool = False) -> pa.Field:
    return pa.field(name, kind, metadata=JSON_COLUMN if is_json else None)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ([field("level", pa.int64()), field("score", pa.float64())], "a column 'score', and the cache has 'level'"),
        ([field("level", pa.string())], "'level': found string, the cache has int64"),
        ([field("level", pa.float64())], "'level': found double, the cache has int64"),
        ([field("level", pa.string(), is_json=True)], "found mixed or nested values, the cache has int64"),
        ([field("key", pa.string())], "a column 'key', and the cache has 'level'"),
    ],
)
def test_columns_that_the_cache_has_not_are_refused(built, columns, problem):
    with pytest.raises(CorpusError, match=problem):
        fitted_columns(pa.schema(columns), load_base(open_store(built.cache)))


def test_columns_take_the_types_of_the_cache(built, tmp_path):
    records = [
        {"text": "ab", "key": 1, "note": {"a": 1}, "share": 0.5, "tags": [1.5]},
        {"text": "cd", "key": 2, "note": "x", "share": 1, "tags": []},
    ]
    settings = replace(built, data=(write(tmp_path / "a.jsonl", records),), cache=str(tmp_path / "cache"))
    prepared = prepare(settings)
    store = open_store(settings.cache)
    build_module.create_or_continue(store, prepared.identity("float32"))
    build_module.write_plan(store, prepared)
    later = [{"text": "ef", "key": 3, "note": 7, "share": 2, "tags": [3]}, {"text": "gh"}]
    prepared = prepare(replace(settings, data=(write(tmp_path / "b.jsonl", later),)))
    base = load_base(store)
    assert write_extension(prepared.behind(base), base)
    table = build_module.SamplesTable(store, load_plan(store)).index()
    assert table.column("corpus_key").to_pylist() == [1, 2, 3, None]
    assert table.column("note").to_pylist() == ['{"a":1}', '"x"', "7", None]
    assert table.column("share").to_pylist() == [0.5, 1.0, 2.0, None]
    assert table.column("tags").to_pylist() == [[1.5], [], [3.0], None]


def test_known_samples_are_found_by_all_sixteen_bytes():
    keys = np.random.default_rng(0).integers(0, 3, (200, 16)).astype(np.uint8)
    keys[0], keys[1, 8:] = 0, 0
    known = KnownSamples(keys.view("S16").ravel())
    there = {bytes(key).hex() for key in keys}
    assert all(key in known for key in there)
    for key in there:
        other = bytearray.fromhex(key)
        other[-1] += 3
        assert other.hex() not in known
    assert ("ff" * 16) not in known
