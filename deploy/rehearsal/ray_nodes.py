"""A Ray cluster of several nodes on one machine: a head and workers as separate processes, all asking for one token."""

from __future__ import annotations

import json
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bucket import HOST, free_port
from processes import Processes, RehearsalError, Running, wait_until

START_SECONDS = 120
RAY = Path(sys.executable).parent / "ray"
AGENT_PORTS = (
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
"""Nodes of one machine each need their own: the defaults are the same on all."""


class RayNodes:
    """The nodes that were started; each is a process with all that Ray starts below it."""

    def __init__(self, processes: Processes, folder: Path, environment: Mapping[str, str]) -> None:
        """Start nothing yet.

        Args:
            processes: starts the nodes.
            folder: of the cluster's own files; its path is short.
            environment: of the nodes, and so of everything that runs on them.
        """
        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        """Of whoever talks to the cluster. Off by default is no choice: who reaches a cluster runs code on it."""
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
        self._processes, self._folder, self._token = processes, folder, token.read_text()
        self._address = f"{HOST}:{free_port()}"
        self.dashboard = f"http://{HOST}:{free_port()}"
        """Where jobs are submitted."""
        self.nodes: dict[str, Running] = {}

    def start_head(self) -> None:
        """Start the head, on which no worker finds room."""
        port, dashboard_port = (address.rpartition(":")[2] for address in (self._address, self.dashboard))
        head = ["--head", "--port", port, "--num-cpus", "0", "--temp-dir", self._folder / "ray"]
        head += ["--dashboard-host", HOST, "--dashboard-port", dashboard_port]
        head += ["--ray-client-server-port", free_port()]
        self._start("head", head)
        wait_until("the head", lambda: self.num_alive() == 1, seconds=START_SECONDS, while_running=[self.nodes["head"]])

    def start_worker(self, name: str) -> None:
        """Start a node with room for one worker."""
        before = self.num_alive()
        self._start(name, ["--address", self._address, "--num-cpus", "1"])
        running = [self.nodes[name], self.nodes["head"]]
        wait_until(f"the node {name}", lambda: self.num_alive() > before, seconds=START_SECONDS, while_running=running)

    def num_alive(self) -> int:
        """How many nodes the head takes for alive."""
        try:
            found = self._ask("/nodes?view=summary", token=self._token)
        except OSError:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in found["data"]["summary"])

    def refuses_strangers(self) -> bool:
        """Whether who has no token, or a wrong one, is turned away."""
        for token in (None, "0" * 64):
            try:
                self._ask("/api/jobs/", token=token)
            except urllib.error.HTTPError as e:
                if e.code in (401, 403):
                    continue
            return False
        return True

    def submit_command(self, *entrypoint: object) -> list[object]:
        """The command that runs something on the head and shows what it says until it ends."""
        return [RAY, "job", "submit", "--address", self.dashboard, "--", *entrypoint]

    def _start(self, name: str, words: list[object]) -> None:
        own = [word for option in AGENT_PORTS for word in (option, free_port())]
        command = [RAY, "start", "--block", "--node-ip-address", HOST, *words, *own]
        self.nodes[name] = self._processes.start(f"ray {name}", command, self.environment)

    def _ask(self, path: str, *, token: str | None) -> Any:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


def lost_node(nodes: RayNodes, name: str) -> int:
    """Kill a node with all that runs on it; returns how many processes that were.

    Raises:
        RehearsalError: it had ended before.
    """
    num_processes = nodes.nodes.pop(name).kill()
    if not num_processes:
        raise RehearsalError(f"the node {name} had ended before it was killed")
    return num_processes
