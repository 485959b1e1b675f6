"""Object stores for tests: local files, memory, and a real S3 server in a process of its own."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("logitcache_storage.conformance")


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and how to reach it through fsspec."""

    bucket: str
    storage_options: dict[str, Any]

    def new_url(self) -> str:
        """A URL with nothing below it."""
        return f"s3://{self.bucket}/{uuid.uuid4().hex}"


@dataclass(frozen=True)
class StoreLocation:
    """A URL with nothing below it, and what fsspec needs to reach it."""

    url: str
    storage_options: dict[str, Any]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A moto server on a free port of the loopback interface; skips where there is none."""
    for module in ("moto.server", "s3fs"):
        if not _is_installed(module):
            pytest.skip(f"{module} is not installed: pip install 'logitcache[dev,s3]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        _wait_until_up(process, endpoint)
        options = {
            "key": "test",
            "secret": "test",
            "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-west-2"},
        }
        import s3fs

        s3fs.S3FileSystem(**options).mkdir("logitcache-tests")
        yield S3Server("logitcache-tests", options)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(params=["local", "memory", "s3"])
def store_location(request: pytest.FixtureRequest, tmp_path: Path) -> StoreLocation:
    """Each kind of store in turn."""
    if request.param == "local":
        return StoreLocation(str(tmp_path / "cache"), {})
    if request.param == "memory":
        return StoreLocation(f"memory://{uuid.uuid4().hex}", {})
    server = request.getfixturevalue("s3_server")
    return StoreLocation(server.new_url(), server.storage_options)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _wait_until_up(process: subprocess.Popen[bytes], endpoint: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.skip(f"the moto server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(endpoint, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    pytest.skip("the moto server did not answer within 60 seconds")
