"""Statistics of a shard against a loop over its samples, and what a reader refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from logitcache_storage.errors import CorruptionError
from logitcache_storage.row_bins import HISTOGRAMS
from logitcache_storage.statistics_object import (
    COLUMNS,
    COUNT_BYTES,
    SAMPLE_BYTES,
    ShardStatistics,
    check_statistics,
    dump_statistics,
    parse_statistics,
    shard_statistics,
)
from logitcache_storage.testing import make_topk
from logitcache_storage.topk import TopKLogProbs

LENGTHS = [3, 1, 7, 2, 12]


def rows_of(k: int = 4, seed: int = 0) -> tuple[TopKLogProbs, np.ndarray]:
    labels = np.random.default_rng(seed).integers(20, size=sum(LENGTHS)).astype(np.int32)
    return make_topk(len(labels), k, 20, seed=seed, labels=labels).keep_mass(0.95), labels


def one_sample(topk: TopKLogProbs, labels: np.ndarray) -> dict[str, Any]:
    """The columns of a sample, row by row, in Python's own numbers."""
    entropies, masses, doubts, ranks = [], [], [], []
    for row in range(len(topk)):
        kept = [float(x) for x in topk.log_probs[row, : topk.num_kept[row]]]
        ids = topk.ids[row, : topk.num_kept[row]].tolist()
        outcomes = [*kept, float(topk.log_tail[row])]
        entropies.append(-sum(math.exp(x) * x for x in outcomes if x > -math.inf))
        masses.append(math.fsum(map(math.exp, kept)))
        ranks.append(ids.index(labels[row]) + 1 if labels[row] in ids else 0)
        doubts.append(math.exp(kept[0]) if not ranks[-1] else 0.0)
    label_log_probs = topk.label_log_prob.tolist()
    return {
        "num_rows": len(topk),
        "mean_label_log_prob": math.fsum(label_log_probs) / len(topk),
        "min_label_log_prob": min(label_log_probs),
        "surprising_row": label_log_probs.index(min(label_log_probs)),
        "mean_entropy": math.fsum(entropies) / len(topk),
        "max_entropy": max(entropies),
        "mean_kept_mass": math.fsum(masses) / len(topk),
        "num_top_1": ranks.count(1),
        "num_top_k": len(topk) - ranks.count(0),
        "doubt": max(doubts),
        "doubtful_row": doubts.index(max(doubts)),
        "label_rank_bins": sum({1 << (31 if not rank else len(f"{rank - 1:b}".lstrip("0"))) for rank in ranks}),
    }


@pytest.mark.parametrize("k", [1, 4])
def test_against_a_loop(k: int) -> None:
    topk, labels = rows_of(k)
    found = shard_statistics(topk, labels, LENGTHS)
    stop = 0
    for sample, length in enumerate(LENGTHS):
        start, stop = stop, stop + length
        for name, expected in one_sample(topk[start:stop], labels[start:stop]).items():
            assert found.columns[name][sample] == pytest.approx(expected, rel=1e-6, abs=1e-7), name
    assert found.columns["doubt"].max() > 0 and found.columns["num_top_k"].max() > 0


def test_a_sample_is_in_the_bins_of_its_rows_and_no_others() -> None:
    topk, labels = rows_of()
    found, by_row = shard_statistics(topk, labels, LENGTHS), shard_statistics(topk, labels, [1] * len(labels))
    edges = np.cumsum([0, *LENGTHS])
    for number, name in enumerate(HISTOGRAMS):
        rows = by_row.columns[f"{name}_bins"]
        assert all(bin(mask).count("1") == 1 for mask in rows.tolist())
        assert found.counts[number].tolist() == [int((rows == 1 << b).sum()) for b in range(32)]
        for sample, mask in enumerate(found.columns[f"{name}_bins"].tolist()):
            assert {1 << b for b in range(32) if mask >> b & 1} == set(rows[edges[sample] : edges[sample + 1]].tolist())


def test_there_and_back() -> None:
    topk, labels = rows_of()
    found = shard_statistics(topk, labels, LENGTHS)
    data = dump_statistics(found)
    assert len(data) == COUNT_BYTES + SAMPLE_BYTES * len(LENGTHS) == 512 + 60 * len(LENGTHS)
    again = parse_statistics(data, len(topk), where="here")
    assert np.array_equal(again.counts, found.counts)
    assert all(np.array_equal(again.columns[name], found.columns[name]) for name in COLUMNS)
    assert dump_statistics(again) == data
    check_statistics(again, found, where="here")


def test_no_rows() -> None:
    empty = shard_statistics(make_topk(0, 4, 20), np.zeros(0, np.int32), [])
    assert not parse_statistics(dump_statistics(empty), 0, where="here").counts.any()


@pytest.mark.parametrize("lengths", [[3, 1], [*LENGTHS, 1], [0, *LENGTHS], [sum(LENGTHS) + 1, -1]])
def test_samples_that_do_not_cover_the_rows(lengths: list[int]) -> None:
    topk, labels = rows_of()
    with pytest.raises(CorruptionError, match="for 25 rows"):
        shard_statistics(topk, labels, lengths)


def _set(name: str, value: float) -> Callable[[ShardStatistics], None]:
    def change(found: ShardStatistics) -> None:
        found.columns[name][2] = value

    return change


def _count(found: ShardStatistics) -> None:
    found.counts[1, 3] += 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("num_rows", 8), "samples of 26 rows in a shard of 25"),
        (_set("num_rows", 0), "samples of 18 rows"),
        (_count, r"histograms of \[25, 26, 25, 25\] rows"),
        (_set("surprising_row", 7), "surprising_row outside"),
        (_set("doubtful_row", 9), "doubtful_row outside"),
        (_set("num_top_1", 8), "num_top_1 above"),
        (_set("mean_entropy", math.nan), "mean_entropy that is not finite"),
        (_set("max_entropy", -1.0), "max_entropy .* wrong sign"),
        (_set("mean_label_log_prob", 0.5), "mean_label_log_prob .* wrong sign"),
        (_set("min_label_log_prob", -math.inf), "min_label_log_prob that is not finite"),
    ],
)
def test_what_a_reader_refuses(change: Callable[[ShardStatistics], None], match: str) -> None:
    topk, labels = rows_of()
    found = shard_statistics(topk, labels, LENGTHS)
    change(found)
    with pytest.raises(CorruptionError, match=f"here: {match}"):
        parse_statistics(dump_statistics(found), len(topk), where="here")


@pytest.mark.parametrize("cut", [1, 60, 511, -1])
def test_other_sizes_are_refused(cut: int) -> None:
    topk, labels = rows_of()
    data = dump_statistics(shard_statistics(topk, labels, LENGTHS))
    with pytest.raises(CorruptionError, match="here: "):
        parse_statistics(data[:-cut] if cut > 0 else data + b"\0", len(topk), where="here")


def test_any_bytes_are_refused_or_make_sense() -> None:
    """Under a good checksum may stand what another writer made of it: no sample may point outside its rows."""
    topk, labels = rows_of()
    good, rng = dump_statistics(shard_statistics(topk, labels, LENGTHS)), np.random.default_rng(0)
    num_read = 0
    for _ in range(300):
        data = bytearray(good)
        for place in rng.integers(COUNT_BYTES if rng.uniform() < 0.8 else 0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            found = parse_statistics(bytes(data), len(topk), where="here")
        except CorruptionError:
            continue
        num_read += 1
        rows = found.columns["num_rows"]
        assert rows.sum() == len(topk) and (found.columns["surprising_row"] < rows).all()
        assert all(np.isfinite(column).all() for column in found.columns.values())
    assert 0 < num_read < 300


@pytest.mark.parametrize("name", [*COLUMNS, "counts"])
def test_statistics_of_other_rows_are_told_from_these(name: str) -> None:
    topk, labels = rows_of()
    found, expected = (shard_statistics(topk, labels, LENGTHS) for _ in range(2))
    if name == "counts":
        found.counts[2, :2] = found.counts[2, 1::-1]
    elif name.endswith("_bins"):
        found.columns[name][2] ^= 1 << 29
    else:
        found.columns[name][2] += 1
    if name == "doubtful_row":  # which of two equally sure ones is left to the machine
        check_statistics(found, expected, where="here")
        return
    with pytest.raises(CorruptionError, match=r"here: (its|\w+ of its sample 2 is)"):
        check_statistics(found, expected, where="here")
