"""Workers that span nodes, on a Ray cluster of several raylets: each has a placement group, and none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.core.generated import autoscaler_pb2

from logitcache_pipeline.cluster import ray_cluster
from logitcache_pipeline.run import RunSettings, run_shards
from logitcache_pipeline.worker import ShardOutcome, ShardTask, WorkerInfo, _ray_nodes

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(120)]

DRIVER = """
import sys
from logitcache_pipeline.cluster import ray_cluster
with ray_cluster(sys.argv[1], 1, 2.0, 2) as cluster:
    make_worker = cluster.actor_maker(type("Idle", (), {"answer": lambda self: 42}))
    import ray
    print(ray.get(make_worker().answer.remote()), flush=True)
    sys.stdin.read()
"""
"""A build that has a worker over two nodes, until it is killed."""


class SpanningWorker:
    """Starts one actor for each GPU of its group, as vLLM does; dies at the first attempt at shard 1, waits at 2."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self) -> WorkerInfo:
        class Rank:
            def node(self) -> str:
                return str(ray.get_runtime_context().get_node_id())

        group = ray.util.get_current_placement_group()
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        self._ranks = [
            ray.remote(Rank).options(num_cpus=0, num_gpus=1, scheduling_strategy=place(group, i)).remote()
            for i in range(len(group.bundle_specs))
        ]
        here, there = ray.get([rank.node.remote() for rank in self._ranks])
        assert _ray_nodes() == [here, there] and here != there
        return WorkerInfo(f"{os.getpid()} {there}", here, (there,))

    def score(self, task: ShardTask) -> None:
        if task.shard == 1 and not (self._folder / "died").exists():
            (self._folder / "died").touch()
            os._exit(1)
        if task.shard == 2:
            (self._folder / "waits").touch()
            while not (self._folder / "go").exists():
                time.sleep(0.05)

    def commit(self, shard: int) -> ShardOutcome:
        return ShardOutcome(shard, 10, 1, 0.0, scored=True)


class Events:
    """What the driver's loop says."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.shards: list[int] = []
        self.leaving: list[str] = []

    def worker_started(self, worker: int, name: str) -> None:
        self.names.append(name)

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        self.shards.append(outcome.shard)

    def worker_leaves(self, worker: int, reason: str) -> None:
        self.leaving.append(reason)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A Ray cluster of a head without anything to work with, and a node of one GPU, as Ray believes."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=1)
    yield cluster
    cluster.shutdown()


def group_states() -> list[str]:
    return [group["state"] for group in ray.util.placement_group_table().values()]


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def drain(cluster: Any, node: str) -> None:
    deadline = time.time_ns() // 10**6 + 60_000
    gcs, reason = ray._raylet.GcsClient(address=cluster.address), autoscaler_pb2.DrainNodeReason
    preempted = reason.Value("DRAIN_NODE_REASON_PREEMPTION")
    assert gcs.drain_node(node, preempted, "the spot instance is wanted back", deadline)[0]


def test_a_worker_over_two_nodes_waits_for_both_and_leaves_no_group_behind(nodes, tmp_path):
    """Its process dies, then the node is drained that only a part of it is on, then a driver is killed."""
    tasks = [ShardTask(i, np.arange(1), 10, num_tokens=10) for i in range(4)]
    events = Events()
    with ray_cluster(nodes.address, 1, 2.0, 2) as cluster:
        assert (cluster.num_workers, cluster.num_placeable) == (1, 0)
        make_worker = cluster.actor_maker(SpanningWorker, tmp_path)
        arguments = (tasks, make_worker, RunSettings(), events, make_worker.kill)
        run = threading.Thread(target=run_shards, args=arguments)
        run.start()
        wait_until("a group waits for room", lambda: group_states() == ["PENDING"])
        nodes.add_node(num_cpus=1, num_gpus=1)
        wait_until("the second worker is at shard 2", (tmp_path / "waits").exists)
        assert len(set(events.names)) == 2 and sorted(group_states()) == ["CREATED", "REMOVED"]
        nodes.add_node(num_cpus=1, num_gpus=1)
        drain(nodes, events.names[-1].split()[1])
        wait_until("the worker leaves", lambda: events.leaving == ["its node is being drained"])
        (tmp_path / "go").touch()
        run.join(60)
        assert sorted(events.shards) == [0, 1, 2, 3] and len(set(events.names)) == 3
        wait_until("all groups are removed", lambda: group_states() == ["REMOVED"] * 3)

        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, nodes.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert driver.stdout is not None and driver.stdout.readline() == b"42\n"
        assert "CREATED" in group_states()
        driver.kill()
        driver.wait()
        wait_until("Ray removes the group of a driver that is dead", lambda: set(group_states()) == {"REMOVED"})
