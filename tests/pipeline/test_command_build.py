"""`logitcache build` as it is typed: options from the line and from a file, exit status, what is said."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from logitcache_pipeline.commands.build import COMMAND
from logitcache_pipeline.settings import BuildSettings
from logitcache_storage import Cache
from logitcache_storage.cli import main
from logitcache_storage.commands.arguments import storage_options
from logitcache_storage.commit import commit_path
from logitcache_storage.errors import InputError
from logitcache_storage.record_json import parse
from logitcache_storage.verify import verify_cache

GIVEN = ["--teacher", "t", "--data", "c.jsonl", "--cache", "c"]
"""What must be given, of nothing that is there."""


@pytest.fixture
def line(teacher: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """A complete command line, into a cache of its own."""
    cache = str(tmp_path / "cache")
    return ["build", "--teacher", str(teacher), "--data", str(corpus), "--cache", cache, "--k", "9"]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run a command that must fail; returns what it said."""
    assert main(argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_every_setting_has_an_option_with_help():
    parser = ArgumentParser()
    COMMAND.add_arguments(parser)
    options = {action.dest: action for action in parser._actions}
    names = {f.name for f in fields(BuildSettings)}
    assert names | {"config", "storage_options", "data_storage_options", "json", "help"} == options.keys()
    assert all(action.help for action in options.values())
    assert vars(parser.parse_args([])) == {}


def test_every_option_is_taken():
    """Each alone, with a value of its kind; some do not go without others, which is refused by a sentence."""
    parser = ArgumentParser()
    COMMAND.add_arguments(parser)
    values = {int: "3", float: "0.5", None: "x", storage_options: '{"max_model_len": 64}'}
    for action in (a for a in parser._actions if a.dest in {f.name for f in fields(BuildSettings)}):
        value = [] if action.nargs == 0 else [action.choices[-1] if action.choices else values[action.type]]
        found = vars(parser.parse_args([*GIVEN, action.option_strings[0], *value]))
        try:
            settings = parse(BuildSettings, found, where="arguments")
        except InputError as e:
            assert "expected" not in str(e)
        else:
            assert getattr(settings, action.dest) not in ([], "", None)


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys; from logitcache_storage.cli import main; main(['build', '--help'])\n"
        "print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "--ray-address" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_build_from_a_file_where_the_line_wins(teacher, corpus, ray_address, tmp_path, monkeypatch, capsys):
    """With relative paths, which mean the driver's folder: Ray's workers run in another."""
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(teacher)
    Path("train.jsonl").symlink_to(corpus)
    Path("build.yaml").write_text(
        "teacher: teacher\ndata: train.jsonl\ncache: elsewhere\nk: 5\nformat: arrow\nshard-rows: 64\nkept_mass: 1\n"
        f"ray-address: '{ray_address}'\nstorage-options: {{}}\n"
    )
    assert main(["build", "--config", "build.yaml", "--cache", "cache", "--k", "7"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "complete: 14 samples" in captured.err
    identity = Cache.open(str(tmp_path / "cache")).identity
    assert (identity.k, identity.container, identity.shard_rows, identity.kept_mass) == (7, "arrow", 64, 1.0)
    assert verify_cache("cache", deep=True).is_intact
    assert not Path("elsewhere").exists()


def test_quarantine_is_exit_status_1(line, ray_address, capsys):
    (Path(line[6]) / commit_path(0)).mkdir(parents=True)
    said = fails([*line, "--ray-address", ray_address, "--max-attempts", "1"], capsys, status=1)
    assert "scoring: shard 0, attempt 1 failed: " in said
    assert "scoring: shard 0 is quarantined after 1 attempt" in said
    assert "logitcache build: 1 of 1 shard" in said and "(14 samples) could not be scored" in said
    assert f"'logitcache status {line[6]}'" in said


def test_as_many_shards_may_be_lost_as_is_allowed(line, ray_address, capsys):
    """Of a few shards one cannot be committed; every line of the build is a JSON object."""
    (Path(line[6]) / commit_path(1)).mkdir(parents=True)
    line += ["--ray-address", ray_address, "--max-attempts", "1", "--shard-rows", "128", "--log-format", "json"]
    assert main([*line, "--allow-quarantine", "1"]) == 0
    events = json_lines(capsys)
    assert {"plan", "worker_started", "attempt_failed", "shard_quarantined", "run_ended"} <= events.keys()
    assert events["attempt_failed"]["level"] == "warning"
    assert (events["shard_quarantined"]["shard"], events["run_ended"]["run"]["outcome"]) == (1, "quarantined")
    assert list(events["done_with_losses"]["lost"]) == ["1"]
    assert "shard 1 (1 sample: " in events["done_with_losses"]["message"]
    assert not Cache.open(line[6]).is_complete


def test_an_error_is_a_json_object_too(line, capsys):
    assert main([*line, "--log-format", "json", "--k", "1000"]) == 2
    assert json_lines(capsys)["failed"]["exit_status"] == 2


def json_lines(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """Everything that was said, by event, the last of each; none of it anything else than JSON."""
    captured = capsys.readouterr()
    assert captured.out == ""
    events = [json.loads(text) for text in captured.err.splitlines()]
    assert all({"time", "level", "event", "message"} <= event.keys() for event in events)
    return {event["event"]: event for event in events}


def test_dry_run(line, capsys):
    assert main([*line, "--dry-run", "--workers", "3", "--calibrate", "0.1", "--price-per-gpu-hour", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for expected in (
        "16 records, 14 samples",
        "targets per sample: ",
        "bytes per target token",
        "tokens/s in float32 on",
    ):
        assert expected in captured.err
    assert "with 3 workers like this one, 0.00 GPU-hours at 2: " in captured.err
    assert captured.err.endswith("nothing was written\n")
    assert not Path(line[6]).exists()


def test_dry_run_for_scripts(line, capsys):
    assert main([*line, "--dry-run", "--json", "--sample-rows", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["report"]["samples"], found["bytes"]["total"], found["rate"]) == (1, 14, None, None)
    assert not Path(line[6]).exists()
    assert "--json prints the estimate of --dry-run" in fails([*line, "--json"], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing --teacher, --data, --cache; give it here or in a --config file"),
        (["--data", "c.jsonl", "--cache", "c"], "missing --teacher; give"),
        ([*GIVEN, "--k", "0"], "k must be at least 1, got 0; 0 keeps the label's log-prob alone"),
        ([*GIVEN, "--k", "-1", "--role", "reference"], "k must be at least 1, got -1"),
        ([*GIVEN, "--engine", "vllm", "--compile"], "the engine vllm compiles by itself; leave compile out"),
        (
            [*GIVEN, "--engine", "vllm", "--tensor-parallel", "4", "--gpus-per-worker", "1"],
            "a worker needs 4 GPUs for tensor_parallel 4; leave --gpus-per-worker out",
        ),
        ([*GIVEN, "--engine", "x"], "unknown engine 'x'; choose from"),
        ([*GIVEN, "--kept-mass", "0"], "kept_mass must be above 0"),
        (["--config", "missing.yaml"], "missing.yaml: not a readable YAML file"),
        (["--k", "many"], "argument --k: invalid int value: 'many'"),
        (["--storage-options", "x"], "argument --storage-options: not JSON"),
        (["--overlong", "keep"], "invalid choice: 'keep'"),
    ],
)
def test_wrong_arguments_are_exit_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(["build", *argv], capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kk: 3", "unknown field 'kk'"),
        ("k: '64'", "k: expected int, found '64'"),
        ("data: 5", "data: expected a list, found int"),
        ("data: [5]", "data[0]: expected str, found 5"),
        ("dry_run: 1", "dry_run: expected bool, found 1"),
        ("format: zip", "unknown format 'zip'; choose from zarr, arrow"),
        ("storage_options: 5", "storage_options: expected a mapping, found int"),
        ("- k", "expected options such as 'k: 64', found list"),
        ("k: [", "not a readable YAML file"),
        ("teacher:", "missing --teacher"),
    ],
)
def test_a_wrong_file_is_exit_status_2_and_names_what_is_wrong(text, message, capsys, tmp_path):
    config = tmp_path / "build.yaml"
    config.write_text(text)
    given = {"teacher": "t", "data": "c.jsonl", "cache": "c"}
    argv = [word for name, value in given.items() if name not in text for word in (f"--{name}", value)]
    said = fails(["build", "--config", str(config), *argv], capsys)
    assert message in said
    assert said.startswith("logitcache build: ")


def test_an_unreachable_cluster_is_exit_status_2_at_once(line, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    said = fails([*line, "--ray-address", address], capsys)
    assert time.monotonic() - start < 10
    assert said.count("\n") == 1
    assert f"logitcache build: no Ray cluster at '{address}'" in said
    assert not Path(line[6]).exists()


def test_files_that_are_not_there(line, capsys):
    assert "missing.jsonl: no such file" in fails([*line, "--data", "missing.jsonl"], capsys)
    assert "./missing" in fails([*line, "--teacher", "./missing"], capsys)
