"""The shell that manifests carry, run here in pieces: a schema sees no more than a string in it."""

from __future__ import annotations

import os
import re
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from deployed import manifests, one, site

from logitcache_pipeline.worker import ScoringWorker
from logitcache_storage.errors import InputError


def write_program(path: Path) -> None:
    """A program that writes its arguments down, one a line."""
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$LOG"\n')
    path.chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a shell whose ray and python only write down how they were called."""
    for name in ("ray", "python"):
        write_program(tmp_path / name)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}


@pytest.mark.parametrize("index", [0, 1, 10])
def test_the_first_pod_of_the_student_hosts_the_rendezvous_and_no_other(environment, index):
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.run import parse_args

    objects = manifests("aws")
    job = one(objects, "Job", "student")["spec"]
    container = job["template"]["spec"]["containers"][0]
    # What a rank refuses, no other try would change.
    on_exit = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert on_exit == [{"containerName": container["name"], "operator": "In", "values": [InputError.exit_status]}]
    # As Kubernetes does: a name that it does not know stays, brackets and all.
    known = site(objects)
    words = [
        re.sub(r"\$\(([^)]*)\)", lambda m: known.get(m[1], m[0]), word)
        for word in (*container["command"], *container["args"])
    ]
    subprocess.run(words, env={**environment, "JOB_COMPLETION_INDEX": str(index)}, check=True)
    called = Path(environment["LOG"]).read_text().splitlines()
    assert called[:2] == ["-m", "logitcache_train.launch"]
    args = parse_args(called[2:])
    assert (args.nnodes, args.module, args.training_script) == (known["NODES"], True, "logitcache_train")
    config = dict(pair.split("=") for pair in args.rdzv_conf.split(","))
    parameters = RendezvousParameters(args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id, 1, 2, **config)
    assert parameters.get_as_bool("is_host") is (index == 0)


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # Ray's own, of Pydantic
def test_before_its_end_a_worker_is_drained_and_waited_for_no_longer_than_it_is_there(environment):
    from ray.scripts.scripts import drain_node

    cluster = one(manifests("aws"), "RayJob", "build")["spec"]["rayClusterSpec"]
    pod = cluster["workerGroupSpecs"][0]["template"]["spec"]
    *shell, hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    # One that no other test has.
    name = f"{ScoringWorker.__name__}{uuid.uuid4().hex}"
    hook = re.sub(rf"\[r\]ay::{ScoringWorker.__name__}\b", f"[r]ay::{name}", hook)
    assert name in hook
    subprocess.run([*shell, hook], env=environment, check=True, timeout=10)
    called = Path(environment["LOG"]).read_text().splitlines()
    assert called[0] == "drain-node"
    drained = drain_node.make_context("drain-node", called[1:]).params
    assert drained["reason"] == "DRAIN_NODE_REASON_PREEMPTION" and drained["node_id"] is None
    assert drained["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]

    # Ray titles the process of an actor like this.
    with subprocess.Popen(["bash", "-c", f'exec -a "ray::{name}.score" sleep 60']) as worker:
        waiting = subprocess.Popen([*shell, hook], env=environment, stdout=subprocess.DEVNULL)
        time.sleep(1.5)
        assert waiting.poll() is None
        worker.terminate()
    assert waiting.wait(10) == 0
