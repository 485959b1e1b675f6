"""Asking the teacher again: the same teacher agrees in every encoding, wrong rows are found, another one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from logitcache_pipeline.build import remaining_tasks
from logitcache_pipeline.prepare import prepare, write_plan
from logitcache_pipeline.rescore import rescore_samples
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import write_teacher
from logitcache_pipeline.worker import ScoringWorker, TeacherSettings
from logitcache_storage import Cache, cli
from logitcache_storage.cli import main
from logitcache_storage.commit import commit_path, commit_shard, create_or_continue, load_identity
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.objects import open_store
from logitcache_storage.schema import CacheIdentity
from logitcache_storage.topk import TopKLogProbs


def scored(teacher: Path, corpus: Path, url: Path, **changes: object) -> str:
    """A whole cache, scored in this process; shards of one sample each, other batches than a rescore makes."""
    settings = BuildSettings(str(teacher), (str(corpus),), str(url), k=9, shard_rows=24, **changes)
    store, prepared = open_store(settings.cache), prepare(settings)
    create_or_continue(store, prepared.identity("float32"))
    plan = write_plan(store, prepared)
    worker = ScoringWorker(settings.cache, None, TeacherSettings("transformers", settings.teacher, "float32"))
    for task in remaining_tasks(store, plan):
        worker.score(task)
        worker.commit(task.shard)
    return settings.cache


@pytest.fixture(scope="module")
def url(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return scored(teacher, corpus, tmp_path_factory.mktemp("rescore") / "cache", precision="fp32")


@pytest.mark.parametrize(
    "changes", [{"precision": "u8"}, {"precision": "u10", "format": "arrow"}, {"precision": "fp16", "kept_mass": 0.5}]
)
def test_the_same_teacher_agrees_in_every_encoding(teacher, corpus, tmp_path, changes):
    report = rescore_samples(Cache.open(scored(teacher, corpus, tmp_path / "cache", **changes)), 100)
    assert report.agrees and report.num_samples == 14
    assert report.worst_severity <= 1
    assert report.label.largest <= 2e-5 and report.tail.largest <= 2e-5  # the exact columns: test_worker's tolerance
    assert 0 < report.kept.largest < 0.3
    assert report.kl_largest < 2e-3 and report.top_1_agreement == 1


def test_exact_rows_agree_to_the_rounding_of_float32(url, teacher):
    report = rescore_samples(Cache.open(url), 100)
    assert report.agrees and report.teacher == str(teacher)
    assert report.kept.largest <= 2e-5 and report.kept.mean <= report.kept.largest
    assert report.num_rows == sum(len(sample.topk) for sample in Cache.open(url))


def test_the_seed_chooses_the_samples(url):
    cache = Cache.open(url)
    one, same, other = (rescore_samples(cache, 4, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.num_samples == other.num_samples == 4
    assert one.num_rows != other.num_rows or one.worst_key != other.worst_key


def spoil(url: str, shard: int, change: object) -> None:
    """Commit a shard with other rows, sound in themselves."""
    store, cache = open_store(url), Cache.open(url)
    rows = cache.read_shard(shard)
    inside = [i for i in range(len(cache)) if cache.samples.column("shard")[i].as_py() == shard]
    labels = np.concatenate([cache[i].labels for i in inside])
    store.delete(commit_path(shard))
    commit_shard(store, load_identity(store), shard, change(rows, labels), labels, seconds=0.0, worker="test")


def tempered(rows: TopKLogProbs, labels: np.ndarray) -> TopKLogProbs:
    """The same ids at a slightly lower temperature, each row summing to one."""
    kept, tail = 1.02 * rows.log_probs, 1.02 * rows.log_tail
    log_mass = np.log(np.exp(kept).sum(1) + np.exp(tail))
    is_label = rows.ids == labels[:, None]
    entry = np.where(is_label, kept - log_mass[:, None], 0).sum(1)
    label = np.where(is_label.any(1), entry, 1.02 * rows.label_log_prob - log_mass)
    return replace(
        rows,
        log_probs=(kept - log_mass[:, None]).astype(np.float32),
        log_tail=(tail - log_mass).astype(np.float32),
        label_log_prob=np.minimum(label, 0).astype(np.float32),
    )


def test_rows_of_another_temperature_are_found_and_named(teacher, corpus, tmp_path, capsys):
    url = scored(teacher, corpus, tmp_path / "cache", precision="u8")
    spoil(url, 3, tempered)
    assert main(["verify", url, "--deep"]) == 0  # nothing is wrong with the rows but that nobody said so
    report = rescore_samples(Cache.open(url), 100)
    assert not report.agrees and report.worst_severity > 1
    cache = Cache.open(url)
    worst = cache.index_of(report.worst_key)
    assert cache.samples.column("shard")[worst].as_py() == 3
    assert report.worst_position in cache[worst].target_positions
    capsys.readouterr()
    assert main(["verify", url, "--rescore", "100"]) == 1
    out = capsys.readouterr().out
    assert "ITS ANSWERS DIFFER" in out and report.worst_key[:12] in out and report.worst_source_id in out


def test_the_command(url, capsys):
    assert main(["verify", url, "--rescore", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rescore"]
    assert found["agrees"] and found["num_samples"] == 3
    assert {"largest", "mean"} == found["kept"].keys() == found["label"].keys() == found["tail"].keys()
    assert main(["verify", url, "--rescore", "3"]) == 0
    assert "its answers agree with the cache" in capsys.readouterr().out


def test_the_engine_gets_its_options(url, capsys):
    assert main(["verify", url, "--rescore", "2", "--engine-options", '{"tokens_per_batch": 40}']) == 0
    assert main(["verify", url, "--rescore", "2", "--engine-options", '{"tokens_per_batch": 0}']) == 2
    assert "tokens_per_batch must be at least 1, got 0" in capsys.readouterr().err


def test_another_copy_of_the_teacher_will_do(url, tmp_path):
    copy = write_teacher(tmp_path / "copy")
    assert rescore_samples(Cache.open(url), 2, teacher=str(copy)).agrees


@pytest.mark.parametrize("field", ["weights", "config"])
def test_another_teacher_is_refused_by_name(url, tmp_path, field, capsys):
    other = write_teacher(tmp_path / "other", seed=int(field == "weights"))
    if field == "config":
        config = other / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    with pytest.raises(MismatchError, match=rf"is not the teacher of the cache .*\n  teacher\.{field}: '") as caught:
        rescore_samples(Cache.open(url), 2, teacher=str(other))
    assert str(caught.value).count("teacher.") == 1
    assert main(["verify", url, "--rescore", "2", "--teacher", str(other)]) == 2


@pytest.mark.parametrize("missing", ["/nowhere/teacher", "./teacher", "no such name"])
def test_a_teacher_that_has_moved_is_asked_for(url, missing):
    with pytest.raises(InputError, match=r"the teacher .* cannot be read.* with --teacher"):
        rescore_samples(Cache.open(url), 2, teacher=missing)


def test_what_cannot_be_rescored(url, tmp_path, teacher, corpus):
    with pytest.raises(InputError, match="at least 1 sample, got 0"):
        rescore_samples(Cache.open(url), 0)
    settings = BuildSettings(str(teacher), (str(corpus),), str(tmp_path / "empty"), k=9)
    store = open_store(settings.cache)
    create_or_continue(store, prepare(settings).identity("float32"))
    write_plan(store, prepare(settings))
    with pytest.raises(InputError, match="no committed sample"):
        rescore_samples(Cache.open(settings.cache), 1)


def test_a_dtype_without_a_tolerance_is_refused(url, tmp_path):
    identity: CacheIdentity = load_identity(open_store(url))
    cache = Cache.open(url)
    cache.identity = replace(identity, teacher=replace(identity.teacher, dtype="float64"))
    with pytest.raises(InputError, match="the dtype 'float64', can score again in float32, float16, bfloat16"):
        rescore_samples(cache, 1)


def test_damage_comes_first(url, tmp_path, teacher, corpus, capsys):
    url = scored(teacher, corpus, tmp_path / "cache")
    path = Path(url, Cache.open(url).shards[0].objects[0].path)
    path.write_bytes(b"")
    assert main(["verify", url, "--rescore", "2"]) == 1
    assert "The teacher was not asked again" in capsys.readouterr().out
    assert main(["verify", url, "--rescore", "2", "--repair"]) == 0
    assert "its answers agree with the cache" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_extra_that_brings_it(url, monkeypatch, capsys):
    hook = EntryPoint("rescore", "no_such_package.rescore:rescore_samples", "logitcache.hooks")
    hooks, found = {"rescore": hook}, cli.find_entry_points
    monkeypatch.setattr(cli, "find_entry_points", lambda group: hooks if group == hook.group else found(group))
    assert main(["verify", url, "--rescore", "2"]) == 1
    err = capsys.readouterr().err
    assert "'no_such_package' is not installed" in err and 'pip install "logitcache[pipeline]"' in err
    hooks.clear()
    assert main(["verify", url, "--rescore", "2"]) == 1
    assert 'pip install "logitcache[pipeline]"' in capsys.readouterr().err


def test_the_check_alone_needs_no_torch(url):
    program = (
        f"import sys; from logitcache_storage.cli import main; main(['verify', {url!r}])\n"
        "print(sorted({'torch', 'ray', 'transformers', 'logitcache_pipeline'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
