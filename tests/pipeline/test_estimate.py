"""What a dry run says, against a cache that is built of the same corpus, and against a teacher of a known rate."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from logitcache_pipeline import estimate as estimate_module
from logitcache_pipeline.build import dry_run, remaining_tasks
from logitcache_pipeline.engines.base import ScoringRequest
from logitcache_pipeline.estimate import SampleDraw, measure_rate, render_estimate
from logitcache_pipeline.prepare import prepare, write_plan
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.worker import ScoringWorker, TeacherSettings
from logitcache_storage.commit import create_or_continue
from logitcache_storage.errors import InputError
from logitcache_storage.objects import open_store
from logitcache_storage.samples import SAMPLES_SCHEMA


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 12,000 target tokens in 300 answers."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    records = (
        {"question": f"{n}?", "answer": "ab c"[n % 4] * rng.randint(1, 30) + str(rng.random())} for n in range(300)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def settings(teacher: Path, long_corpus: Path, tmp_path: Path) -> BuildSettings:
    cache = str(tmp_path / "cache")
    return BuildSettings(str(teacher), (str(long_corpus),), cache, k=32, shard_rows=4096, dry_run=True)


@pytest.fixture(autouse=True)
def threads() -> Any:
    """A dry run takes a worker's share of the cores."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def built_bytes(settings: BuildSettings) -> tuple[int, int]:
    """Bytes and rows of a cache that is really made of these settings, without Ray."""
    store, prepared = open_store(settings.cache), prepare(settings)
    create_or_continue(store, prepared.identity("float32"))
    tasks = remaining_tasks(store, write_plan(store, prepared))
    worker = ScoringWorker(settings.cache, None, TeacherSettings("transformers", settings.teacher, "float32"))
    outcomes = [worker.score(task) or worker.commit(task.shard) for task in tasks]
    return sum(found.num_bytes for found in outcomes), sum(found.num_rows for found in outcomes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"format": "arrow", "precision": "fp16", "kept_mass": 0.9, "shard_rows": 1500},
        {"k": 0, "role": "reference", "shard_rows": 1500},
    ],
)
def test_bytes_are_those_of_the_cache_that_is_then_built(settings, changes):
    settings = replace(settings, **changes)
    found = dry_run(settings)
    assert not Path(settings.cache).exists()
    expected, num_rows = built_bytes(replace(settings, dry_run=False))
    assert found["report"]["rows"] == num_rows
    sizes = found["bytes"]
    assert 2000 <= sizes["sampled_target_tokens"] < num_rows / 3
    assert sizes["low"] < sizes["total"] < sizes["high"] < 1.2 * sizes["low"]
    # Beyond the sampling error: a longer shard compresses a little better than a short one.
    assert 0.97 * sizes["low"] <= expected <= 1.03 * sizes["high"]
    assert sizes["per_target_token"] == pytest.approx(sizes["total"] / num_rows, abs=1e-3)


def test_a_teacher_that_is_large_or_not_wanted_is_not_loaded(settings, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(estimate_module, "load_teacher", refuse)
    unasked = dry_run(replace(settings, sample_rows=0))
    monkeypatch.setattr(estimate_module, "MAX_WEIGHT_BYTES", 10)
    assert dry_run(settings) == unasked
    assert unasked["bytes"]["total"] is None
    # 32 ids of 2.5 bytes and 10 bytes beside them, at most.
    assert unasked["bytes"]["low"] < unasked["bytes"]["high"] == 90 * unasked["report"]["rows"]
    assert "typically between" in render_estimate(unasked)
    labels = dry_run(replace(settings, sample_rows=0, k=0, role="reference"))["bytes"]
    assert labels["low"] < labels["high"] <= 4.2 * unasked["report"]["rows"] + 1
    for asked in ({"sample_rows": 5}, {"calibrate": 0.1}):
        with pytest.raises(AssertionError, match="loaded"):
            dry_run(replace(settings, **asked))


def test_hours_and_cost_follow_from_the_rate(settings):
    settings = replace(settings, calibrate=0.2, workers=2, price_per_gpu_hour=2.5, gpus_per_worker=0.5)
    found = dry_run(settings)
    rate, run = found["rate"], found["run"]
    assert rate["seconds"] >= 0.2
    assert rate["tokens_per_second"] > rate["target_tokens_per_second"] > 0
    assert run["hours"] * 3600 == pytest.approx(found["report"]["rows"] / 2 / rate["target_tokens_per_second"])
    assert run["gpu_hours"] == pytest.approx(run["hours"] * 2 * 0.5)
    assert run["cost"] == pytest.approx(run["gpu_hours"] * 2.5)
    text = render_estimate(found)
    assert "with 2 workers like this one" in text
    assert "GPU-hours at 2.5" in text
    # More workers than shards do not help.
    many = estimate_module._run(replace(settings, workers=1000), _Summary(found), rate)
    assert many["hours"] * 3600 == pytest.approx(found["largest_shard_rows"] / rate["target_tokens_per_second"])


class _Summary:
    """The two figures of a plan that hours depend on."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.num_rows, self.shard_num_rows = found["report"]["rows"], (found["largest_shard_rows"],)


class SleepingTeacher:
    """Takes 50 microseconds a token, and half a second more the first time."""

    vocab_size, max_length = 10, None

    def __init__(self) -> None:
        self.num_calls = 0

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[Any]:
        self.num_calls += 1
        time.sleep(50e-6 * sum(len(request.input_ids) for request in requests) + 0.5 * (self.num_calls == 1))
        return []


def test_the_rate_is_measured_after_a_warm_up():
    requests = [ScoringRequest(np.arange(n, dtype=np.int32), np.arange(1, 5, dtype=np.int32)) for n in (5, 50, 30)]
    rate = measure_rate(SleepingTeacher(), requests, 3, 0.4)
    # With the first call in it, it would be 8,000 at most; a sleep never ends early.
    assert 10_000 < rate["tokens_per_second"] <= 20_000
    assert rate["target_tokens_per_second"] / rate["tokens_per_second"] == pytest.approx(12 / 85, rel=0.05)
    assert rate["seconds"] >= 0.4


def table(numbers: range) -> pa.Table:
    columns = {
        "key": pa.array([bytes(16)] * len(numbers), pa.binary(16)),
        "source_id": pa.array(["a"] * len(numbers)),
        "input_ids": pa.array([[n, n] for n in numbers], pa.list_(pa.int32())),
        "target_ranges": pa.array([[1, 2]] * len(numbers), pa.list_(pa.int32())),
    }
    zeros = pa.array([0] * len(numbers), pa.int32())
    return pa.Table.from_arrays([columns.get(name, zeros) for name in SAMPLES_SCHEMA.names], schema=SAMPLES_SCHEMA)


def test_every_sample_is_as_likely_to_be_drawn():
    tables, counts = [table(range(12)), table(range(12, 50))], Counter[int]()
    for seed in range(300):
        draw = SampleDraw(10, seed)
        for each in tables:
            draw.see(each)
        drawn = [int(request.input_ids[0]) for request in draw.requests()]
        assert len(set(drawn)) == 10
        counts.update(drawn)
    # Binomial(300, 0.2): mean 60, standard deviation 6.9; 50 samples within 4.5 of them.
    assert all(29 <= counts[n] <= 91 for n in range(50))


def test_a_small_corpus_is_drawn_as_a_whole():
    draw = SampleDraw(10)
    draw.see(table(range(4)))
    assert sorted(int(request.input_ids[1]) for request in draw.requests()) == [0, 1, 2, 3]
    assert draw.requests()[0].target_positions.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_run": False, "calibrate": 1.0}, "calibrate is for an estimate before the build"),
        ({"dry_run": False, "sample_rows": 5}, "sample_rows is for an estimate"),
        ({"calibrate": 0.0}, "calibrate must be above 0 seconds, got 0"),
        ({"calibrate": float("nan")}, "calibrate must be above 0 seconds, got nan"),
        ({"calibrate": 1.0, "price_per_gpu_hour": -1.0}, "price_per_gpu_hour must be at least 0"),
        ({"price_per_gpu_hour": 1.0}, "needs a measured rate; add --calibrate"),
        ({"calibrate": 1.0, "price_per_gpu_hour": 1.0, "gpus_per_worker": 0.0}, "workers have no GPU"),
        ({"sample_rows": -1}, "sample_rows must be at least 0, got -1"),
        ({"allow_quarantine": -1}, "allow_quarantine must be at least 0, got -1"),
        ({"log_format": "xml"}, "unknown log_format 'xml'; choose from text, json"),
    ],
)
def test_wrong_settings_are_refused(settings, changes, message):
    with pytest.raises(InputError, match=message):
        replace(settings, **changes)


def test_a_teacher_over_nodes_that_are_not_there_is_not_waited_for(settings, ray_address):
    spread = {"engine": "vllm", "tensor_parallel": 4, "nodes_per_worker": 2}
    settings = replace(settings, **spread, dry_run=True, ray_address=ray_address)
    assert dry_run(settings)["bytes"]["sampled_target_tokens"] == 0
    with pytest.raises(InputError, match="has no 2 nodes now with the 4 GPUs that --sample-rows and --calibrate ask"):
        dry_run(replace(settings, sample_rows=10))
