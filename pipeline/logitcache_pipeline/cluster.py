"""The Ray cluster a build runs on: one that is there, or a local one that lives as long as the build.

A worker is one actor on one node. All that are wanted are asked for at once: those that find no room stay pending,
which is what makes Ray's autoscaler start nodes, and begin to score when a node has come. Ray finds the GPUs of one
actor on one node; vLLM's own processes inherit the devices that Ray gave to it. Those of a worker that spans several
nodes are in a placement group, which the autoscaler sees likewise: the actor lies in the first bundle without a GPU of
its own, and vLLM starts an actor for each GPU in the bundles. Ray packs a group on as few nodes as have room for it.

Workers pull shards, the longest first, so fast ones score more than slow ones and all end at about the same time. Each
loads the weights by itself: from a folder that every node sees, or from the hub, which stores them once per node under
a lock. Workers of one node read the same files, from memory after the first.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitcache_storage.errors import InputError
from logitcache_storage.terminal import counted

if TYPE_CHECKING:  # it imports Ray, which reads its environment then
    from logitcache_pipeline.actors import ActorMaker

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """How many workers, and what each may use."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    num_placeable: int
    """For how many there is room at present."""
    nodes_per_worker: int = 1
    """Above 1, a worker's GPUs need not be on one node."""

    def actor_maker(self, actor_class: type, *args: Any) -> ActorMaker:
        """Makes actors of the class; Ray repeats nothing when one dies, which the driver decides."""
        import ray

        from logitcache_pipeline.actors import ActorMaker

        remote = ray.remote(actor_class)
        options = {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,  # a shard is written while the next one is scored
        }
        if self.nodes_per_worker == 1:
            return ActorMaker(remote, args, options)
        # One GPU in each bundle, as vLLM insists.
        bundles = [{"GPU": 1.0} for _ in range(round(self.gpus_per_worker))]
        bundles[0]["CPU"] = self.cpus_per_worker
        return ActorMaker(remote, args, options | {"num_gpus": 0}, bundles)


def node_hardware() -> list[dict[str, Any]]:
    """The machines of the cluster we are connected to, as JSON values."""
    import ray

    return [_hardware(node) for node in ray.nodes() if node["Alive"]]


def check_reachable(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for two minutes.

    Raises:
        InputError: nobody answers at HOST:PORT. Other addresses, such as "auto", are left to Ray.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise _no_cluster(address, e) from e


@contextmanager
def ray_cluster(
    address: str | None, workers: int | None, gpus_per_worker: float | None, nodes_per_worker: int = 1
) -> Iterator[Cluster]:
    """Connect to Ray and decide on the workers.

    Args:
        address: of a running cluster; None starts one on this machine, with all its cores and GPUs.
        workers: how many actors; None: as many as the cluster's GPUs carry, or one on CPUs. Those that find no room
            wait for a node to join, be it all of them.
        gpus_per_worker: may be a fraction; None: one where the cluster has GPUs, else none.
        nodes_per_worker: nodes that these GPUs may lie on; room is counted as if each held as many.

    Raises:
        InputError: no cluster at this address, or it lacks the GPUs.
    """
    local: dict[str, Any] = {}
    if address is None:
        local = {"include_dashboard": False}
        _lock_local_cluster()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="logitcache",
            **local,
        )
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise _no_cluster(address, e) from e
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield decide_workers(nodes, workers, gpus_per_worker, nodes_per_worker, may_grow=address is not None)
    finally:
        ray.shutdown()


def decide_workers(
    nodes: Sequence[Mapping[str, float]],
    workers: int | None,
    gpus_per_worker: float | None,
    nodes_per_worker: int = 1,
    *,
    may_grow: bool = False,
) -> Cluster:
    """How many workers there will be, and what each may use.

    Args:
        nodes: the resources of each node, as Ray names them ("CPU", "GPU").
        workers: see `ray_cluster`.
        gpus_per_worker: see `ray_cluster`.
        nodes_per_worker: see `ray_cluster`.
        may_grow: nodes may join.

    Raises:
        InputError: no node has that many GPUs, or not enough nodes have their part of them; and none may join or
            nobody said how many workers to wait for.
    """
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(num_gpus > 0)
    if gpus > 0:
        room = _room(nodes, "GPU", gpus / nodes_per_worker) // nodes_per_worker
        if room == 0 and not (may_grow and workers):
            wait = "; where nodes will join, say for how many workers to wait with --workers N" if may_grow else ""
            if nodes_per_worker > 1:
                part = counted(round(gpus / nodes_per_worker), "GPU")
                raise InputError(
                    f"a worker needs {part} on each of {nodes_per_worker} nodes, and the Ray cluster has {num_gpus:g}"
                    f" on {counted(len(nodes), 'node')}; add GPU nodes{wait}"
                )
            raise InputError(
                f"gpus_per_worker is {gpus:g}, and no node of the Ray cluster has as many (it has {num_gpus:g} GPUs on"
                f" {len(nodes)} nodes); add GPU nodes, or score on CPUs with --gpus-per-worker 0{wait}"
            )
        return Cluster(workers or room, 1.0, gpus, room, nodes_per_worker)
    num_workers = workers or 1
    # As many cores as let all find room: Ray tells torch how many threads an actor may use by its CPUs.
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    cores = next((n for n in range(most, 1, -1) if _room(nodes, "CPU", n) >= num_workers), 1)
    return Cluster(num_workers, float(cores), 0.0, _room(nodes, "CPU", cores))


def _room(nodes: Iterable[Mapping[str, float]], resource: str, amount: float) -> int:
    """How many workers that want this much fit on the nodes; none straddles two."""
    return sum(int(node.get(resource, 0.0) / amount + 1e-6) for node in nodes)


def _hardware(node: Mapping[str, Any]) -> dict[str, Any]:
    resources, prefix = node["Resources"], "accelerator_type:"
    return {
        "host": node["NodeManagerHostname"],
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "accelerators": sorted(name.removeprefix(prefix) for name in resources if name.startswith(prefix)),
        "memory_bytes": int(resources.get("memory", 0)),
    }


def _lock_local_cluster() -> None:
    """A local cluster listens on every interface of the machine: nobody else shall know its token."""
    if "ray" not in sys.modules:  # Ray reads them when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _no_cluster(address: str | None, error: Exception) -> InputError:
    if address is None:
        return InputError(f"cannot start Ray on this machine: {error}")
    return InputError(
        f"no Ray cluster at {address!r}: {error}; start one with 'ray start --head', or omit --ray-address"
    )
