"""Workers on a Ray cluster whose nodes come while the run goes on, and differ in how fast they are."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from logitcache_pipeline.cluster import ray_cluster
from logitcache_pipeline.run import RunSettings, run_shards
from logitcache_pipeline.worker import ShardOutcome, ShardTask, WorkerInfo

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(120)]

SECONDS = {"slow": 0.3, "fast": 0.1}
"""What a shard takes on the two kinds of nodes."""


class NodeWorker:
    """Takes as long as its node does, until there is a file that says to hurry; says which node it is on."""

    def __init__(self, hurry: Path) -> None:
        self._hurry = hurry

    def start(self) -> WorkerInfo:
        context = ray.get_runtime_context()
        resources = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == context.get_node_id())
        self._kind = next((kind for kind in SECONDS if kind in resources), "none")
        # Set by Ray: of fractions of one GPU, several actors see the same.
        name = f"{context.get_node_id()}:{self._kind}:{ray.get_gpu_ids()}"
        return WorkerInfo(name, context.get_node_id())

    def score(self, task: ShardTask) -> None:
        if not self._hurry.exists():
            time.sleep(SECONDS[self._kind])

    def commit(self, shard: int) -> ShardOutcome:
        return ShardOutcome(shard, 10, 1, 0.0, scored=True)


class Events:
    """An observer that writes down who did what."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.order: list[tuple[int, int]] = []
        """(shard, worker) in order of commit."""

    def worker_started(self, worker: int, name: str) -> None:
        assert worker not in self.names
        self.names[worker] = name

    def committed(self, outcome: ShardOutcome, worker: int) -> None:
        self.order.append((outcome.shard, worker))

    def waiting(self, seconds: float) -> None:
        pass  # of what an observer is told besides, nothing may happen here


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of a head without anything to work with."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("logitcache_pipeline.run.POLL_SECONDS", 0.1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_nodes_that_join_are_used_and_each_scores_what_it_can(nodes, tmp_path):
    """Five workers of half a GPU are asked for where there is no node; a slow one comes, then a fast one."""
    events, hurry, num_shards = Events(), tmp_path / "hurry", 400
    tasks = [ShardTask(i, np.arange(1), 10, num_tokens=10) for i in range(num_shards)]
    with ray_cluster(nodes.address, 5, 0.5) as cluster:
        assert (cluster.num_workers, cluster.num_placeable) == (5, 0)
        make_worker = cluster.actor_maker(NodeWorker, hurry)
        run = threading.Thread(target=run_shards, args=(tasks, make_worker, RunSettings(cluster.num_workers), events))
        run.start()
        try:
            time.sleep(1)
            assert not events.names
            slow = nodes.add_node(num_cpus=2, num_gpus=1, resources={"slow": 1})
            wait_until("the slow node scores", lambda: len(events.order) >= 3)
            assert len(events.names) <= 2
            fast = nodes.add_node(num_cpus=2, num_gpus=1, resources={"fast": 1})
            wait_until("the fast node scores", lambda: len(events.names) == 4)
            before = len(events.order)
            wait_until("both have scored for a while", lambda: len(events.order) >= before + 70)
            after = len(events.order)
        finally:
            hurry.touch()
            run.join(60)
    assert sorted(shard for shard, _ in events.order) == list(range(num_shards))
    assert Counter(name.split(":")[0] for name in events.names.values()) == {slow.node_id: 2, fast.node_id: 2}
    assert all(name.endswith(":[0]") for name in events.names.values())
    # Of one kind 20 shards a second, of the other 6.7.
    counts = Counter(events.names[worker].split(":")[1] for _, worker in events.order[before:after])
    assert counts["fast"] / counts["slow"] == pytest.approx(3, rel=0.35)
