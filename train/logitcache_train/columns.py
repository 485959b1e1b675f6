"""The corpus's own columns as per-target data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_train.objectives import Objective

SEQUENCE_COLUMN = "sequence"
"""The column that every sample has: which sequence of the micro-batch a target belongs to."""

ColumnReader = Callable[[int, npt.NDArray[np.int32], int, int], npt.NDArray[Any]]
"""(sample, its target positions [M], its number of tokens L, its place in the micro-batch) to per-target data [M]."""


def column_readers(objective: Objective, cache: Cache) -> dict[str, ColumnReader]:
    """A reader for every column that the objective may look at and the cache has.

    Raises:
        InputError: the cache lacks a column that the objective needs.
    """
    readers: dict[str, ColumnReader] = {}
    for name in (*objective.columns, *objective.optional_columns):
        if name == SEQUENCE_COLUMN:
            readers[name] = lambda _, positions, __, place: np.full(len(positions), place)
        elif name in cache.column_names:
            readers[name] = _corpus_column(name, cache)
        elif name in objective.columns:
            raise InputError(
                f"objective {objective.name!r} needs the column {name!r}, which {cache.store.url} does not have;"
                " put it into the corpus (one number a record, or one for each token) and build the cache again"
            )
    return readers


def _corpus_column(name: str, cache: Cache) -> ColumnReader:
    def read(index: int, positions: npt.NDArray[np.int32], num_tokens: int, _: int) -> npt.NDArray[Any]:
        value = cache.describe([index])[0][name]
        data = np.asarray(value, dtype=np.float32) if _is_numeric(value) else None
        if data is not None and data.ndim == 0:
            return np.full(len(positions), data)
        if data is not None and data.shape == (num_tokens,):
            return data[positions]
        if data is not None and data.shape == (len(positions),):
            return data
        raise InputError(
            f"column {name!r} of sample {cache.key(index)}: expected a number, or a list of numbers, one for"
            f" each of its {num_tokens} tokens or {len(positions)} targets; found {str(value)[:60]!r}"
        )

    return read


def _is_numeric(value: Any) -> bool:
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return all(isinstance(v, int | float) for v in values)
