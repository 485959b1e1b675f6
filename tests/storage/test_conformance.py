"""Every store and every shard format, through the suites of `logitcache_storage.conformance`."""

from __future__ import annotations

import pytest

from logitcache_storage.conformance import ShardConformance, StoreConformance
from logitcache_storage.objects import ObjectStore, open_store


@pytest.fixture
def store(store_location) -> ObjectStore:
    return open_store(store_location.url, store_location.storage_options)


class TestStores(StoreConformance):
    pass


class TestShardFormats(ShardConformance):
    pass
