"""Bins against the values that they say they hold, and against edges written down once more."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from logitcache_storage.row_bins import HISTOGRAMS, NOT_KEPT, NUM_BINS, row_bins
from logitcache_storage.statistics import RowStatistics

NATS = "0.001 0.0015 0.002 0.003 0.005 0.007 0.01 0.015 0.02 0.03 0.05 0.07 0.1 0.15 0.2 0.3 0.5 0.7 1 1.5 2 3 5 7 10"
EDGES = {
    "entropy": [*map(float, NATS.split())],
    "kept_mass": [1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3],
    "label_log_prob": [*map(float, NATS.split()), 15.0, 20.0, 30.0],
}


def numbers_of(entropy: float = 1.0, tail: float = 0.5, rank: int = 1, label_log_prob: float = -1.0) -> dict[str, int]:
    """The bins of one row."""
    columns = (np.array([value]) for value in (entropy, 1 - tail, 0.5, label_log_prob))
    rows = RowStatistics(*columns, label_rank=np.array([rank]))
    with np.errstate(divide="ignore"):
        found = row_bins(rows, np.log(np.array([tail], np.float32)))
    return {name: int(number[0]) for name, number in found.items()}


@pytest.mark.parametrize("name", EDGES)
def test_values_near_every_edge(name: str) -> None:
    argument, sign = {"entropy": ("entropy", 1), "kept_mass": ("tail", 1), "label_log_prob": ("label_log_prob", -1)}[
        name
    ]
    edges = EDGES[name]
    for i, edge in enumerate(edges):
        # A thousandth away: tails are rounded to float32 and go through a logarithm.
        assert numbers_of(**{argument: sign * edge * 0.999})[name] == i
        assert numbers_of(**{argument: sign * edge * 1.001})[name] == i + 1
    assert numbers_of(**{argument: 0.0})[name] == 0
    assert len(edges) < NUM_BINS


@pytest.mark.parametrize("k", [1, 2, 3, 8, 64, 100])
def test_ranks(k: int) -> None:
    bins = HISTOGRAMS["label_rank"].bins_for(k)
    for rank in range(1, k + 1):
        number = numbers_of(rank=rank)["label_rank"]
        assert number == len(f"{rank - 1:b}".lstrip("0"))
        assert [found.number for found in bins if found.low <= rank <= found.high] == [number]
    assert numbers_of(rank=0)["label_rank"] == NOT_KEPT == bins[-1].number
    assert [found.name for found in HISTOGRAMS["label_rank"].bins_for(6)] == ["1", "2", "3 to 4", "5 to 6", "not kept"]


@pytest.mark.parametrize("name", EDGES)
def test_bars_stand_side_by_side_and_hold_what_they_say(name: str) -> None:
    bins = HISTOGRAMS[name].bins_for(64)
    assert sorted(found.number for found in bins) == list(range(len(EDGES[name]) + 1))
    assert all(left.high == right.low for left, right in itertools.pairwise(bins))
    for found in bins:
        low, high = max(found.low, -40.0), min(found.high, 40.0)
        middle = (low + high) / 2
        argument = {"entropy": "entropy", "label_log_prob": "label_log_prob"}.get(name)
        values = {argument: middle} if argument else {"tail": 1 - middle}
        assert numbers_of(**values)[name] == found.number
    assert (bins[0].low, bins[-1].high) in {(0.0, math.inf), (0.0, 1.0), (-math.inf, 0.0)}


def test_names_are_for_people() -> None:
    names = {name: [found.name for found in HISTOGRAMS[name].bins_for(8)] for name in HISTOGRAMS}
    assert names["entropy"][:2] == ["0 to 0.001", "0.001 to 0.0015"] and names["entropy"][-1] == "10 or more"
    assert names["label_log_prob"][:2] == ["below -30", "-30 to -20"] and names["label_log_prob"][-1] == "-0.001 to 0"
    assert names["kept_mass"][:3] == ["0 to 0.7", "0.7 to 0.9", "0.9 to 0.97"]
    assert names["kept_mass"][-1] == "1 - 1e-7 to 1"
