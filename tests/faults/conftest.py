"""The proxy between a client and the S3 server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CLIENT = {"connect_timeout": 1, "read_timeout": 1, "retries": {"total_max_attempts": 1}}
"""Impatient, so that what happens in the end happens within seconds; s3fs itself still repeats most of it."""


@dataclass(frozen=True)
class FaultyS3:
    """A place on the S3 server, reached directly and through a proxy."""

    url: str
    options: dict[str, Any]
    options_through_proxy: dict[str, Any]
    proxy: Any
    """A `Proxy`."""
    faults: Any
    """Its class of `Faults`."""


def _proxy_module() -> ModuleType:
    # Also a script, so it stands beside the tests and in no package.
    spec = importlib.util.spec_from_file_location("fault_proxy", Path(__file__).with_name("proxy.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_proxy"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faulty_s3(s3_server) -> Iterator[FaultyS3]:
    module = _proxy_module()
    with module.Proxy(s3_server.port) as proxy:
        options = s3_server.storage_options
        endpoint = {**options["client_kwargs"], "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        through = {**options, "client_kwargs": endpoint, "config_kwargs": CLIENT}
        yield FaultyS3(s3_server.new_url(), options, through, proxy, module.Faults)
