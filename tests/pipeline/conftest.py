"""One Ray cluster and one tiny teacher for all tests of the pipeline."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import write_teacher

# Read when ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path.append(str(Path(__file__).parent))  # faulty_workers.py


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A running Ray cluster of one node, which many tests connect to: starting Ray takes seconds."""
    from ray.cluster_utils import Cluster

    system = {"metrics_report_interval_ms": 500}
    head = {"num_cpus": 4, "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_address(cluster: Any) -> str:
    return str(cluster.address)


RECORDS = [
    *({"question": f"{n} + {n}?", "answer": f"{2 * n}, I think", "level": n} for n in range(11)),
    {"question": "3 + 3?", "answer": "6, I think", "level": 99},  # the tokens of an earlier record
    {"question": "nothing", "answer": " ", "level": 0},
    {"question": "q" * 300, "answer": "never reached", "level": 0},
    {"question": "why?", "answer": "because " * 60, "level": 1},
    {"question": "é?", "answer": "😀", "level": 2},
]
"""Questions and answers: one duplicate, one empty, one without a target, one that is cut, 15 kept or cut in all."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


@pytest.fixture
def settings(teacher: Path, corpus: Path, tmp_path: Path, ray_address: str) -> BuildSettings:
    """A build of about ten shards, exact to float32 rounding, on the tests' Ray cluster."""
    return BuildSettings(
        teacher=str(teacher),
        data=(str(corpus),),
        cache=str(tmp_path / "cache"),
        k=9,
        precision="fp32",
        shard_rows=24,
        ray_address=ray_address,
    )
