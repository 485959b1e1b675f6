"""The seam between a shard's columns and the container they are kept in.

A format turns columns into named bytes and back. It neither writes to a store nor checks a checksum: `commit.py`
does both, in the same way for every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from logitcache_storage.arrow_shard import ArrowShard
from logitcache_storage.committed import CommittedObjects
from logitcache_storage.errors import InputError
from logitcache_storage.id_layouts import Columns
from logitcache_storage.zarr_shard import ZarrShard


class ShardFormat(Protocol):
    """Columns of one shard to objects, and rows of it back."""

    def write(self, columns: Columns, attributes: dict[str, Any]) -> dict[str, bytes]:
        """The shard's objects, as the part of the path that follows the shard's own -> bytes."""

    def read(
        self,
        objects: CommittedObjects,
        prefix: str,
        types: Mapping[str, np.dtype[Any]],
        num_rows: int,
        rows: slice,
    ) -> Columns:
        """Rows [start, stop) of the columns of these types (`encoding.column_types`), reading only what they need.

        `num_rows` is how many the whole shard has. What is returned has been checked against checksums and sizes;
        `encoding.decode` checks types and shapes.
        """


SHARD_FORMATS: dict[str, ShardFormat] = {"zarr": ZarrShard(), "arrow": ArrowShard()}


def shard_format(name: str) -> ShardFormat:
    """The format of this name."""
    if name not in SHARD_FORMATS:
        raise InputError(f"unknown shard format {name!r}; choose from {', '.join(sorted(SHARD_FORMATS))}")
    return SHARD_FORMATS[name]
