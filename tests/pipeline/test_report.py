"""The report of a run: sums against hand counts, one entry behind the other, and bytes that are no report."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import replace

import pytest

from logitcache_pipeline.report import MAX_RUNS, RunReport, load_report, package_versions, save_report
from logitcache_pipeline.worker import ShardOutcome
from logitcache_storage.commit import REPORT_PATH
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.schema import ExcludedSample


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def outcome(shard: int, *, seconds: float = 0.0, scored: bool = True) -> ShardOutcome:
    return ShardOutcome(shard, 100 + shard, 1000, seconds, scored, num_tokens=300, store_seconds=0.25)


def new_report(**numbers: int) -> RunReport:
    return RunReport({"k": 9}, [{"host": "a", "gpus": 1.0}], **{"num_planned": 10, "num_left": 6, **numbers})


def test_samples_that_were_left_out_are_named():
    report = new_report()
    report.worker_started(0, "a:1")
    sample = ExcludedSample(7, 3, "ab" * 16, ("train.jsonl:4", "train.jsonl:9"), "it kills")
    report.committed(replace(outcome(5), excluded=(sample,)), 0)
    report.committed(replace(outcome(2, scored=False), excluded=(sample,)), 0)
    report.given_back()
    entry = json.loads(json.dumps(report.entry()))
    assert (entry["outcome"], entry["given_back"], entry["shards"]["quarantined"]) == ("quarantined", 1, 0)
    about = {"key": "ab" * 16, "source_ids": ["train.jsonl:4", "train.jsonl:9"], "reason": "it kills"}
    assert entry["quarantined_samples"] == [{"shard": shard, **about} for shard in (2, 5)]


def test_an_entry_adds_up():
    report = new_report()
    report.worker_started(0, "a:1")
    report.worker_started(1, "b:1")
    time.sleep(0.2)
    report.committed(replace(outcome(1, seconds=0.05), warnings=("smaller batches",)), 0)
    report.committed(outcome(2, seconds=0.1), 0)
    report.attempt_failed()
    report.worker_started(1, "b:2")
    report.committed(outcome(3, seconds=0.02), 1)
    report.committed(outcome(4, scored=False), 1)
    for _ in range(2):
        report.attempt_failed()
    report.quarantined(5, "it is bad")
    report.start_failed()
    entry = json.loads(json.dumps(report.entry()))
    assert entry["outcome"] == "quarantined"
    assert entry["shards"] == {
        "planned": 10,
        "committed_before": 4,
        "scored": 3,
        "committed_by_others": 1,
        "quarantined": 1,
    }
    assert (entry["target_tokens"], entry["tokens"], entry["bytes"]) == (306, 900, 3000)
    assert entry["rate"]["target_tokens_per_second"] == pytest.approx(306 / entry["seconds"], rel=0.01)
    assert (entry["failed_attempts"], entry["retries"], entry["failed_starts"]) == (3, 2, 1)
    assert entry["quarantine"] == {"5": "it is bad"}
    first, second = entry["workers"]
    assert (first["worker"], first["names"], first["shards"], first["target_tokens"]) == (0, ["a:1"], 2, 203)
    assert (second["names"], second["starts"], second["shards"]) == (["b:1", "b:2"], 2, 1)
    assert (first["busy_seconds"], first["store_seconds"]) == (0.15, 0.5)
    assert 0.2 <= first["seconds"] <= entry["seconds"] + 0.001
    assert first["utilisation"] == pytest.approx(0.15 / first["seconds"], abs=0.005)
    assert (first["warnings"], second["warnings"]) == (["smaller batches"], [])
    assert entry["settings"] == {"k": 9}
    assert entry["hardware"]["nodes"] == [{"host": "a", "gpus": 1.0}]
    assert entry["versions"]["ray"] == package_versions()["ray"]
    assert entry["started"] <= entry["ended"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, "complete"), (ValueError("no room\n here"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_how_a_run_ended(error, expected):
    entry = new_report().entry(error)
    assert entry["outcome"] == expected
    assert (
        entry.get("error") == {"complete": None, "failed": "no room here", "interrupted": "KeyboardInterrupt"}[expected]
    )


def test_the_size_of_an_entry_does_not_depend_on_the_number_of_shards():
    sizes = []
    for num_shards in (10, 10_000):
        report = new_report(num_planned=num_shards, num_left=num_shards)
        report.worker_started(0, "a:1")
        for shard in range(num_shards):
            report.committed(outcome(shard), 0)
        sizes.append(len(json.dumps(report.entry())))
    assert sizes[1] < sizes[0] + 100


def test_runs_stand_one_behind_the_other_and_the_oldest_go(store):
    assert load_report(store) == []
    for number in range(3):
        save_report(store, {"number": number})
    assert [run["number"] for run in load_report(store)] == [0, 1, 2]
    store.put(REPORT_PATH, json.dumps({"runs": [{"number": n} for n in range(MAX_RUNS)]}).encode())
    save_report(store, {"number": MAX_RUNS})
    assert [run["number"] for run in load_report(store)] == list(range(1, MAX_RUNS + 1))


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b'{"runs": 5}', b"null"])
def test_what_is_no_report_is_written_anew(store, data):
    store.put(REPORT_PATH, data)
    save_report(store, {"number": 1})
    assert load_report(store) == [{"number": 1}]
