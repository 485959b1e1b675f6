"""Object stores for tests, each with a real server in a process of its own; and a count of the faults they injected."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("logitcache_storage.conformance")

# The GCS emulator knows no storage layouts, about which gcsfs would ask by gRPC; read when gcsfs is imported.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

BUCKET = "logitcache-tests"
AZURITE = "node_modules/azurite/dist/src/blob/main.js"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of the account `devstoreaccount1`: printed in Azurite's documentation, and the same everywhere."""

_FAULTS = pytest.StashKey[Counter[str]]()


@dataclass(frozen=True)
class StoreLocation:
    """A URL with nothing below it, and what fsspec needs to reach it."""

    url: str
    storage_options: dict[str, Any]


@dataclass(frozen=True)
class StoreServer:
    """A running server with an empty bucket, and how to reach it through fsspec."""

    protocol: str
    bucket: str
    storage_options: dict[str, Any]
    port: int

    def new_url(self) -> str:
        """A URL with nothing below it."""
        return f"{self.protocol}://{self.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[StoreServer]:
    """A moto server on a free port of the loopback interface; skips where there is none."""
    _require("moto.server", "s3fs", remedy="pip install 'logitcache[dev,s3]'")
    port = _free_port()
    with _running("moto", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        endpoint = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-west-2"}
        yield _with_bucket(
            StoreServer("s3", BUCKET, {"key": "test", "secret": "test", "client_kwargs": endpoint}, port)
        )


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """Azurite, which runs on Node.js; skips where there is none."""
    _require("adlfs", remedy="pip install 'logitcache[dev,azure]'")
    node, azurite = shutil.which("node"), Path(sys.prefix) / "azurite" / AZURITE
    if node is None or not azurite.exists():
        pytest.skip(f"no Azurite: npm install --prefix {azurite.parents[5]} azurite")
    port = _free_port()
    command = [node, str(azurite), "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(tmp_path_factory.mktemp("az"))]
    with _running("Azurite", command, port):
        account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
        endpoint = f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
        yield _with_bucket(StoreServer("az", BUCKET, {"connection_string": account + endpoint}, port))


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[StoreServer]:
    """An emulator of Google's store, which does not enforce create-only; skips where there is none."""
    _require("gcp_storage_emulator", "gcsfs", remedy="pip install 'logitcache[dev,gcs]'")
    port = _free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    with _running("GCS emulator", [*command, "--in-memory"], port):
        options = {"token": "anon", "project": "tests", "endpoint_url": f"http://127.0.0.1:{port}"}
        yield _with_bucket(StoreServer("gs", BUCKET, options, port))


@pytest.fixture(params=["local", "memory", "s3", "azure", "gcs"])
def store_location(request: pytest.FixtureRequest, tmp_path: Path) -> StoreLocation:
    """Each kind of store in turn."""
    if request.param == "local":
        return StoreLocation(str(tmp_path / "cache"), {})
    if request.param == "memory":
        return StoreLocation(f"memory://{uuid.uuid4().hex}", {})
    server = request.getfixturevalue(f"{request.param}_server")
    return StoreLocation(server.new_url(), server.storage_options)


@pytest.fixture
def count_fault(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts one injected fault of a kind; the summary of the run says how many there were of each."""
    counts = request.config.stash.setdefault(_FAULTS, Counter())

    def count(kind: str) -> None:
        counts[kind] += 1

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = dict(session.config.stash.get(_FAULTS, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds up what the workers of pytest-xdist have counted."""
    counts = node.config.stash.setdefault(_FAULTS, Counter())
    counts.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many faults the tests have injected."""
    counts = config.stash.get(_FAULTS, Counter())
    if counts:
        terminalreporter.write_sep("-", f"{counts.total():,} injected faults")
        for kind, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:>7,} {kind}")


def _with_bucket(server: StoreServer) -> StoreServer:
    import fsspec

    fsspec.filesystem(server.protocol, **server.storage_options).mkdir(server.bucket)
    return server


def _require(*modules: str, remedy: str) -> None:
    for module in modules:
        if not _is_installed(module):
            pytest.skip(f"{module} is not installed: {remedy}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _running(name: str, command: list[str], port: int) -> Iterator[None]:
    """A server of its own while the block runs."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_up(name, process, f"http://127.0.0.1:{port}")
        yield
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_up(name: str, process: subprocess.Popen[bytes], endpoint: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.skip(f"the {name} server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(endpoint, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    pytest.skip(f"the {name} server did not answer within 60 seconds")
