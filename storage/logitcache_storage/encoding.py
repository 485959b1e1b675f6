"""Log-prob quantisation: TopKLogProbs to stored columns and back. Nothing else.

Shapes: N rows, k kept ids. A stored column is a numpy array whose first axis is the row.

The u8 and u10 precisions store how far each log-prob lies below the largest one, on a square-root scale: fine
steps where the mass is, coarse ones in the tail. Neighbours differ little, so what is kept is their difference:

    level_i = round(L * sqrt((lp_1 - lp_i) / 32))        L = 255 (u8) or 1023 (u10)
    code_1  = level_1 = 0,  code_i = level_i - level_(i-1) >= 0

lp_1 itself is not stored: the kept mass is 1 - exp(log_tail), so decoding shifts a row until it has that mass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.schema import PRECISIONS
from logitcache_storage.topk import TopKLogProbs

Columns = dict[str, npt.NDArray[Any]]

RANGE_NATS = 32.0
"""Log-probs further than this below the row's largest are stored as if they were this far below."""

ROWS_AT_ONCE = 1024
"""Rows decoded together: at k = 64 all intermediate values stay in a core's own cache."""

_NUM_LEVELS = {"u8": 256, "u10": 1024}
_CODE_TYPE = {"u8": np.uint8, "u10": np.uint16, "fp16": np.float16, "fp32": np.float32}


def column_types(precision: str) -> dict[str, np.dtype[Any]]:
    """Name and type of every stored column; `ids` and `codes` are [N, k], the others [N]."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    types = {
        "ids": np.int32,
        "codes": _CODE_TYPE[precision],
        "num_kept": np.int32,
        "log_tail": np.float32,
        "label_log_prob": np.float32,
    }
    return {name: np.dtype(dtype) for name, dtype in types.items()}


def encode(topk: TopKLogProbs, precision: str) -> Columns:
    """Stored columns of checked rows. Beyond `num_kept` ids are 0 and the last code is repeated."""
    types = column_types(precision)
    kept = topk.kept
    last = np.take_along_axis(topk.log_probs, topk.num_kept[:, None] - 1, axis=1)
    log_probs = np.where(kept, topk.log_probs, last)
    if precision in _NUM_LEVELS:
        top_level = _NUM_LEVELS[precision] - 1
        below = np.minimum(log_probs[:, :1] - log_probs, RANGE_NATS)
        levels = np.rint(top_level * np.sqrt(below / RANGE_NATS)).astype(np.int32)
        codes = np.diff(levels, axis=1, prepend=np.int32(0))
    elif precision == "fp16":
        codes = np.maximum(log_probs, np.finfo(np.float16).min)
    else:
        codes = log_probs
    columns: Columns = {
        "ids": np.where(kept, topk.ids, 0),
        "codes": codes,
        "num_kept": topk.num_kept,
        "log_tail": topk.log_tail,
        "label_log_prob": topk.label_log_prob,
    }
    return {name: np.ascontiguousarray(column, dtype=types[name]) for name, column in columns.items()}


def decode(columns: Mapping[str, npt.NDArray[Any]], precision: str, *, where: str = "columns") -> TopKLogProbs:
    """The rows behind stored columns. Kept mass plus tail is one, and rows do not increase.

    `where` names the columns in errors.

    Raises:
        CorruptionError: a column is missing, or is not what the precision asks for in type, shape or values.
    """
    _check_columns(columns, precision, where)
    codes, num_kept, log_tail = columns["codes"], columns["num_kept"], columns["log_tail"]
    num_rows, k = codes.shape
    log_probs = np.empty((num_rows, k), dtype=np.float32)
    all_kept = int(num_kept.min(initial=k)) == k
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        out = log_probs[rows]
        beyond = None if all_kept else np.arange(k) >= num_kept[rows, None]
        if precision in _NUM_LEVELS:
            _fill_from_levels(out, codes[rows], _NUM_LEVELS[precision], where)
        else:
            out[...] = codes[rows]
        if beyond is not None:
            out[beyond] = -np.inf
        if precision != "fp32":
            _shift_to_mass(out, log_tail[rows])
    return TopKLogProbs(columns["ids"], log_probs, num_kept, log_tail, columns["label_log_prob"])


def log1mexp(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """log(1 - exp(x)) for x <= 0, accurate at both ends (Maechler 2012, eq. 7)."""
    with np.errstate(divide="ignore"):
        return np.where(x > -np.log(2.0), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def _check_columns(columns: Mapping[str, npt.NDArray[Any]], precision: str, where: str) -> None:
    shape = columns["ids"].shape if "ids" in columns else ()
    for name, dtype in column_types(precision).items():
        expected = shape if name in ("ids", "codes") else shape[:1]
        found = (columns[name].dtype, columns[name].shape) if name in columns else "nothing"
        if len(shape) != 2 or found != (dtype, expected):
            raise CorruptionError(
                f"{where}: column {name!r} of precision {precision}: expected {dtype} {expected}, found {found}"
            )
    num_kept = columns["num_kept"]
    if len(num_kept) and not 1 <= int(num_kept.min()) <= int(num_kept.max()) <= shape[1]:
        raise CorruptionError(
            f"{where}: num_kept from {num_kept.min()} to {num_kept.max()}, expected between 1 and {shape[1]}"
        )
    if not (columns["log_tail"] < 0).all():
        raise CorruptionError(f"{where}: log_tail is NaN or not below 0: nothing is left for the kept ids")


def _fill_from_levels(out: npt.NDArray[np.float32], codes: npt.NDArray[Any], num_levels: int, where: str) -> None:
    """Distances below the row's largest; levels are small integers, so they come from a table."""
    levels = np.cumsum(codes, axis=1, dtype=codes.dtype)
    has_wrapped = (levels[:, 1:] < levels[:, :-1]).any()
    if has_wrapped or int(levels.max(initial=0)) >= num_levels:
        raise CorruptionError(f"{where}: the codes of a row add up to more than the highest level, {num_levels - 1}")
    below = -RANGE_NATS * (np.arange(num_levels, dtype=np.float64) / (num_levels - 1)) ** 2
    np.take(below.astype(np.float32), levels, out=out, mode="clip")


def _shift_to_mass(log_probs: npt.NDArray[np.float32], log_tail: npt.NDArray[np.float32]) -> None:
    """Shift each row, in place, until its mass is 1 - exp(log_tail)."""
    shift = log1mexp(log_tail) - np.log(np.exp(log_probs).sum(axis=1))
    log_probs += shift[:, None]
    np.minimum(log_probs, np.float32(0.0), out=log_probs)
