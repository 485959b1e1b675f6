"""How many workers a cluster carries, and addresses where there is none."""

from __future__ import annotations

import socket
import time

import pytest

from logitcache_pipeline.cluster import Cluster, check_reachable, decide_workers, ray_cluster
from logitcache_storage.errors import InputError

CPU_NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([CPU_NODE], None, None, Cluster(1, 8.0, 0.0, 1)),
        ([CPU_NODE], 2, None, Cluster(2, 4.0, 0.0, 2)),
        ([CPU_NODE], 3, None, Cluster(3, 2.0, 0.0, 4)),
        ([CPU_NODE], 9, None, Cluster(9, 1.0, 0.0, 8)),
        # No actor straddles two nodes: 16 cores for one worker would never be found.
        ([CPU_NODE, CPU_NODE], 1, None, Cluster(1, 8.0, 0.0, 2)),
        ([CPU_NODE, CPU_NODE], 3, None, Cluster(3, 4.0, 0.0, 4)),
        ([CPU_NODE, {"CPU": 3.0}], 4, None, Cluster(4, 2.0, 0.0, 5)),
        ([{"CPU": 0.0}, CPU_NODE], None, None, Cluster(1, 8.0, 0.0, 1)),
        ([GPU_NODE], None, None, Cluster(4, 1.0, 1.0, 4)),
        ([GPU_NODE, CPU_NODE, GPU_NODE], None, None, Cluster(8, 1.0, 1.0, 8)),
        ([GPU_NODE], 3, None, Cluster(3, 1.0, 1.0, 4)),
        ([GPU_NODE], 6, None, Cluster(6, 1.0, 1.0, 4)),
        ([GPU_NODE], None, 0.5, Cluster(8, 1.0, 0.5, 8)),
        ([GPU_NODE], None, 1 / 3, Cluster(12, 1.0, 1 / 3, 12)),
        ([GPU_NODE, GPU_NODE], None, 3.0, Cluster(2, 1.0, 3.0, 2)),
        ([GPU_NODE], 2, 0.0, Cluster(2, 8.0, 0.0, 2)),
    ],
)
def test_workers_fit_on_the_nodes(nodes, workers, gpus, expected):
    assert decide_workers(nodes, workers, gpus) == expected


@pytest.mark.parametrize(("nodes", "gpus"), [([CPU_NODE], 1.0), ([CPU_NODE], 0.1), ([GPU_NODE, GPU_NODE], 8.0)])
def test_a_cluster_without_the_gpus_is_refused(nodes, gpus):
    with pytest.raises(InputError, match=rf"gpus_per_worker is {gpus:g}, .*--gpus-per-worker 0"):
        decide_workers(nodes, None, gpus)


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([GPU_NODE, GPU_NODE], None, Cluster(1, 1.0, 8.0, 1, 2)),
        ([GPU_NODE] * 5, None, Cluster(2, 1.0, 8.0, 2, 2)),
        ([GPU_NODE] * 2, 3, Cluster(3, 1.0, 8.0, 1, 2)),
        ([{"GPU": 8.0}, CPU_NODE], None, Cluster(1, 1.0, 8.0, 1, 2)),
    ],
)
def test_workers_of_eight_gpus_on_two_nodes(nodes, workers, expected):
    assert decide_workers(nodes, workers, 8.0, 2, may_grow=True) == expected


def test_too_few_nodes_for_one_worker_are_refused():
    with pytest.raises(InputError, match=r"needs 4 GPUs on each of 2 nodes, .* has 4 on 2 nodes; add GPU nodes$"):
        decide_workers([GPU_NODE, CPU_NODE], 1, 8.0, 2)


def test_workers_wait_for_nodes_that_may_join_where_it_is_known_how_many():
    assert decide_workers([CPU_NODE], 5, 2.0, may_grow=True) == Cluster(5, 1.0, 2.0, 0)
    with pytest.raises(InputError, match=r"no node of the Ray cluster has as many .*wait with --workers N"):
        decide_workers([CPU_NODE], None, 2.0, may_grow=True)
    with pytest.raises(InputError, match=r"score on CPUs with --gpus-per-worker 0$"):
        decide_workers([CPU_NODE], 5, 2.0)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_an_address_where_nobody_listens_is_refused_at_once(form):
    address = form.format(unused_port())
    start = time.monotonic()
    with pytest.raises(InputError, match=r"no Ray cluster at '.*'ray start --head'"):
        check_reachable(address)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("address", ["auto", "local"])
def test_other_addresses_are_left_to_ray(address):
    check_reachable(address)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(InputError, match="no Ray cluster at 'nonsense'"), ray_cluster("nonsense", None, None):
        pass


def test_a_running_cluster_is_joined_and_left(ray_address):
    import ray

    for _ in range(2):
        with ray_cluster(ray_address, 2, None) as cluster:
            assert cluster == Cluster(2, 2.0, 0.0, 2)
        assert not ray.is_initialized()
