"""Whole builds on a real Ray cluster: complete, continued, refused, healed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from logitcache_pipeline.build import build
from logitcache_pipeline.report import load_report, save_report
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import write_teacher
from logitcache_pipeline.watch import RunWatcher
from logitcache_pipeline.worker import ShardOutcome
from logitcache_storage import Cache
from logitcache_storage.commit import commit_path, committed_shards, load_commits, load_quarantine
from logitcache_storage.copying import copy_cache
from logitcache_storage.errors import BuildError, InputError, MismatchError
from logitcache_storage.garbage import find_garbage
from logitcache_storage.objects import open_store
from logitcache_storage.verify import verify_cache

pytestmark = pytest.mark.timeout(120)


def run(settings: BuildSettings, **options: Any) -> list[str]:
    lines: list[str] = []
    build(settings, say=lines.append, **options)
    return lines


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def built(teacher: Path, corpus: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """A finished build, for tests that leave it as it is."""
    cache = str(tmp_path_factory.mktemp("built") / "cache")
    settings = BuildSettings(
        str(teacher), (str(corpus),), cache, k=9, shard_rows=24, workers=2, ray_address=ray_address
    )
    lines = run(settings)
    assert any("16 records, 14 samples" in line for line in lines)
    assert lines[-1].startswith("complete: 14 samples")
    return settings


def test_a_build_makes_a_cache_that_verifies(built):
    cache = Cache.open(built.cache)
    assert cache.is_complete
    assert len(cache) == 14
    assert cache.identity.k == 9
    assert verify_cache(built.cache, deep=True).is_intact


def test_the_report_adds_up(built):
    (entry,) = load_report(open_store(built.cache))
    plan = Cache.open(built.cache).plan
    records = load_commits(open_store(built.cache))
    assert entry["outcome"] == "complete"
    assert entry["shards"] | {"scored": len(records)} == entry["shards"]
    assert entry["target_tokens"] == plan.num_rows
    assert entry["bytes"] == sum(record.num_bytes for record in records.values())
    assert 1 <= len(entry["workers"]) <= 2
    assert sum(worker["shards"] for worker in entry["workers"]) == len(records)
    busy, scored = (
        sum(values) for values in zip(*((w["busy_seconds"], w["seconds"]) for w in entry["workers"]), strict=True)
    )
    assert busy == pytest.approx(sum(record.seconds for record in records.values()), abs=0.01)
    assert 0 < busy < scored
    assert entry["settings"]["k"] == 9
    assert entry["hardware"]["nodes"][0]["cpus"] == 4
    assert find_garbage(built.cache, older_than_hours=0).foreign == ()


def test_a_copy_has_the_report(built, tmp_path):
    target = open_store(str(tmp_path / "copy"))
    copy_cache(open_store(built.cache), target)
    assert load_report(target) == load_report(open_store(built.cache))
    save_report(target, {"outcome": "complete"})
    copy_cache(open_store(built.cache), target)
    assert len(load_report(target)) == 2


def test_an_interrupted_build_leaves_its_report(settings, monkeypatch):
    """As by Ctrl-C after the second commit, whenever that comes."""

    def interrupt(watcher: RunWatcher, outcome: ShardOutcome, worker: int) -> None:
        told(watcher, outcome, worker)
        if len(committed_shards(open_store(settings.cache))) >= 2:
            raise KeyboardInterrupt

    told = RunWatcher.committed
    monkeypatch.setattr(RunWatcher, "committed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    (entry,) = load_report(open_store(settings.cache))
    assert entry["outcome"] == "interrupted"
    assert 2 <= entry["shards"]["scored"] < entry["shards"]["planned"]


def test_the_same_command_again_scores_nothing(built):
    before = files(built.cache)
    lines = run(built)
    assert lines[-1].startswith("complete: 14 samples")
    assert files(built.cache) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 8}, "k: 9, 8"),
        ({"kept_mass": 0.9}, "kept_mass: 1.0, 0.9"),
        ({"precision": "fp16"}, "precision: 'u8', 'fp16'"),
        ({"format": "arrow"}, "container: 'zarr', 'arrow'"),
        ({"shard_rows": 25}, "shard_rows: 24, 25"),
        ({"dtype": "bfloat16"}, "teacher.dtype: 'float32', 'bfloat16'"),
        ({"max_length": 200}, "corpus.settings.max_length: 256, 200"),
        ({"overlong": "skip"}, "corpus.settings.overlong: 'truncate', 'skip'"),
    ],
)
def test_other_settings_are_refused_by_name(built, change, field):
    before = files(built.cache)
    with pytest.raises(MismatchError, match=f"holds a cache made with other settings.*\n  {field}") as caught:
        run(replace(built, **change))
    assert str(caught.value).count("\n") == 2
    assert files(built.cache) == before


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5, 5] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "field"), [(other_weights, "teacher.weights"), (other_tokenizer, "tokenizer.vocabulary")]
)
def test_another_teacher_is_refused_by_name(built, tmp_path, change, field):
    folder = write_teacher(tmp_path / "teacher")
    change(folder)
    with pytest.raises(MismatchError, match=f"\n  {field}: "):
        run(replace(built, teacher=str(folder)))


def test_the_same_teacher_may_stand_elsewhere(built, tmp_path):
    assert run(replace(built, teacher=str(write_teacher(tmp_path / "copy"))))[-1].startswith("complete")


def test_another_corpus_is_refused_by_name(built, corpus, tmp_path):
    other = tmp_path / "train.jsonl"
    other.write_text(corpus.read_text().replace("20, I think", "21, I think"))
    with pytest.raises(MismatchError, match=r"\n  corpus\.fingerprint: "):
        run(replace(built, data=(str(other),)))


def test_a_missing_shard_is_scored_again_and_nothing_else(built, tmp_path):
    settings = replace(built, cache=str(tmp_path / "cache"))
    shutil.copytree(built.cache, settings.cache)
    before = load_commits(open_store(settings.cache))
    (Path(settings.cache) / commit_path(2)).unlink()
    lines = run(settings)
    assert f"continuing: {len(before) - 1} of {len(before)} shards are committed" in lines
    after = load_commits(open_store(settings.cache))
    assert [shard for shard in before if before[shard].attempt != after[shard].attempt] == [2]
    # The manifest of the first run named an attempt that no commit record knows any more.
    assert verify_cache(settings.cache, deep=True).is_intact


def test_a_dry_run_writes_nothing(settings):
    lines = run(replace(settings, dry_run=True))
    assert "16 records, 14 samples" in lines[0]
    assert "1 share the rows of an equal sample" in lines[0]
    assert "nothing was written" in lines[-1]
    assert not Path(settings.cache).exists()


def test_a_dry_run_refuses_what_the_build_would(settings):
    with pytest.raises(InputError, match="k must be at most the teacher's vocabulary size"):
        run(replace(settings, dry_run=True, k=1000))


def test_quarantine_ends_with_an_error_and_the_next_run_heals_it(settings):
    """A folder where a commit record should go: one shard cannot be committed until somebody removes it."""
    obstacle = Path(settings.cache) / commit_path(4)
    obstacle.mkdir(parents=True)
    settings = replace(settings, max_attempts=2)
    expected = r"^1 of \d+ shards \(2 samples\) could not be .*\n  shard 4 \(.*Is a directory"
    with pytest.raises(BuildError, match=expected):
        run(settings)
    store = open_store(settings.cache)
    assert load_quarantine(store)[4].attempts == 2
    (entry,) = load_report(store)
    assert (entry["outcome"], entry["failed_attempts"], entry["retries"]) == ("quarantined", 2, 1)
    assert "Is a directory" in entry["quarantine"]["4"]
    cache = Cache.open(settings.cache)
    assert set(range(len(cache.plan.shard_num_rows))) - set(cache.shards) == {4}
    assert verify_cache(settings.cache, deep=True).is_intact
    before = load_commits(store)
    obstacle.rmdir()
    assert run(settings)[-1].startswith("complete: 14 samples")
    after = load_commits(store)
    assert {shard: after[shard] for shard in before} == before
    assert not load_quarantine(store)
    assert verify_cache(settings.cache, deep=True).is_intact


def test_a_build_into_s3_and_on(settings, s3_server):
    """Workers reach the bucket by the storage options alone."""
    settings = replace(settings, cache=s3_server.new_url())
    options = s3_server.storage_options
    run(settings, storage_options=options)
    assert Cache.open(settings.cache, options).is_complete
    assert verify_cache(settings.cache, deep=True, storage_options=options).is_intact
    with pytest.raises(MismatchError, match="k: 9, 8"):
        run(replace(settings, k=8), storage_options=options)
