"""Decoded rows as bytes on a local disk, to be mapped into memory: the columns of TopKLogProbs, one after the other.

Private to one machine: nothing but `DiskCache` ever holds them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError
from logitcache_storage.topk import TopKLogProbs

_TYPES: dict[str, type[np.generic]] = {
    "ids": np.int32,
    "log_probs": np.float32,
    "num_kept": np.int32,
    "log_tail": np.float32,
    "label_log_prob": np.float32,
}


def num_row_bytes(num_rows: int, k: int) -> int:
    """Bytes of so many rows: 8 k + 12 each, 524 at k = 64."""
    return num_rows * 4 * (2 * k + 3)


def to_buffers(topk: TopKLogProbs) -> list[npt.NDArray[Any]]:
    """The columns, each as one piece of memory."""
    return [np.ascontiguousarray(getattr(topk, f.name), _TYPES[f.name]) for f in fields(topk)]


def from_buffer(data: memoryview, num_rows: int, k: int) -> TopKLogProbs:
    """The rows in this memory, which is not copied.

    Raises:
        CorruptionError: it is of another size.
    """
    if len(data) != num_row_bytes(num_rows, k):
        raise CorruptionError(f"local rows of {len(data)} bytes, expected {num_row_bytes(num_rows, k)}")
    columns, start = [], 0
    for f in fields(TopKLogProbs):
        shape = (num_rows, k) if f.name in ("ids", "log_probs") else (num_rows,)
        count = int(np.prod(shape))
        columns.append(np.frombuffer(data, _TYPES[f.name], count, start).reshape(shape))
        start += 4 * count
    return TopKLogProbs(*columns)
