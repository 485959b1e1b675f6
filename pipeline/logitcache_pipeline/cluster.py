"""The Ray cluster a build runs on: one that is there, or a local one that lives as long as the build."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from logitcache_storage.errors import InputError

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """How many workers, and what each may use."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    def actor_maker(self, actor_class: type, *args: Any) -> Callable[[], Any]:
        """A function that makes one actor of the class; Ray restarts its process when it dies, never its calls."""
        import ray

        remote = ray.remote(actor_class).options(
            num_cpus=self.cpus_per_worker, num_gpus=self.gpus_per_worker, max_restarts=-1, max_task_retries=0
        )
        return lambda: remote.remote(*args)


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
def ray_cluster(address: str | None, workers: int | None, gpus_per_worker: float | None) -> Iterator[Cluster]:
    """Connect to Ray and decide on the workers.

    Args:
        address: of a running cluster; None starts one on this machine, with all its cores and GPUs.
        workers: how many actors; None: as many as the cluster's GPUs carry, or one on CPUs.
        gpus_per_worker: may be a fraction; None: one where the cluster has GPUs, else none.

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
        yield decide_workers(nodes, workers, gpus_per_worker)
    finally:
        ray.shutdown()


def decide_workers(nodes: Sequence[Mapping[str, float]], workers: int | None, gpus_per_worker: float | None) -> Cluster:
    """How many workers there will be, and what each may use.

    Args:
        nodes: the resources of each node, as Ray names them ("CPU", "GPU").
        workers: see `ray_cluster`; those that find no room wait for a node.
        gpus_per_worker: see `ray_cluster`.

    Raises:
        InputError: no node has that many GPUs.
    """
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(num_gpus > 0)
    if gpus > 0:
        if (room := _room(nodes, "GPU", gpus)) == 0:
            raise InputError(
                f"gpus_per_worker is {gpus:g}, and no node of the Ray cluster has as many (it has {num_gpus:g} GPUs on"
                f" {len(nodes)} nodes); add GPU nodes, or score on CPUs with --gpus-per-worker 0"
            )
        return Cluster(workers or room, 1.0, gpus)
    num_workers = workers or 1
    # As many cores as let all find room: Ray tells torch how many threads an actor may use by its CPUs.
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    cores = next((n for n in range(most, 1, -1) if _room(nodes, "CPU", n) >= num_workers), 1)
    return Cluster(num_workers, float(cores), 0.0)


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
