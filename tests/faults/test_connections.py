"""Between client and store: resets, stalls, refusals, slow links. Work succeeds, or ends in a StoreError."""

from __future__ import annotations

import time

import numpy as np
import pytest

from logitcache_storage import objects
from logitcache_storage.cache import Cache
from logitcache_storage.errors import StoreError, StoreUnavailableError
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

pytestmark = pytest.mark.timeout(120)

SAMPLES, TOPKS = make_samples(4, k=3, vocab_size=50, seed=4)
IDENTITY = make_identity(k=3, precision="fp32", container="arrow", shard_rows=30)


def build(url: str, options: dict) -> None:
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY, storage_options=options)


def check_rows(cache: Cache) -> None:
    for i, sample in enumerate(cache):
        assert np.array_equal(sample.input_ids, SAMPLES[i][0])
        assert sample.topk.equals(TOPKS[i])


def check_whole(url: str, options: dict) -> None:
    assert verify_cache(url, deep=True, storage_options=options).is_intact
    cache = Cache.open(url, options)
    assert cache.is_complete and len(cache) == len(SAMPLES)
    check_rows(cache)


@pytest.mark.parametrize("fault", ["reset", "cut"])
def test_each_answer_lost_in_turn(s3_server, faulty_s3, fault: str, count_fault) -> None:
    """The client asks again, and is told that what it wrote is there already: by nobody but itself."""
    proxy = faulty_s3.proxy
    n = 0
    while True:
        url = s3_server.new_url()
        proxy.planned.extend(["pass"] * n + [fault])
        try:
            build(url, faulty_s3.options_through_proxy)
        except StoreUnavailableError as e:
            # The server itself may stumble over a request whose predecessor it is still at; then, as the error says:
            assert "Internal Server Error" in str(e) and "run the same command again" in str(e)
            build(url, faulty_s3.options_through_proxy)
        if proxy.planned:  # fewer answers than that
            proxy.planned.clear()
            break
        check_rows(Cache.open(url, faulty_s3.options))
        count_fault(f"answers {'lost' if fault == 'reset' else 'cut short'} between client and store")
        n += 1
    assert n > 12


def test_answers_lost_at_random(faulty_s3, count_fault) -> None:
    """More than the client repeats: the same command again goes on where the last one ended."""
    proxy, num_failures = faulty_s3.proxy, 0
    proxy.faults = faulty_s3.faults(reset=0.05, cut=0.05, refuse=0.02)
    for _ in range(60):
        try:
            build(faulty_s3.url, faulty_s3.options_through_proxy)
            break
        except StoreError:
            num_failures += 1
    num_reads = 0
    for _ in range(12):
        try:
            check_rows(Cache.open(faulty_s3.url, faulty_s3.options_through_proxy))
            num_reads += 1
        except StoreError:
            num_failures += 1
    assert num_failures and num_reads
    check_whole(faulty_s3.url, faulty_s3.options)
    for kind in ("reset", "cut", "refuse"):
        for _ in range(proxy.counts[kind]):
            count_fault(f"connections with a {kind} at random")


def test_a_stall_is_waited_out(faulty_s3, count_fault) -> None:
    build(faulty_s3.url, faulty_s3.options)
    faulty_s3.proxy.planned.append("stall")
    faulty_s3.proxy.faults = faulty_s3.faults(stall_seconds=60)
    start = time.monotonic()
    check_rows(Cache.open(faulty_s3.url, faulty_s3.options_through_proxy))
    assert 1 <= time.monotonic() - start < 10
    count_fault("stalls of a connection")


@pytest.mark.parametrize("fault", ["stall", "reset", "refuse"])
def test_a_server_that_is_gone_for_good_is_given_up(faulty_s3, fault: str, count_fault, monkeypatch) -> None:
    monkeypatch.setattr(objects, "WRITE_SECONDS", 3)
    build(faulty_s3.url, faulty_s3.options)
    cache, proxy = Cache.open(faulty_s3.url, faulty_s3.options_through_proxy), faulty_s3.proxy
    check_rows(cache)
    if fault == "refuse":
        proxy.__exit__()
    else:
        proxy.faults = faulty_s3.faults(**{fault: 1.0}, stall_seconds=3600)
    start = time.monotonic()
    for work in (lambda: cache.read_shard(0), lambda: build(faulty_s3.url, faulty_s3.options_through_proxy)):
        with pytest.raises(StoreError, match=rf"{faulty_s3.url}/.*check the network and the endpoint"):
            work()
        count_fault(f"servers gone for good ({fault})")
    assert time.monotonic() - start < 25
    if fault != "refuse":
        proxy.faults = faulty_s3.faults()
        check_rows(cache)


def test_slow_links_only_take_longer(faulty_s3, count_fault) -> None:
    faulty_s3.proxy.faults = faulty_s3.faults(latency=0.02, bytes_per_second=200_000)
    build(faulty_s3.url, faulty_s3.options_through_proxy)
    check_whole(faulty_s3.url, faulty_s3.options_through_proxy)
    count_fault("slow links")
