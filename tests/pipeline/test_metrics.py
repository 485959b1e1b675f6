"""What a scraper reads from the node of a real Ray cluster."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from logitcache_pipeline.metrics import STORE_SECONDS, BuildMetrics
from logitcache_pipeline.worker import ShardOutcome
from logitcache_storage.schema import ExcludedSample

pytestmark = pytest.mark.timeout(60)
CACHE = "s3://bucket/metrics-test"


@pytest.fixture
def driver(ray_address: str) -> Iterator[Any]:
    ray.init(ray_address, log_to_driver=False, logging_level="ERROR")
    yield ray.nodes()[0]
    ray.shutdown()


def scrape(node: Any, name: str) -> list[str]:
    """Samples of a metric of our cache, as the node serves them; waits until there are some."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"ray_logitcache_{name}{{") and f'cache="{CACHE}"' in line]
        if found:
            return found
        time.sleep(0.3)
    return []


def value(line: str) -> float:
    return float(line.rpartition(" ")[2])


def test_a_scraper_sees_what_was_counted(driver):
    # In a process of its own: each time that one process connects to Ray, Ray reports all that it counts once more.
    @ray.remote
    def build() -> None:
        metrics = BuildMetrics(CACHE, 1000)
        metrics.committed(ShardOutcome(0, 100, 5000, 2.0, True, num_tokens=250, store_seconds=0.2), "first:1")
        metrics.committed(ShardOutcome(1, 60, 5000, 2.0, True, num_tokens=150, store_seconds=20.0), "first:2")
        lost = (
            ExcludedSample(0, 4, "a" * 32, ("first", "second"), "bad"),
            ExcludedSample(4, 6, "b" * 32, ("x",), "bad"),
        )
        outcome = ShardOutcome(2, 40, 5000, 2.0, True, num_tokens=90, store_seconds=0.01, excluded=lost)
        metrics.committed(outcome, "second:1")
        metrics.committed(ShardOutcome(3, 30, 5000, 0.0, False), "second:1")
        metrics.quarantined()
        metrics.start_failed()
        for _ in range(3):
            metrics.attempt_failed()

    ray.get(build.remote())
    by_node = {}
    for line in scrape(driver, "target_tokens_total"):
        by_node["first" if 'node="first"' in line else "second"] = value(line)
    assert by_node == {"first": 160, "second": 40}
    assert sum(map(value, scrape(driver, "tokens_total"))) == 490
    assert sum(map(value, scrape(driver, "shards_total"))) == 3
    counts = {"failed_attempts": 3, "quarantined_shards": 1, "quarantined_samples": 3, "failed_starts": 1}
    assert {name: list(map(value, scrape(driver, f"{name}_total"))) for name in counts} == {
        name: [count] for name, count in counts.items()
    }
    assert list(map(value, scrape(driver, "target_tokens_left"))) == [760]
    buckets = [line for line in scrape(driver, "store_seconds_bucket") if 'node="first"' in line]
    assert len(buckets) == len(STORE_SECONDS) + 1
    counts = {line.partition('le="')[2].partition('"')[0]: value(line) for line in buckets}
    assert (counts["0.1"], counts["0.3"], counts["10.0"], counts["30.0"]) == (0, 1, 1, 2)
