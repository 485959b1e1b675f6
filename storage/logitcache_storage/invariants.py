"""What must hold for every row of a cache; checked before a shard is written and by `verify --deep`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from logitcache_storage.encoding import RANGE_NATS
from logitcache_storage.errors import CorruptionError
from logitcache_storage.topk import TopKLogProbs

MASS_TOLERANCE = 1e-3
"""Allowed |kept mass + tail - 1|: float32 rounding of up to 2^17 terms, and of a teacher that scores in bf16."""

LABEL_TOLERANCE = {"u8": (0.25, 0.0), "u10": (0.0625, 0.0), "fp16": (0.01, 1e-3), "fp32": (1e-3, 1e-6)}
"""Allowed difference between the label's log-prob and its entry among the ids: nats, and a part of its size.

The coarsest step of u8 is 32 * (1 - (254/255)^2) = 0.25 nats, so rounding is off by at most half of that, and the
shift that makes the row's mass right by at most as much again; u10 a quarter. fp16 rounds to 2^-11 of the size."""


def check_rows(
    topk: TopKLogProbs,
    labels: npt.NDArray[np.int32],
    vocab_size: int,
    *,
    where: str,
    precision: str | None = None,
) -> None:
    """Check rows against the observed tokens.

    Args:
        topk: N rows.
        labels: the observed target tokens, [N].
        vocab_size: number of rows of the teacher's head.
        where: names the rows in errors, e.g. "shards/00017-3f9c".
        precision: the encoding the rows went through; None before encoding.

    Raises:
        CorruptionError: the first broken invariant, with the row where it is broken.
    """
    if len(topk) != len(labels):
        raise CorruptionError(f"{where}: {len(topk)} rows for {len(labels)} target positions")
    if len(topk) == 0:
        return
    kept = topk.kept
    least = min(1, topk.k)
    in_range = (topk.num_kept >= least) & (topk.num_kept <= topk.k)
    _refuse(~in_range, where, f"num_kept outside [{least}, {topk.k}]", topk.num_kept)
    _refuse(np.any((topk.ids < 0) | (topk.ids >= vocab_size), axis=1), where, f"ids outside [0, {vocab_size})")
    _refuse((labels < 0) | (labels >= vocab_size), where, f"label outside [0, {vocab_size})", labels)
    distinct = np.sort(np.where(kept, topk.ids, -1 - np.arange(topk.k)), axis=1)
    _refuse(np.any(np.diff(distinct, axis=1) == 0, axis=1), where, "the same id twice in a row")
    with np.errstate(invalid="ignore"):
        bad = ~(np.isfinite(topk.log_probs) & (topk.log_probs <= 0)) & kept
        _refuse(np.any(bad, axis=1), where, "log-probs that are not finite or above 0")
        falling = np.where(kept, topk.log_probs, -np.inf)
        _refuse(np.any(falling[:, 1:] > falling[:, :-1], axis=1), where, "log-probs that increase along a row")
        if topk.k:
            _refuse(~(topk.log_tail < 0), where, "log_tail that is NaN or not below 0", topk.log_tail)
        else:
            _refuse(topk.log_tail != 0, where, "log_tail other than 0, with no id kept", topk.log_tail)
        finite_label = np.isfinite(topk.label_log_prob) & (topk.label_log_prob <= 0)
        _refuse(~finite_label, where, "label_log_prob that is not finite or above 0", topk.label_log_prob)
    mass = np.exp(falling.astype(np.float64)).sum(1) + np.exp(topk.log_tail.astype(np.float64))
    _refuse(np.abs(mass - 1) > MASS_TOLERANCE, where, "kept mass + tail that is not one", mass)
    if topk.k:
        _refuse_labels(topk, labels, where, precision)


def _refuse_labels(topk: TopKLogProbs, labels: npt.NDArray[np.int32], where: str, precision: str | None) -> None:
    is_label = (topk.ids == labels[:, None]) & topk.kept
    entry = np.where(is_label, topk.log_probs, 0.0).sum(1)
    expected = topk.label_log_prob
    if precision in ("u8", "u10"):
        expected = np.maximum(expected, topk.log_probs[:, 0] - RANGE_NATS)
    nats, part = LABEL_TOLERANCE[precision or "fp32"]
    off = is_label.any(1) & (np.abs(entry - expected) > nats + part * np.abs(expected))
    _refuse(off, where, "label_log_prob that differs from its entry among the ids", topk.label_log_prob)


def _refuse(
    broken: npt.NDArray[np.bool_], where: str, what: str, values: npt.NDArray[np.generic] | None = None
) -> None:
    if not broken.any():
        return
    row = int(np.argmax(broken))
    found = "" if values is None else f" (found {values[row]})"
    raise CorruptionError(
        f"{where}: {what} at row {row}{found}; {int(broken.sum())} of {len(broken)} rows are affected"
    )
