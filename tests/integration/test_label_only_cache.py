"""A cache without ids (k = 0): from the teacher through every tool to the student, against a cache of the same with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitcache_pipeline.build import remaining_tasks
from logitcache_pipeline.prepare import prepare, write_plan
from logitcache_pipeline.rescore import rescore_samples
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import write_teacher
from logitcache_pipeline.worker import ScoringWorker, TeacherSettings
from logitcache_storage import Cache
from logitcache_storage.cli import main
from logitcache_storage.commit import create_or_continue
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import InputError
from logitcache_storage.objects import open_store

NUM_RECORDS = 300


def scored(teacher: Path, corpus: Path, url: Path, **changes: object) -> str:
    """A whole cache, without Ray."""
    settings = BuildSettings(str(teacher), (str(corpus),), str(url), role="reference", shard_rows=4096, **changes)
    store, prepared = open_store(settings.cache), prepare(settings)
    create_or_continue(store, prepared.identity("float32"))
    plan = write_plan(store, prepared)
    worker = ScoringWorker(settings.cache, None, TeacherSettings("transformers", settings.teacher, "float32"))
    for task in remaining_tasks(store, plan):
        worker.score(task)
        worker.commit(task.shard)
    return settings.cache


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def caches(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same corpus by the same model: with 9 ids, and with none in either container."""
    folder = tmp_path_factory.mktemp("caches")
    corpus = folder / "train.jsonl"
    records = ({"prompt": f"{n}?", "response": " ".join(map(str, range(n % 30)))} for n in range(NUM_RECORDS))
    corpus.write_text("\n".join(map(json.dumps, records)))
    return {
        "full": scored(teacher, corpus, folder / "full", k=9),
        "zarr": scored(teacher, corpus, folder / "zarr", k=0),
        "arrow": scored(teacher, corpus, folder / "arrow", k=0, format="arrow", kept_mass=0.9, precision="fp32"),
    }


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_the_label_log_probs_are_those_of_a_cache_with_ids(caches, container):
    full, bare = Cache.open(caches["full"]), Cache.open(caches[container])
    assert len(full) == len(bare) > 0
    for expected, sample in zip(full, bare, strict=True):
        found = sample.topk
        assert (found.ids.shape, found.log_probs.shape) == ((len(sample.labels), 0),) * 2
        assert not found.num_kept.any() and not found.log_tail.any()
        # The same forward pass, whose logits are reduced in another order.
        assert np.abs(found.label_log_prob - expected.topk.label_log_prob).max() <= 2e-5


def test_a_target_token_takes_a_few_bytes(caches):
    rows = sum(record.num_rows for record in Cache.open(caches["zarr"]).shards.values())
    for container, at_most in (("zarr", 4.2), ("arrow", 4.5)):
        shards = Cache.open(caches[container]).shards.values()
        stored = [o.size for r in shards for o in r.objects if "statistics" not in o.path and "zarr.json" not in o.path]
        assert sum(stored) / rows <= at_most


def test_every_tool_reads_it(caches, tmp_path, capsys):
    def told(*words: str) -> dict:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    url = caches["zarr"]
    for command in (["verify", url, "--deep"], ["stats", url], ["inspect", url], ["inspect", url, "--sample", "5"]):
        capsys.readouterr()
        assert main(command) == 0
        assert "nan" not in capsys.readouterr().out
    stats = told("stats", url)
    expected = np.concatenate([sample.topk.label_log_prob for sample in Cache.open(url)]).mean()
    assert stats["total"]["label_log_prob"] == pytest.approx(expected, rel=1e-5)
    assert [stats["total"][name] for name in ("entropy", "kept_mass", "top_1_rate", "top_k_rate")] == [None] * 4
    assert stats["distributions"]["label_rank"] == {}
    row = told("inspect", url, "--sample", "5")["rows"][0]
    assert (row["label_rank"], row["top"], row["num_kept"]) == (None, [], 0)

    assert main(["copy", url, str(tmp_path / "copy")]) == 0
    assert main(["verify", str(tmp_path / "copy"), "--deep"]) == 0
    assert main(["export", url, "--to", "parquet", "--output", str(tmp_path / "export")]) == 0
    table = pq.read_table(tmp_path / "export")
    lengths = [len(sample.labels) for sample in Cache.open(url)]
    assert [len(row) for row in table.column("label_log_prob").to_pylist()] == lengths
    assert table.column("ids").to_pylist()[5] == [[]] * lengths[5]
    capsys.readouterr()
    assert main(["export", url, "--to", "axolotl", "--output", str(tmp_path / "none")]) == 2
    assert "keeps label log-probs only (k = 0)" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["full", "arrow"])
def test_a_comparison_is_of_labels_alone(caches, capsys, other):
    for urls in ([caches["zarr"], caches[other]], [caches[other], caches["zarr"]]):
        assert main(["compare", *urls]) == 0
        assert "one of the caches keeps no ids (k = 0)" in capsys.readouterr().out
        assert main(["compare", *urls, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["label_distance"] <= 2e-5
        assert [found[name] for name in ("kl_ab", "kl_ba", "js", "top_1_agreement", "top_k_overlap")] == [None] * 5
        assert found["histogram"] == [] and len(found["most_different"]) == 10
        distances = [sample["label_distance"] for sample in found["most_different"]]
        assert distances == sorted(distances, reverse=True)


def test_a_local_disk_keeps_it(caches, tmp_path):
    disk = DiskCache(str(tmp_path / "disk"), 10**8)
    cache = Cache.open(caches["zarr"], disk_cache=disk)
    for _ in range(2):  # fetched, then found
        assert cache.read_shard(0).equals(Cache.open(caches["zarr"]).read_shard(0))


def test_the_teacher_is_asked_again(caches, teacher, capsys):
    report = rescore_samples(Cache.open(caches["arrow"]), 20)
    assert report.agrees and report.label.largest <= 2e-5 and report.kept is report.top_1_agreement is None
    assert main(["verify", caches["zarr"], "--rescore", "5"]) == 0
    said = capsys.readouterr().out
    assert "its answers agree with the cache" in said and "label log-probs differ by" in said and "tails" not in said


def test_a_teacher_s_cache_needs_ids():
    with pytest.raises(InputError, match=r"k must be at least 1, got 0; .*psft, iw_sft.*--role reference"):
        BuildSettings("teacher", ("data",), "cache", k=0)
