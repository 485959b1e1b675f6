"""Where every sample of a plan stands and how long it is, in memory; and its key, read when it is asked for.

The index of a part of the samples table is one object of five columns, one after the other, without compression:

    shard, first_row, num_tokens, num_targets    int32 [n]
    key                                          16 bytes [n]

It repeats columns of the part, so that a cache of 100 million samples opens without a look at their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.errors import CorruptionError
from logitcache_storage.schema import PlanPart, PlanRecord

PLACE_COLUMNS = ("shard", "first_row", "num_tokens", "num_targets")
PLACE_BYTES = 16
"""Of one sample: the columns before the keys."""
NUM_READERS = 16
"""Parts that are read at a time: a remote store answers slowly, but many at once."""

Places = tuple[npt.NDArray[np.int32], ...]
"""The columns of `PLACE_COLUMNS` of one part."""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Samples in the order of the plan, [n] each, of the narrowest type that holds every value.

    12 bytes a sample where shards have more than 65,535 rows and samples fewer tokens than that.
    """

    shard: npt.NDArray[np.integer]
    first_row: npt.NDArray[np.integer]
    """Row of the first target within the shard."""
    num_tokens: npt.NDArray[np.integer]
    num_targets: npt.NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, samples: npt.NDArray[Any]) -> SampleIndex:
        return SampleIndex(*(getattr(self, f.name)[samples] for f in fields(self)))


def index_bytes(table: pa.Table) -> bytes:
    """The index of a part, from its table."""
    places = (table.column(name).to_numpy().astype("<i4", copy=False).tobytes() for name in PLACE_COLUMNS)
    return b"".join([*places, *table.column("key").to_pylist()])


def parse_places(data: bytes) -> Places:
    """The columns of `PLACE_COLUMNS` from that many first bytes of an index."""
    return tuple(np.frombuffer(data, "<i4").reshape(len(PLACE_COLUMNS), -1))


def load_index(plan: PlanRecord, read: Callable[[PlanPart], Places], *, where: str) -> SampleIndex:
    """All samples of a plan; `read` gives the places of one part, `where` is the cache's URL.

    Raises:
        CorruptionError: a sample's rows lie outside its shard.
    """
    sizes = np.asarray(plan.shard_num_rows, dtype=np.int64)
    # Of shards and their rows the plan knows how many there are; columns of lengths are widened where one needs it.
    types = [np.uint16 if most <= 1 << 16 else np.int32 for most in (len(sizes), sizes.max(initial=0), 0, 0)]
    columns = [_empty(plan.num_samples, dtype, where) for dtype in types]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for n in range(0, len(plan.parts), 2 * NUM_READERS):
            parts = plan.parts[n : n + 2 * NUM_READERS]
            for part, places in zip(parts, pool.map(read, parts), strict=True):
                check_inside_shards(places, sizes, where)
                start, stop = part.first_sample, part.first_sample + part.num_samples
                for i, column in enumerate(places):
                    if columns[i].dtype == np.uint16 and column.max(initial=0) > np.iinfo(np.uint16).max:
                        narrow, columns[i] = columns[i], _empty(plan.num_samples, np.int32, where)
                        columns[i][:start] = narrow[:start]
                    columns[i][start:stop] = column
    return SampleIndex(*columns)


def find_key(wanted: str, parts: Iterable[tuple[int, npt.NDArray[np.uint64]]]) -> list[tuple[int, bytes]]:
    """(sample, key) of those whose key begins with these 1 to 32 hex digits.

    Args:
        wanted: lower-case hex digits.
        parts: (number of its first sample, keys as big-endian pairs [n, 2]) of each part.
    """
    low, high = (bytes.fromhex(wanted.ljust(32, digit)) for digit in "0f")
    (low_0, low_1), (high_0, high_1) = (np.frombuffer(edge, ">u8") for edge in (low, high))
    found = []
    for first_sample, keys_n2 in parts:
        near = np.flatnonzero((keys_n2[:, 0] >= low_0) & (keys_n2[:, 0] <= high_0))
        if low_0 == high_0:
            near = near[(keys_n2[near, 1] >= low_1) & (keys_n2[near, 1] <= high_1)]
        found += [(first_sample + int(i), keys_n2[i].tobytes()) for i in near]
    return found


def check_inside_shards(places: Places, shard_num_rows: npt.NDArray[np.int64], where: str) -> None:
    """Every sample has rows, and each lies inside its shard; `shard_num_rows` are those of the plan.

    Raises:
        CorruptionError: one does not.
    """
    if not len(places[0]):
        return
    shard, first_row, _, num_targets = places
    inside = shard.min() >= 0 and shard.max() < len(shard_num_rows) and first_row.min() >= 0 and num_targets.min() >= 1
    if not inside or (first_row.astype(np.int64) + num_targets > shard_num_rows[shard]).any():
        raise CorruptionError(f"{where}: the samples table points outside the shards of the plan")


def _empty(num_samples: int, dtype: type[np.integer], where: str) -> npt.NDArray[Any]:
    # Nothing of it is in memory before a part has been read that says so.
    try:
        return np.empty(num_samples, dtype)
    except (MemoryError, ValueError, OverflowError) as e:
        raise CorruptionError(f"{where}: the plan says that there are {num_samples} samples: {e}") from e
