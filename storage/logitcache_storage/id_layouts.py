"""Where the ids of a row stand, and in which order its codes follow them.

    plain       ids as they are, most likely first; levels as differences from entry to entry
    ascending   ids in ascending order, as differences from id to id; beside each its log-prob, or how far its level
                stands above the row's least likely one
    split       ids as their low 16 and high 8 bits, most likely first; levels as they are

A set of ids costs less than a list: neighbours of an ascending order are near each other, and rows that share ids share
runs of differences. What the order said, the codes say again: sorting a row by its codes brings it back, with equal
codes by ascending id. Most of a row stands just above its least likely entry, wherever that is, so levels are counted
from there. `split` trades bytes for a decoder that only shifts and adds.

Shapes: n rows at a time, k entries. A code is a level (uint8, uint16) or a log-prob (float16, float32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.schema import MAX_SPLIT_VOCAB

Columns = dict[str, npt.NDArray[Any]]
Ids = npt.NDArray[np.int32]
Codes = npt.NDArray[Any]
Beyond = npt.NDArray[np.bool_] | None
"""Which entries are beyond `num_kept`, [n, k]; None where none is."""


class IdLayout(Protocol):
    """Ids and codes of rows to stored columns, and back."""

    id_types: ClassVar[dict[str, type[np.generic]]]
    """The columns that hold the ids, each [N, k]."""

    def pack(self, ids: Ids, codes: Codes, kept: npt.NDArray[np.bool_]) -> Columns:
        """Columns of rows that are given most likely first; beyond `kept`, ids are 0 and the last code is repeated."""

    def unpack(self, columns: Mapping[str, npt.NDArray[Any]], out: Ids, beyond: Beyond, where: str) -> Codes:
        """Fill `out` with the ids, most likely first, and return their codes; both are of no meaning beyond `num_kept`.

        Raises:
            CorruptionError: the columns are none that `pack` makes.
        """


class PlainLayout:
    """See `IdLayout`."""

    id_types: ClassVar[dict[str, type[np.generic]]] = {"ids": np.int32}

    def pack(self, ids: Ids, codes: Codes, kept: npt.NDArray[np.bool_]) -> Columns:
        """Neighbouring levels differ little, so what is kept is their difference."""
        if _are_levels(codes):
            codes = np.diff(codes, axis=1, prepend=codes.dtype.type(0))
        return {"ids": ids, "codes": codes}

    def unpack(self, columns: Mapping[str, npt.NDArray[Any]], out: Ids, beyond: Beyond, where: str) -> Codes:
        """Sums that wrap around fall, and are found by that."""
        out[...] = columns["ids"]
        codes = columns["codes"]
        if _are_levels(codes):
            codes = np.cumsum(codes, axis=1, dtype=codes.dtype)
            _refuse_falling(codes, where)
        return codes


class AscendingLayout:
    """See `IdLayout`."""

    id_types: ClassVar[dict[str, type[np.generic]]] = {"ids": np.int32}

    def pack(self, ids: Ids, codes: Codes, kept: npt.NDArray[np.bool_]) -> Columns:
        """Beyond `num_kept`, zeros."""
        beyond = None if kept.all() else ~kept
        ids, codes = _sorted_pairs(ids, codes[:, -1:] - codes if _are_levels(codes) else codes, beyond)
        steps = np.diff(ids, axis=1, prepend=np.int32(0))
        if beyond is not None:
            steps[beyond], codes[beyond] = 0, 0
        return {"ids": steps, "codes": codes}

    def unpack(self, columns: Mapping[str, npt.NDArray[Any]], out: Ids, beyond: Beyond, where: str) -> Codes:
        """Ids that ascend are distinct, and a sum that wraps around does not ascend."""
        np.cumsum(columns["ids"], axis=1, out=out)
        falls = out[:, 1:] <= out[:, :-1]
        if beyond is not None:
            falls &= ~beyond[:, 1:]
            out[beyond] = 0
        if falls.any() or (out[:, 0] < 0).any():
            raise CorruptionError(f"{where}: ids that do not ascend from 0 or above")
        codes = columns["codes"]
        if _are_levels(codes):
            above = codes if beyond is None else np.where(beyond, codes.dtype.type(0), codes)
            codes = above.max(axis=1, keepdims=True) - above
        codes, out[...] = _sorted_pairs(codes, out, beyond)
        return codes


class SplitLayout:
    """See `IdLayout`."""

    id_types: ClassVar[dict[str, type[np.generic]]] = {"ids": np.uint16, "ids_high": np.uint8}

    def pack(self, ids: Ids, codes: Codes, kept: npt.NDArray[np.bool_]) -> Columns:
        """Low bits are noise and are kept as they are; high bits are few values."""
        return {"ids": (ids & 0xFFFF).astype(np.uint16), "ids_high": (ids >> 16).astype(np.uint8), "codes": codes}

    def unpack(self, columns: Mapping[str, npt.NDArray[Any]], out: Ids, beyond: Beyond, where: str) -> Codes:
        """Shift and add."""
        np.left_shift(columns["ids_high"], 16, out=out, dtype=np.int32)
        np.bitwise_or(out, columns["ids"], out=out)
        if _are_levels(columns["codes"]):
            _refuse_falling(columns["codes"], where)
        return columns["codes"]


_LAYOUTS: dict[str, IdLayout] = {"plain": PlainLayout(), "ascending": AscendingLayout(), "split": SplitLayout()}


def id_layout(name: str) -> IdLayout:
    """The layout of this name."""
    if name not in _LAYOUTS:
        raise InputError(f"unknown id layout {name!r}; choose from {', '.join(_LAYOUTS)}")
    return _LAYOUTS[name]


def default_id_layout(container: str, vocab_size: int) -> str:
    """Of a new cache: in Zarr the one of the fewest bytes, in Arrow the fastest that holds the vocabulary."""
    if container == "zarr":
        return "ascending"
    return "split" if vocab_size <= MAX_SPLIT_VOCAB else "plain"


def _sorted_pairs(
    first: npt.NDArray[Any], second: npt.NDArray[Any], beyond: Beyond
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows of pairs in ascending order of (first, second), as bit patterns; pairs beyond come last, as anything.

    Log-probs are at most 0, where patterns ascend as values fall. Numpy sorts integers many times faster than it sorts
    indices, so a pair is sorted as one integer, of 32 bits where they are enough.
    """
    high, low = (a.view(f"u{a.dtype.itemsize}") for a in (first, second))
    high_bits, low_bits = (int(a.max(initial=0)).bit_length() for a in (high, low))
    pair_type: Any = np.uint32 if high_bits + low_bits <= 32 else np.uint64
    pairs: npt.NDArray[Any] = high.astype(pair_type)
    pairs <<= low_bits
    pairs |= low
    if beyond is not None:
        pairs[beyond] = np.iinfo(pair_type).max
    pairs.sort(axis=1)
    low = (pairs & pair_type((1 << low_bits) - 1)).astype(low.dtype)
    high = (pairs >> low_bits).astype(high.dtype)
    return high.view(first.dtype), low.view(second.dtype)


def _are_levels(codes: Codes) -> bool:
    return bool(np.issubdtype(codes.dtype, np.integer))


def _refuse_falling(levels: Codes, where: str) -> None:
    if (levels[:, 1:] < levels[:, :-1]).any():
        raise CorruptionError(f"{where}: levels that fall along a row, or add up to more than the highest level")
