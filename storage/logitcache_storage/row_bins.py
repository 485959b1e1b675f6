"""In which bin of four histograms a row falls: its entropy, kept mass, label rank and label log-prob.

The bins never change (SPEC.md, section 10): a shard counts its rows by them once, when it is committed, and of every
sample it is kept in which bins it has rows, so that a bar of a histogram leads to the samples behind it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitcache_storage.statistics import RowStatistics

NUM_BINS = 32
"""Of every histogram as it is stored; those that no value falls in stay empty."""
NOT_KEPT = NUM_BINS - 1
"""The bin of labels outside the kept ids."""

_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
NATS_EDGES = (*(step * 10.0**power for power in (-3, -2, -1, 0) for step in _STEPS), 10.0)
"""Where the bins of the entropy meet: bin i holds values from edge i - 1 to below edge i; the first begins at 0, and
the last has no end."""
SURPRISE_EDGES = (*NATS_EDGES, 15.0, 20.0, 30.0)
"""The same for the label's log-prob, taken positive."""
TAIL_EDGES = tuple(step * 10.0**power for power in range(-7, 0) for step in (1.0, 3.0))
"""The same for the mass outside the kept ids, which is one minus the kept mass."""


@dataclass(frozen=True)
class Bin:
    """Values of one bar of a histogram; `low` and `high` are bounds, infinite where there is none."""

    number: int
    """Of the bin as it is stored. Bars stand in the order of their values, and not of these."""
    low: float
    high: float
    name: str
    """For people, without a unit: "0.5 to 0.7", "3 to 4", "not kept"."""


@dataclass(frozen=True)
class Binning:
    """One of the four histograms."""

    title: str
    unit: str
    """"nats", or "" where there is none."""
    number_of: Callable[[RowStatistics, npt.NDArray[np.float32]], npt.NDArray[np.integer]]
    """The bin of each row, [N], from statistics and `log_tail` of the rows."""
    bins_for: Callable[[int], tuple[Bin, ...]]
    """The bins that rows of k ids can fall in, in ascending order of values."""


def row_bins(rows: RowStatistics, log_tail: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.uint8]]:
    """The bin of each row in each of `HISTOGRAMS`, [N]."""
    return {name: binning.number_of(rows, log_tail).astype(np.uint8) for name, binning in HISTOGRAMS.items()}


def _rank_bins(k: int) -> tuple[Bin, ...]:
    """Ranks 1, 2, 3 to 4, 5 to 8, ...: the bin of rank r is the number of binary digits of r - 1."""
    bins = []
    for number in range(max(k - 1, 0).bit_length() + 1 if k else 0):
        low, high = (1 << number - 1) + 1 if number else 1, min(1 << number, k)
        bins.append(Bin(number, low, high, f"{low}" if low == high else f"{low} to {high}"))
    return (*bins, Bin(NOT_KEPT, k + 1, math.inf, "not kept"))


def _rank_numbers(rows: RowStatistics, _: npt.NDArray[np.float32]) -> npt.NDArray[np.integer]:
    # frexp gives the number of binary digits, exactly: ranks are far below 2^53.
    digits = np.frexp(np.maximum(rows.label_rank - 1, 0).astype(np.float64))[1]
    return np.where(rows.label_rank == 0, NOT_KEPT, digits)


def _entropy_bins(_: int) -> tuple[Bin, ...]:
    edges = (0.0, *NATS_EDGES, math.inf)
    return tuple(Bin(i, low, high, _between(low, high)) for i, (low, high) in enumerate(itertools.pairwise(edges)))


def _label_bins(_: int) -> tuple[Bin, ...]:
    edges = (0.0, *SURPRISE_EDGES, math.inf)
    bins = [
        Bin(i, -high, -low, f"below {-low:g}" if high == math.inf else f"{-high:g} to {-low or 0:g}")
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    return tuple(reversed(bins))


def _mass_bins(_: int) -> tuple[Bin, ...]:
    edges = (0.0, *TAIL_EDGES, 1.0)
    bins = [
        Bin(i, 1 - high, 1 - low, f"{_mass(high)} to {_mass(low)}")
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    return tuple(reversed(bins))


def _between(low: float, high: float) -> str:
    return f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"


def _mass(tail: float) -> str:
    """One minus the tail; from five nines on as a difference, whose digits nobody has to count."""
    return f"{1 - tail:.5g}" if tail >= 1e-4 or tail == 0 else f"1 - {tail:.0e}".replace("e-0", "e-")


HISTOGRAMS = {
    "entropy": Binning(
        "entropy", "nats", lambda rows, _: np.searchsorted(NATS_EDGES, rows.entropy, side="right"), _entropy_bins
    ),
    "kept_mass": Binning(
        "kept mass",
        "",
        lambda _, log_tail: np.searchsorted(np.log(TAIL_EDGES), log_tail.astype(np.float64), side="right"),
        _mass_bins,
    ),
    "label_rank": Binning("rank of the label", "", _rank_numbers, _rank_bins),
    "label_log_prob": Binning(
        "label log-prob",
        "nats",
        lambda rows, _: np.searchsorted(SURPRISE_EDGES, -rows.label_log_prob, side="right"),
        _label_bins,
    ),
}
"""By name, in the order in which they are stored."""
