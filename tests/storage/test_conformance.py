"""Every store and every shard format, through the suites of `logitcache_storage.conformance`."""

from __future__ import annotations

import pytest

from logitcache_storage.conformance import ShardConformance, StoreConformance
from logitcache_storage.objects import ObjectStore, open_store


@pytest.fixture
def store(store_location) -> ObjectStore:
    return open_store(store_location.url, store_location.storage_options)


class TestStores(StoreConformance):
    @pytest.fixture(autouse=True)
    def enforces_create(self, request: pytest.FixtureRequest, store_location) -> None:
        """The emulator ignores `ifGenerationMatch`; what holds all the same: test_remote_stores.py."""
        is_of_create = request.node.originalname in ("test_create_never_replaces", "test_of_racing_creators_one_wins")
        if is_of_create and store_location.url.startswith("gs://"):
            pytest.skip("the emulator of Google's store does not enforce create-only writes")


# Formats see no store but through its reads, which the suite of stores compares already.
@pytest.mark.parametrize("store_location", ["local", "s3"], indirect=True)
class TestShardFormats(ShardConformance):
    pass
