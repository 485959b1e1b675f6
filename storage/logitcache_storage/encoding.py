"""Log-prob quantisation: TopKLogProbs to stored columns and back. Nothing else.

Shapes: N rows, k kept ids. A stored column is a numpy array whose first axis is the row.

The u8 and u10 precisions store how far each log-prob lies below the largest one, on a square-root scale: fine
steps where the mass is, coarse ones in the tail.

    level_i = round(L * sqrt((lp_1 - lp_i) / 32))        L = 255 (u8) or 1023 (u10)

lp_1 itself is not stored: the kept mass is 1 - exp(log_tail), so decoding shifts a row until it has that mass.
fp16 and fp32 store the log-probs. In which order ids and codes stand is for `id_layouts`. Where k is 0, the column
`label_log_prob` is the only one: the rest of a row says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.id_layouts import Columns, id_layout
from logitcache_storage.schema import PRECISIONS
from logitcache_storage.topk import TopKLogProbs

RANGE_NATS = 32.0
"""Log-probs further than this below the row's largest are stored as if they were this far below."""

ROWS_AT_ONCE = 1024
"""Rows decoded together: at k = 64 all intermediate values stay in a core's own cache."""

_LABEL = "label_log_prob"
_TOP_LEVEL = {"u8": 255, "u10": 1023}
_CODE_TYPE = {"u8": np.uint8, "u10": np.uint16, "fp16": np.float16, "fp32": np.float32}


def column_types(precision: str, layout: str, k: int) -> dict[str, np.dtype[Any]]:
    """Name of every stored column and type of one of its rows; those of ids and codes are arrays of k."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if k == 0:
        return {_LABEL: np.dtype(np.float32)}
    entries = {**id_layout(layout).id_types, "codes": _CODE_TYPE[precision]}
    rows = {"num_kept": np.int32, "log_tail": np.float32, _LABEL: np.float32}
    return {
        **{name: np.dtype((dtype, (k,))) for name, dtype in entries.items()},
        **{name: np.dtype(dtype) for name, dtype in rows.items()},
    }


def encode(topk: TopKLogProbs, precision: str, layout: str) -> Columns:
    """Stored columns of checked rows."""
    types = column_types(precision, layout, topk.k)
    if topk.k == 0:
        return {_LABEL: np.ascontiguousarray(topk.label_log_prob, dtype=np.float32)}
    kept = topk.kept
    last = np.take_along_axis(topk.log_probs, topk.num_kept[:, None] - 1, axis=1)
    log_probs = np.where(kept, topk.log_probs, last)
    if precision in _TOP_LEVEL:
        below = np.minimum(log_probs[:, :1] - log_probs, RANGE_NATS)
        codes = np.rint(_TOP_LEVEL[precision] * np.sqrt(below / RANGE_NATS))
    elif precision == "fp16":
        codes = np.maximum(log_probs, np.finfo(np.float16).min)
    else:
        codes = log_probs
    columns: Columns = {
        **id_layout(layout).pack(np.where(kept, topk.ids, 0), codes.astype(_CODE_TYPE[precision]), kept),
        "num_kept": topk.num_kept,
        "log_tail": topk.log_tail,
        _LABEL: topk.label_log_prob,
    }
    return {name: np.ascontiguousarray(columns[name], dtype=dtype.base) for name, dtype in types.items()}


def decode(
    columns: Mapping[str, npt.NDArray[Any]], precision: str, layout: str, *, where: str = "columns"
) -> TopKLogProbs:
    """The rows behind stored columns. Kept mass plus tail is one, and rows do not increase.

    `where` names the columns in errors.

    Raises:
        CorruptionError: a column is missing, or is not what precision and layout ask for in type, shape or values.
    """
    if columns.keys() == {_LABEL}:
        return _labels_only(columns[_LABEL], where)
    _check_columns(columns, precision, layout, where)
    num_kept, log_tail = columns["num_kept"], columns["log_tail"]
    num_rows, k = columns["codes"].shape
    ids, log_probs = np.empty((num_rows, k), np.int32), np.empty((num_rows, k), np.float32)
    all_kept = int(num_kept.min(initial=k)) == k
    entries = {name: column for name, column in columns.items() if column.ndim == 2}
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        beyond = None if all_kept else np.arange(k) >= num_kept[rows, None]
        block = {name: column[rows] for name, column in entries.items()}
        codes = id_layout(layout).unpack(block, ids[rows], beyond, where)
        _fill(log_probs[rows], codes, precision, beyond, where)
        if precision != "fp32":
            _shift_to_mass(log_probs[rows], log_tail[rows])
        if beyond is not None:
            ids[rows][beyond] = 0
    return TopKLogProbs(ids, log_probs, num_kept, log_tail, columns[_LABEL])


def log1mexp(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """log(1 - exp(x)) for x <= 0, accurate at both ends (Maechler 2012, eq. 7)."""
    with np.errstate(divide="ignore"):
        found = np.log1p(-np.exp(x))
        near_zero = x > -np.log(2.0)
        found[near_zero] = np.log(-np.expm1(x[near_zero]))
    return found


def _labels_only(column: npt.NDArray[Any], where: str) -> TopKLogProbs:
    if column.dtype != np.float32 or column.ndim != 1:
        raise CorruptionError(f"{where}: {_LABEL}: expected a column of float32, found {column.dtype} {column.shape}")
    return TopKLogProbs.of_labels(column)


def _check_columns(columns: Mapping[str, npt.NDArray[Any]], precision: str, layout: str, where: str) -> None:
    shape = columns["ids"].shape if "ids" in columns else ()
    k = shape[1] if len(shape) == 2 else 0
    for name, dtype in column_types(precision, layout, max(k, 1)).items():
        expected = (*shape[:1], *dtype.shape)
        found = (columns[name].dtype, columns[name].shape) if name in columns else "nothing"
        if found != (dtype.base, expected):
            raise CorruptionError(
                f"{where}: column {name!r} of precision {precision}, id layout {layout}:"
                f" expected {dtype.base} {expected}, found {found}"
            )
    num_kept = columns["num_kept"]
    if len(num_kept) and not 1 <= int(num_kept.min()) <= int(num_kept.max()) <= k:
        raise CorruptionError(
            f"{where}: num_kept from {num_kept.min()} to {num_kept.max()}, expected between 1 and {k}"
        )
    if not (columns["log_tail"] < 0).all():
        raise CorruptionError(f"{where}: log_tail is NaN or not below 0: nothing is left for the kept ids")


def _fill(
    out: npt.NDArray[np.float32],
    codes: npt.NDArray[Any],
    precision: str,
    beyond: npt.NDArray[np.bool_] | None,
    where: str,
) -> None:
    """Log-probs up to a shift of the row; -inf beyond `num_kept`."""
    out[...] = codes
    if beyond is not None:
        out[beyond] = 0.0
    if precision in _TOP_LEVEL:
        top_level = _TOP_LEVEL[precision]
        if out.max(initial=0.0) > top_level:
            raise CorruptionError(f"{where}: a level of {out.max():.0f}, above the highest level, {top_level}")
        np.square(out, out=out)
        out *= np.float32(-RANGE_NATS / top_level**2)
    if beyond is not None:
        out[beyond] = -np.inf


def _shift_to_mass(log_probs: npt.NDArray[np.float32], log_tail: npt.NDArray[np.float32]) -> None:
    """Shift each row, in place, until its mass is 1 - exp(log_tail)."""
    mass = np.einsum("ij->i", np.exp(log_probs))  # on short rows several times as fast as .sum(axis=1)
    log_probs += (log1mexp(log_tail) - np.log(mass))[:, None]
    if log_probs[:, 0].max(initial=0.0) > 0.0:  # by rounding
        np.minimum(log_probs, np.float32(0.0), out=log_probs)
