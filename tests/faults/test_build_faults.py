"""A build that is killed and started again: nothing is lost, nothing scored twice, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from logitcache_pipeline.testing import write_teacher
from logitcache_storage import Cache
from logitcache_storage.commit import load_commits
from logitcache_storage.objects import open_store
from logitcache_storage.verify import verify_cache

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(180)]

LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""What a killed Ray leaves for up to a minute: two agents that report to nobody, then end by themselves."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def command(teacher: Path, tmp_path: Path) -> list[str]:
    """A build of more than a hundred shards, and a few seconds of scoring."""
    corpus = tmp_path / "train.jsonl"
    records = ({"prompt": f"count to {n}", "response": " ".join(map(str, range(n % 40)))} for n in range(400))
    corpus.write_text("\n".join(map(json.dumps, records)))
    words = ["build", "--teacher", str(teacher), "--data", str(corpus), "--cache", str(tmp_path / "cache")]
    return [sys.executable, "-m", "logitcache_storage.cli", *words, "--k", "4", "--shard-rows", "150"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[bytes]]]:
    """Start a command; whatever is left of it is killed after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start_command(command: list[str]) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            # Ray as a user has it: a test that ran before may have set its own.
            clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=clean, preexec_fn=heed_interrupts))
        return processes[-1]

    yield start_command
    for process in processes:
        process.kill()
        process.wait()


def heed_interrupts() -> None:
    """As at a terminal: what a shell starts in the background ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def commits(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("commits/*.json")}


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def left_running(processes: list[psutil.Process]) -> list[str]:
    """Command lines of those that still run, but for `LINGERING`."""
    titles = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # and its kind: zombies
            titles.append(" ".join(process.cmdline()))
    return [title for title in titles if title and not title.startswith(LINGERING)]


def test_killed_drivers_and_workers_lose_nothing(command, start, tmp_path):
    cache = tmp_path / "cache"
    driver = start(command)
    wait_until("the first commits", lambda: len(commits(cache)) >= 5)
    family = psutil.Process(driver.pid).children(recursive=True)
    # The cluster listens on every interface of the machine, so it must ask for a token that nobody else knows.
    servers = [process.environ() for process in family if process.name() == "gcs_server"]
    assert [(e["RAY_AUTH_MODE"], len(e["RAY_AUTH_TOKEN"])) for e in servers] == [("token", 64)]
    driver.kill()
    wait_until("the end of Ray", lambda: not left_running(family), 20)
    committed_before = commits(cache)
    plan_before = (cache / "plans" / "00000.json").read_bytes()

    driver = start([*command, "--workers", "2"])
    wait_until("further commits", lambda: len(commits(cache)) >= len(committed_before) + 5)
    newest = max(commits(cache).items() - committed_before.items())
    worker = int(json.loads(newest[1])["worker"].rsplit(":", 1)[1])
    assert worker != driver.pid
    os.kill(worker, signal.SIGKILL)
    assert driver.wait(90) == 0, (tmp_path / "log").read_text()

    after = commits(cache)
    assert 5 <= len(committed_before) < len(after)
    assert {name: after[name] for name in committed_before} == committed_before
    assert (cache / "plans" / "00000.json").read_bytes() == plan_before
    log = (tmp_path / "log").read_text()
    assert f"continuing: {len(committed_before)} of {len(after)} shards are committed" in log
    assert "its worker died or cannot be reached" in log
    assert Cache.open(str(cache)).is_complete
    assert verify_cache(str(cache), deep=True).is_intact
    workers = {record.worker for record in load_commits(open_store(str(cache))).values()}
    assert len(workers) >= 3


def test_an_interrupted_build_ends_at_once_and_cleanly(command, start, tmp_path):
    driver = start(command)
    wait_until("the first commits", lambda: len(commits(tmp_path / "cache")) >= 5)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(20) == 130
    wait_until("the end of Ray", lambda: not left_running(family), 20)
    assert (tmp_path / "log").read_text().endswith("logitcache build: interrupted\n")
    assert verify_cache(str(tmp_path / "cache"), deep=True).is_intact


def test_two_builds_at_once_with_a_reader_beside_them(command, start, tmp_path, count_fault):
    """One cache comes of it, each shard once; the reader sees whole shards, ever more, and never another row."""
    cache, corpus = tmp_path / "cache", tmp_path / "train.jsonl"
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:120]))
    builds = [start(command), start(command)]
    wait_until("the plan", lambda: (cache / "plans" / "00000.json").exists())
    seen: dict[str, bytes] = {}
    num_visible = []
    while any(build.poll() is None for build in builds) or len(num_visible) < 2:
        opened = Cache.open(str(cache))
        num_visible.append(len(opened))
        for shard in list(opened.shards)[-3:]:
            assert len(opened.read_shard(shard)) == opened.plan.shard_num_rows[shard]
        for sample in opened.read(range(0, len(opened), 17)):
            rows = sample.topk.ids.tobytes() + sample.topk.log_probs.tobytes()
            assert seen.setdefault(sample.source_id, rows) == rows
        time.sleep(0.05)
    assert [build.wait(60) for build in builds] == [0, 0], (tmp_path / "log").read_text()
    assert num_visible == sorted(num_visible) and len(set(num_visible)) > 2
    assert Cache.open(str(cache)).is_complete
    report = verify_cache(str(cache), deep=True)
    assert report.is_intact and report.num_shards == report.num_planned_shards > 10
    assert len(list(cache.glob("plans/*.json"))) == 1
    count_fault("two builds on one cache, with a reader beside them")
