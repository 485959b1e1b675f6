"""`logitcache status` on unfinished, complete and troubled builds."""

import dataclasses
import json

import pytest

from logitcache_storage.cli import main
from logitcache_storage.commit import create_or_continue, load_commits, quarantine_shard
from logitcache_storage.objects import open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.record_json import dump_record
from logitcache_storage.status import build_status, busy_seconds
from logitcache_storage.testing import make_identity, make_samples, write_cache


@pytest.fixture
def build(tmp_path):
    def write(commit_shards=None, name="cache"):
        samples, topks = make_samples(40, 6, 30)
        url = str(tmp_path / name)
        write_cache(
            url,
            samples,
            topks,
            identity=make_identity(k=6, vocab_size=30, shard_rows=50),
            commit_shards=commit_shards,
        )
        return url

    return write


def status_of(url, capsys, expected=0):
    assert main(["status", url, "--json"]) == expected
    return json.loads(capsys.readouterr().out)


def record_at(record, created, seconds):
    return dataclasses.replace(record, created=created, seconds=seconds)


def test_a_complete_build(build, capsys):
    url = build()
    plan = load_plan(open_store(url))
    found = status_of(url, capsys)
    assert found["complete"] and found["quarantine"] == []
    for name in ("shards", "rows", "samples"):
        assert found["committed"][name] == found["planned"][name]
    assert found["planned"]["rows"] == sum(plan.shard_num_rows)
    assert found["bytes_per_row"] == found["committed"]["bytes"] / found["committed"]["rows"]
    assert main(["status", url]) == 0
    assert "build        complete" in capsys.readouterr().out


def test_an_unfinished_build_counts_what_is_committed(build, capsys):
    url = build(commit_shards=2)
    store = open_store(url)
    found = status_of(url, capsys)
    rows = sum(load_plan(store).shard_num_rows[:2])
    assert not found["complete"]
    assert (found["committed"]["shards"], found["committed"]["rows"]) == (2, rows)
    assert 0 < found["committed"]["samples"] < 40
    assert main(["status", url]) == 0
    out = capsys.readouterr().out
    assert "unfinished" in out and f"{rows:,} of {load_plan(store).num_rows:,}" in out


def test_a_build_without_a_plan_yet(tmp_path, capsys):
    url = str(tmp_path)
    create_or_continue(open_store(url), make_identity())
    found = status_of(url, capsys)
    assert found["planned"] is None and not found["complete"] and found["committed"]["shards"] == 0
    assert main(["status", url]) == 0
    assert "has not written its plan yet" in capsys.readouterr().out


def test_quarantine_is_listed_and_is_status_one(build, capsys):
    url = build(commit_shards=2)
    quarantine_shard(open_store(url), 3, ["worker lost", "RuntimeError: \x1b[31mno memory [red]"])
    found = status_of(url, capsys, expected=1)
    assert [(q["shard"], q["attempts"]) for q in found["quarantine"]] == [(3, 2)]
    assert found["quarantine"][0]["reasons"][0] == "worker lost"
    assert main(["status", url]) == 1
    out = capsys.readouterr().out
    assert r"2 attempts, the last: RuntimeError: \x1b[31mno memory [red]" in out and "\x1b" not in out


def test_the_rate_leaves_pauses_out_and_counts_overlap_once(build):
    record = load_commits(open_store(build())).get(0)
    at = [
        ("2026-01-01T10:00:10+00:00", 10.0),  # 0 to 10
        ("2026-01-01T10:00:15+00:00", 10.0),  # 5 to 15, another worker
        ("2026-01-01T10:00:12+00:00", 2.0),  # inside both
        ("2026-01-02T12:00:04+02:00", 4.0),  # a day later, in another time zone
    ]
    assert busy_seconds(record_at(record, *times) for times in at) == pytest.approx(15 + 4)
    assert busy_seconds([]) == 0


def test_time_left_follows_from_the_rate(build):
    store = open_store(build(commit_shards=2))
    for shard, record in load_commits(store).items():
        store.put(f"commits/{shard:05d}.json", dump_record(record_at(record, "2026-01-01T10:00:10+00:00", 5.0)))
    status = build_status(store)
    assert status.rows_per_second == pytest.approx(status.num_rows / 5)
    assert status.seconds_left == pytest.approx((status.plan.num_rows - status.num_rows) / (status.num_rows / 5))


def test_what_the_plan_reported_is_shown_without_its_zeros(build, capsys):
    url = build()
    store = open_store(url)
    report = {
        "records": 1041,
        "overlong": 3,
        "empty": 0,
        "tokens_per_sample": {"p50": 10, "max": 20},
        "examples": {"overlong": ["train.jsonl:7", "\x1b[2J:9"]},
    }
    store.put("plans/00000.json", dump_record(dataclasses.replace(load_plan(store), report=report)))
    assert main(["status", url]) == 0
    out = capsys.readouterr().out
    assert "1,041" in out and r"3 (e.g. train.jsonl:7, \x1b[2J:9)" in out and "p50 10, max 20" in out
    assert "empty" not in out and "\x1b" not in out


def test_no_cache_is_a_wrong_argument(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert "logitcache status: no cache at" in capsys.readouterr().err


def test_storage_options_must_be_a_json_object_and_are_not_repeated(capsys):
    for wrong in ('{"secret": "hunter2"', '["hunter2"]'):
        assert main(["status", "memory://x", "--storage-options", wrong]) == 2
        err = capsys.readouterr().err
        assert "JSON" in err and "hunter2" not in err


def test_storage_options_reach_the_file_system(tmp_path, build, capsys):
    build(name="cache")
    options = json.dumps({"target_protocol": "file", "cache_storage": str(tmp_path / "copies")})
    assert main(["status", f"simplecache://{tmp_path / 'cache'}", "--storage-options", options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
