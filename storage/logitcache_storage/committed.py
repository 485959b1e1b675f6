"""Objects and their checksums: what is written gets a record, and what a record lists is read only if it matches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import google_crc32c

from logitcache_storage.errors import CorruptionError, ObjectNotFoundError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.schema import BLOCK_BYTES, ObjectRecord


class CommittedObjects:
    """The objects of one commit, read only together with their checksums.

    Raises (in every read):
        CorruptionError: the object is missing, has another size, or a block has another CRC-32C.
    """

    def __init__(self, store: ObjectStore, records: Iterable[ObjectRecord]) -> None:
        self._store = store
        self._records = {record.path: record for record in records}
        self._held: dict[str, tuple[int, bytes]] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._records

    @property
    def paths(self) -> list[str]:
        """Paths of all objects of the commit."""
        return list(self._records)

    def size(self, path: str) -> int:
        """Bytes of an object, as committed."""
        return self._record(path).size

    def fetch_all(self, paths: Iterable[str] | None = None) -> None:
        """Fetch these objects now, or all, side by side; later reads come from memory."""
        wanted = self._records if paths is None else [self._record(path).path for path in paths]
        missing = [path for path in wanted if path not in self._held]
        with self._listed():
            found = self._store.get_many(missing)
        for path, data in zip(missing, found, strict=True):
            self._held[path] = 0, self._verified(path, data, 0, self.size(path))

    def fetch(self, path: str, start: int, stop: int) -> None:
        """Fetch bytes [start, stop) in one request now; later reads within them come from memory."""
        self._held[path] = start, self.get_range(path, start, stop)

    def get(self, path: str) -> bytes:
        """All bytes of an object."""
        return self.get_range(path, 0, self.size(path))

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop); whole blocks are read, so that each can be verified."""
        size = self.size(path)
        start, stop = min(start, size), min(stop, size)
        held_from, held = self._held.get(path, (0, b""))
        if held_from <= start and stop <= held_from + len(held):
            return held[start - held_from : stop - held_from]
        first = start - start % BLOCK_BYTES
        last = max(first, min(size, -(-stop // BLOCK_BYTES) * BLOCK_BYTES))
        with self._listed():
            if (first, last) == (0, size):
                data = self._store.get(path)
            else:
                data = self._store.get_range(path, first, last)
        return self._verified(path, data, first, last)[start - first : stop - first]

    def _record(self, path: str) -> ObjectRecord:
        if path not in self._records:
            raise CorruptionError(f"{self._store.url}/{path}: the commit lists no such object")
        return self._records[path]

    @contextmanager
    def _listed(self) -> Iterator[None]:
        try:
            yield
        except ObjectNotFoundError as e:
            raise CorruptionError(f"{e}, but a commit lists it; {_REMEDY}") from e

    def _verified(self, path: str, data: bytes, first: int, last: int) -> bytes:
        where = f"{self._store.url}/{path}"
        if len(data) != last - first:
            raise CorruptionError(f"{where}: {len(data)} bytes where the commit says {last - first}; {_REMEDY}")
        blocks = self._record(path).block_crc32c[first // BLOCK_BYTES :]
        for block, (found, expected) in enumerate(zip(block_checksums(data), blocks, strict=False)):
            if found != expected:
                raise CorruptionError(
                    f"{where}: crc32c {found:#010x} in block {first // BLOCK_BYTES + block},"
                    f" commit says {expected:#010x}; {_REMEDY}"
                )
        return data


def shard_prefix(shard: int, attempt: str) -> str:
    """What the paths of one attempt's objects begin with."""
    return f"shards/{shard:05d}-{attempt}"


def block_checksums(data: bytes) -> tuple[int, ...]:
    """CRC-32C of each block of `BLOCK_BYTES`; an empty object has none."""
    view = memoryview(data)
    return tuple(
        google_crc32c.value(bytes(view[start : start + BLOCK_BYTES])) for start in range(0, len(data), BLOCK_BYTES)
    )


def object_record(path: str, data: bytes) -> ObjectRecord:
    """The record of an object about to be written."""
    return ObjectRecord(path=path, size=len(data), block_crc32c=block_checksums(data))


def put_object(store: ObjectStore, path: str, data: bytes) -> ObjectRecord:
    """Write an object and return its record."""
    record = object_record(path, data)
    store.put(path, data)
    return record


_REMEDY = "the object is damaged: 'logitcache verify' lists all that is and says how to score it again"
