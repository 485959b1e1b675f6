"""Checksums: what they are, what a commit lists, and that nothing else is read."""

from __future__ import annotations

import uuid

import pytest

from logitcache_storage.committed import CommittedObjects, block_checksums, object_record
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.objects import open_store
from logitcache_storage.schema import BLOCK_BYTES, ObjectRecord


def crc32c(data: bytes) -> int:
    """Bit by bit, from RFC 3720 appendix B.4: reflected polynomial 0x82f63b78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_block_checksums() -> None:
    # The vectors of RFC 3720, appendix B.4.
    assert crc32c(b"123456789") == 0xE3069283
    assert block_checksums(bytes(32)) == (0x8A9136AA,)
    assert block_checksums(b"\xff" * 32) == (0x62A8AB43,)
    data = bytes(range(251)) * 1100
    assert BLOCK_BYTES == 262144 < len(data)
    assert block_checksums(data) == (crc32c(data[:262144]), crc32c(data[262144:]))
    assert block_checksums(b"") == ()


def test_objects_that_no_commit_lists() -> None:
    with pytest.raises(CorruptionError, match="x/y: the commit lists no such object"):
        CommittedObjects(open_store("memory://nowhere"), []).get("x/y")


def test_fetched_objects_come_from_memory() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    contents = {"a": b"", "b": bytes(range(256)) * 2000, "c": b"1"}
    for path, data in contents.items():
        store.put(path, data)
    found = CommittedObjects(store, [object_record(path, data) for path, data in contents.items()])
    found.fetch_all()
    for path in contents:
        store.delete(path)
    assert {path: found.get(path) for path in found.paths} == contents
    assert found.get_range("b", 300_000, 300_005) == contents["b"][300_000:300_005]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (("../x", 0, ()), "must be relative"),
        (("/x", 0, ()), "must be relative"),
        (("x", -1, ()), "size must be >= 0"),
        (("x", 1, ()), "block_crc32c must be 1 checksums, got 0"),
        (("x", 0, (1,)), "block_crc32c must be 0 checksums, got 1"),
        (("x", BLOCK_BYTES, (1, 2)), "block_crc32c must be 1 checksums, got 2"),
        (("x", BLOCK_BYTES + 1, (1,)), "block_crc32c must be 2 checksums, got 1"),
    ],
)
def test_records_that_cannot_be(fields: tuple, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ObjectRecord(*fields)
