"""Builds on a Ray cluster of several raylets, any of which may go: nothing is lost but what is reported."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from logitcache_pipeline.engines.base import ScoringRequest, load_teacher
from logitcache_pipeline.testing import write_teacher
from logitcache_storage import Cache
from logitcache_storage.cli import main
from logitcache_storage.commit import load_commits
from logitcache_storage.objects import open_store
from logitcache_storage.verify import verify_cache

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(600)]

# Read when ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

SCRIPT = Path(__file__).with_name("faulty_build.py")
K = 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A raylet for the drivers and two for workers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@dataclass
class Job:
    """A corpus of which every record says in its prompt what happens to it, and drivers that build a cache of it."""

    folder: Path
    teacher: Path
    address: str
    url: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the store, as the test reaches it."""
    options_of_drivers: dict[str, Any] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def write_corpus(self, faults: dict[int, str], num_records: int) -> None:
        """`faults` says what happens to records; each shard has four of them, and the longest are without a fault."""
        records = (
            {"prompt": f"r{n} {faults.get(n, 'is all right')}.", "response": f"answer {n:03d}"}
            for n in range(num_records)
        )
        (self.folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """A driver beside this process; `log` has what it says."""
        words = ["build", "--teacher", str(self.teacher), "--data", str(self.folder / "train.jsonl")]
        words += ["--cache", self.url, "--k", str(K), "--precision", "fp32", "--shard-rows", "48"]
        words += ["--ray-address", self.address, "--workers", "2", "--max-attempts", "2"]
        if self.options_of_drivers:
            words += ["--storage-options", json.dumps(self.options_of_drivers)]
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, str(SCRIPT), str(self.folder), *words, *more]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        return self.processes[-1]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def num_commits(self) -> int:
        return len(open_store(self.url, self.options).list("commits"))

    def status(self, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
        words = ["status", self.url, "--json"]
        code = main(words + (["--storage-options", json.dumps(self.options)] if self.options else []))
        return code, json.loads(capsys.readouterr().out)

    def check_batches(self) -> list[int]:
        """A batch did not fit into memory and was halved; returns the tokens of all batches."""
        sizes = [int(size) for size in (self.folder / "batches").read_text().split()]
        most = script().MOST_TOKENS
        assert sizes[0] > most and sizes[0] // 2 == max(size for size in sizes if size <= most), sizes
        return sizes

    def check_all_but(self, lost: set[int], num_records: int, eating: Collection[int] = ()) -> None:
        """Every other sample is in the cache, and has just the rows that the teacher gives it."""
        assert verify_cache(self.url, deep=True, storage_options=self.options).is_intact
        cache = Cache.open(self.url, self.options)
        there = [int(sample.source_id.rpartition(":")[2]) - 1 for sample in cache]
        assert there == [n for n in range(num_records) if n not in lost]
        engine = load_teacher("transformers", str(self.teacher), "float32", "cpu") if eating else None
        for n, sample in zip(there, cache, strict=True):
            if engine is None or n not in eating:
                assert sample.topk.equals(script().rows_of(sample.input_ids, sample.target_positions, K))
                continue
            (alone,) = engine.score([ScoringRequest(sample.input_ids, sample.target_positions)], K)
            # Logits up to 8 in float32, through two layers of batches of another shape.
            np.testing.assert_allclose(sample.topk.log_probs, alone.log_probs, atol=2e-5)
            np.testing.assert_allclose(sample.topk.label_log_prob, alone.label_log_prob, atol=2e-5)


def script() -> Any:
    """What stands beside the tests and in no package."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.pop(0)


@pytest.fixture
def new_job(cluster: Any, teacher: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes the job of the test; whatever is left of it is killed afterwards."""
    jobs: list[Job] = []

    def new(url: str = "", **options: Any) -> Job:
        jobs.append(Job(tmp_path, teacher, str(cluster.address), url or str(tmp_path / "cache"), **options))
        return jobs[-1]

    yield new
    for process in (process for job in jobs for process in job.processes):
        process.kill()
        process.wait()


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def workers() -> list[psutil.Process]:
    """Actors of this machine that have this teacher."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::SufferingWorker"):
                found.append(process)
    return found


def test_bad_samples_are_left_out_and_tried_again(new_job, capsys, count_fault):
    """One raises, one kills, one hangs, and one whole shard raises; then the cause of all but one is mended."""
    job = new_job()
    job.write_corpus({1: "raises", 6: "kills", 11: "hangs", **dict.fromkeys(range(12, 16), "raises")}, 20)
    assert job.start("--shard-deadline", "4").wait(300) == 1, job.log
    lost = {1, 6, 11, *range(12, 16)}
    job.check_all_but(lost, 20)
    closing = job.log[job.log.index("could not be scored") - 60 :]
    assert "1 of 5 shards (4 samples) and 3 samples could not be scored; all others are committed" in closing
    assert re.search(
        r"shard 3 \(4 samples: train.jsonl:13, .*, \.\.\.\): .*RuntimeError: r1\d is bad .* fail alone", closing
    )
    for number, reason in ((2, "RuntimeError: r1 is bad"), (7, "its worker died"), (12, "no answer within 4 s")):
        assert re.search(rf"sample train.jsonl:{number} \(key [0-9a-f]{{32}}, shard \d\): {reason}", closing)
    code, status = job.status(capsys)
    assert (code, status["complete"], status["lost_samples"]) == (1, False, 7)
    assert [s["source_id"] for s in status["quarantined_samples"]] == [f"train.jsonl:{n + 1}" for n in (1, 6, 11)]
    assert [(q["shard"], q["samples"]) for q in status["quarantine"]] == [(3, 4)]
    (run,) = json.loads(open_store(job.url).get("report.json"))["runs"]
    assert run["outcome"] == "quarantined" and len(run["quarantined_samples"]) == 3

    before = load_commits(open_store(job.url))
    (job.folder / "mended").write_text(" ".join(f"r{n}" for n in lost - {1}))
    more = ("--shard-deadline", "4", "--retry-quarantine", "--allow-quarantine", "1")
    assert job.start(*more).wait(300) == 0, job.log
    job.check_all_but({1}, 20)
    assert load_commits(open_store(job.url))[4] == before[4]
    assert "train.jsonl:2 " in job.log.rpartition("1 sample could not be scored")[2]
    count_fault("samples that raise, kill or hang")


def test_a_store_that_is_away_for_half_a_minute_and_a_worker_told_to_stop(new_job, faulty_s3, capsys, count_fault):
    """Neither costs a shard an attempt."""
    job = new_job(faulty_s3.url, options=faulty_s3.options, options_of_drivers=faulty_s3.options_through_proxy)
    job.write_corpus({0: "waits", 8: "waits"}, 16)
    driver = job.start()
    wait_until("two shards that wait", lambda: (job.folder / "r0").exists() and (job.folder / "r8").exists())
    pid = int((job.folder / "r0").read_text().split()[0])
    os.kill(pid, signal.SIGTERM)
    wait_until("another worker in its place", lambda: len((job.folder / "r0").read_text().split()) > 1)
    faulty_s3.proxy.faults = faulty_s3.faults(refuse=1.0)
    (job.folder / "go").touch()
    time.sleep(30)
    assert driver.poll() is None, job.log
    faulty_s3.proxy.faults = faulty_s3.faults()
    assert driver.wait(300) == 0, job.log
    job.check_all_but(set(), 16)
    assert "waiting for the store, which costs no shard an attempt" in job.log
    assert (
        "worker 0 is replaced: told to stop (SIGTERM)" in job.log.replace("worker 1", "worker 0")
        and "attempt 1 failed" not in job.log
    )
    (run,) = json.loads(open_store(job.url, job.options).get("report.json"))["runs"]
    assert (run["failed_attempts"], run["given_back"]) == (0, 1)
    assert job.status(capsys)[0] == 0
    count_fault("a store away for 30 s")
    count_fault("workers told to stop")


def test_a_batch_that_does_not_fit_into_memory_is_halved(new_job, count_fault):
    """The allocator says no; the worker goes on with smaller batches, which costs no attempt and changes no row."""
    job = new_job()
    job.write_corpus(dict.fromkeys(range(8), "eats"), 8)
    assert job.start("--workers", "1").wait(300) == 0, job.log
    (run,) = json.loads(open_store(job.url).get("report.json"))["runs"]
    assert (run["outcome"], run["failed_attempts"]) == ("complete", 0)
    job.check_all_but(set(), 8, eating=range(8))
    sizes = job.check_batches()
    assert max(sizes[1:]) < sizes[0]
    (warning,) = run["workers"][0]["warnings"]
    assert warning.startswith(f"a batch of {sizes[0]} tokens does not fit into the memory of cpu; batches have at most")
    assert f"worker 0 ({run['workers'][0]['names'][0]}): {warning}" in job.log
    count_fault("batches that do not fit into memory")


def test_everything_at_once(new_job, cluster, faulty_s3, capsys, count_fault):
    """Two drivers, of which one is killed; a raylet goes, a worker is killed, the store is away; bad samples; too large
    a batch."""
    job = new_job(faulty_s3.url, options=faulty_s3.options, options_of_drivers=faulty_s3.options_through_proxy)
    faults = {2: "raises", 5: "kills", 10: "hangs", 13: "kills once"}
    eating = range(16, 20)
    job.write_corpus({**faults, **dict.fromkeys(eating, "eats"), **dict.fromkeys(range(24, 28), "raises")}, 28)
    lost = {2, 5, 10, *range(24, 28)}
    # Longer than the store stays away, which a worker finds out before it scores.
    drivers = [job.start("--shard-deadline", "10") for _ in range(2)]
    wait_until("the first commit", lambda: job.num_commits() >= 1)
    drivers[0].kill()
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    for process in workers()[:1]:
        process.kill()
    faulty_s3.proxy.faults = faulty_s3.faults(refuse=0.9, reset=0.3)
    time.sleep(8)
    faulty_s3.proxy.faults = faulty_s3.faults(refuse=0.05, reset=0.02)
    assert drivers[1].wait(400) == 1, job.log
    job.check_all_but(lost, 28, eating)
    job.check_batches()
    code, status = job.status(capsys)
    assert (code, status["lost_samples"]) == (1, len(lost))
    found = {s["source_id"] for s in status["quarantined_samples"]}
    assert found == {f"train.jsonl:{n + 1}" for n in (2, 5, 10)}
    assert [q["samples"] for q in status["quarantine"]] == [4]
    closing = job.log[job.log.index("all others are committed") :]
    assert all(name in closing for name in (*found, *(f"train.jsonl:{n}" for n in (25, 26, 27))))
    count_fault("everything at once")
