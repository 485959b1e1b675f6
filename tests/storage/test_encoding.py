"""Quantisation against an oracle in float64 that works row by row, and what it costs in nats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from logitcache_storage.encoding import RANGE_NATS, column_types, decode, encode, log1mexp
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.schema import ID_LAYOUTS, MAX_SPLIT_VOCAB, PRECISIONS
from logitcache_storage.testing import make_topk
from logitcache_storage.topk import TopKLogProbs

NUM_LEVELS = {"u8": 255, "u10": 1023}


def rows_of(weights: np.ndarray, k: int, num_kept: np.ndarray | None = None) -> TopKLogProbs:
    """Exact top-k rows of the distributions softmax(weights), [N, V], by sorting in float64."""
    log_probs = weights - np.logaddexp.reduce(weights, axis=1, keepdims=True)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    falling = np.take_along_axis(log_probs, order, axis=1)
    if num_kept is None:
        num_kept = np.full(len(weights), k)
    tail = [np.logaddexp.reduce(row[n:]) if n < row.size else -np.inf for row, n in zip(falling, num_kept, strict=True)]
    kept = np.arange(k) < num_kept[:, None]
    return TopKLogProbs(
        np.where(kept, order[:, :k], 0).astype(np.int32),
        np.where(kept, falling[:, :k], -np.inf).astype(np.float32),
        num_kept.astype(np.int32),
        np.asarray(tail, dtype=np.float32),
        falling[:, -1].astype(np.float32),
    )


def peaked_rows(num_rows: int, k: int, vocab_size: int, seed: int) -> TopKLogProbs:
    """Rows whose probability falls with a power of the rank: entropy 0.9 nats in the mean, 0.4 in the median."""
    rng = np.random.default_rng(seed)
    steepness = 1.2 * (10 / 1.2) ** rng.uniform(size=(num_rows, 1))
    weights = -steepness * np.log(np.arange(1, vocab_size + 1)) + rng.normal(0, 0.3, size=(num_rows, vocab_size))
    return rows_of(weights, k)


@st.composite
def any_rows(draw: st.DrawFn) -> TopKLogProbs:
    k = draw(st.integers(1, 70))
    vocab_size = k + draw(st.sampled_from([0, 1, 5, 300]))
    num_rows = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = rng.normal(size=(num_rows, vocab_size)) * draw(st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]))
    if draw(st.booleans()):
        weights = np.round(weights)  # ties
    num_kept = rng.integers(1, k + 1, size=num_rows) if draw(st.booleans()) else None
    topk = rows_of(weights, k, num_kept)
    largest = draw(st.sampled_from([vocab_size, 2**16, 2**16 + 1, 2**18, MAX_SPLIT_VOCAB, MAX_SPLIT_VOCAB + 1, 2**31]))
    if largest > vocab_size:
        spread = rng.permutation(np.append(rng.choice(largest - 1, vocab_size - 1, replace=False), largest - 1))
        topk = replace(topk, ids=np.where(topk.kept, spread[topk.ids], 0).astype(np.int32))
    return topk


@settings(deadline=None, max_examples=300)
@given(topk=any_rows(), precision=st.sampled_from(PRECISIONS), layout=st.sampled_from(ID_LAYOUTS))
def test_decoded_rows_are_distributions(topk: TopKLogProbs, precision: str, layout: str) -> None:
    assume(layout != "split" or topk.ids.max() < MAX_SPLIT_VOCAB)
    found = decode(encode(topk, precision, layout), precision, layout)
    for name in ("num_kept", "log_tail", "label_log_prob"):
        assert np.array_equal(getattr(found, name), getattr(topk, name)), name
    if layout != "ascending":
        assert np.array_equal(found.ids, topk.ids)
    for row in range(len(topk)):
        assert sorted(found.ids[row]) == sorted(topk.ids[row])
        n = topk.num_kept[row]
        inside, beyond = found.log_probs[row, :n].astype(np.float64), found.log_probs[row, n:]
        assert (beyond == -np.inf).all()
        assert (inside <= 0).all() and (np.diff(inside) <= 0).all()
        # float32: each of up to 70 terms is off by 2^-24 of its size, as are their sum and its logarithm.
        assert np.exp(inside).sum() + np.exp(np.float64(topk.log_tail[row])) == pytest.approx(1.0, abs=4e-6)


@settings(deadline=None, max_examples=200)
@given(topk=any_rows(), precision=st.sampled_from(PRECISIONS))
def test_layouts_hold_the_same_rows(topk: TopKLogProbs, precision: str) -> None:
    """Each id has the log-prob that it has in the plain layout; in `ascending`, equal ones stand by ascending id."""
    plain = decode(encode(topk, precision, "plain"), precision, "plain")
    for layout in ("ascending", "split") if topk.ids.max() < MAX_SPLIT_VOCAB else ("ascending",):
        found = decode(encode(topk, precision, layout), precision, layout)
        assert np.array_equal(found.log_probs, plain.log_probs)
        for row, n in enumerate(topk.num_kept):
            expected = [(-lp, id_) for lp, id_ in zip(plain.log_probs[row, :n], plain.ids[row, :n], strict=True)]
            if layout == "ascending":
                expected.sort()
            assert [
                (-lp, id_) for lp, id_ in zip(found.log_probs[row, :n], found.ids[row, :n], strict=True)
            ] == expected
            assert not found.ids[row, n:].any()


@settings(deadline=None, max_examples=100)
@given(topk=any_rows(), precision=st.sampled_from(["u8", "u10"]))
def test_levels_against_float64(topk: TopKLogProbs, precision: str) -> None:
    top = NUM_LEVELS[precision]
    columns = encode(topk, precision, "plain")
    found = decode(columns, precision, "plain")
    for row in range(len(topk)):
        n = int(topk.num_kept[row])
        log_probs = topk.log_probs[row, :n].astype(np.float64)
        exact = top * np.sqrt(np.minimum(log_probs[0] - log_probs, 32.0) / 32.0)
        levels = np.cumsum(columns["codes"][row].astype(np.int64))
        # float32 arithmetic may round to the other neighbour where two levels are equally near.
        assert np.abs(levels[:n] - exact).max() <= 0.5 + 2e-3
        assert (levels[n:] == levels[n - 1]).all()
        below = -32.0 * (levels[:n] / top) ** 2
        kept_mass = -np.expm1(np.float64(topk.log_tail[row]))
        expected = below + np.log(kept_mass) - np.log(np.exp(below).sum())
        np.testing.assert_allclose(found.log_probs[row, :n], np.minimum(expected, 0.0), atol=8e-6, rtol=3e-7)


def divergence(exact: TopKLogProbs, found: TopKLogProbs) -> np.ndarray:
    """KL(exact || found) of each row in nats; the tail is stored as it is, and adds nothing."""
    p, q = exact.log_probs.astype(np.float64), found.log_probs.astype(np.float64)
    return (np.exp(p) * (p - q)).sum(1)


@pytest.mark.parametrize(("precision", "limit"), [("u8", 5e-5), ("u10", 3e-6)])
def test_divergence_of_levels(precision: str, limit: float) -> None:
    # A log-prob b nats below the top lies on a step of db/dl = (64/L) sqrt(b/32) nats, so rounding it has variance
    # (64/L)^2 (b/32) / 12, and to second order KL is half the mean variance: (16/3) E[b] / L^2. Entries near the
    # top are off by less than that: level 0 is exact.
    topk = peaked_rows(400, 64, 2000, seed=3)
    found = divergence(topk, decode(encode(topk, precision, "plain"), precision, "plain")).mean()
    distance = (np.exp(topk.log_probs) * (topk.log_probs[:, :1] - topk.log_probs)).sum(1).mean()
    expected = 16 / 3 * distance / NUM_LEVELS[precision] ** 2
    assert 0.85 * expected <= found <= 1.05 * expected
    assert found <= limit


def test_divergence_of_fp16() -> None:
    # Half a unit in the last place is at most 2^-11 of the size: variance |lp|^2 2^-22 / 3 at most.
    topk = peaked_rows(400, 64, 2000, seed=3)
    found = divergence(topk, decode(encode(topk, "fp16", "plain"), "fp16", "plain")).mean()
    bound = 0.5 * (np.exp(topk.log_probs) * topk.log_probs.astype(np.float64) ** 2).sum(1).mean() * 2.0**-22 / 3
    assert -1e-9 <= found <= bound


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_id(precision: str) -> None:
    topk = rows_of(np.random.default_rng(0).normal(size=(50, 9)) * 3, k=1)
    found = decode(encode(topk, precision, "plain"), precision, "plain")
    # The only id has whatever mass the tail leaves.
    np.testing.assert_allclose(found.log_probs, topk.log_probs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_vocabulary_has_no_tail(precision: str) -> None:
    topk = rows_of(np.random.default_rng(0).normal(size=(20, 11)), k=11)
    assert (topk.log_tail == -np.inf).all()
    found = decode(encode(topk, precision, "plain"), precision, "plain")
    np.testing.assert_allclose(np.exp(found.log_probs.astype(np.float64)).sum(1), 1.0, atol=2e-6)


@pytest.mark.parametrize("layout", ID_LAYOUTS)
@pytest.mark.parametrize("num_rows", [0, 1, 1023, 1024, 1025])
def test_rows_decoded_together_are_independent(num_rows: int, layout: str) -> None:
    topk = make_topk(num_rows, 5, 23).keep_mass(0.9)
    columns = encode(topk, "u8", layout)
    one_by_one = [decode({n: c[i : i + 1] for n, c in columns.items()}, "u8", layout) for i in range(num_rows)]
    found = decode(columns, "u8", layout)
    assert len(found) == num_rows
    if num_rows:
        assert np.array_equal(found.ids, TopKLogProbs.concatenate(one_by_one).ids)
        np.testing.assert_allclose(found.log_probs, TopKLogProbs.concatenate(one_by_one).log_probs, rtol=1e-6)


def test_far_below_the_top_is_stored_at_the_range() -> None:
    topk = TopKLogProbs(
        np.array([[3, 1]], np.int32),
        np.array([[0.0, -80.0]], np.float32),
        np.array([2], np.int32),
        np.array([-np.inf], np.float32),
        np.array([-80.0], np.float32),
    )
    assert decode(encode(topk, "u8", "plain"), "u8", "plain").log_probs[0].tolist() == [0.0, -RANGE_NATS]
    assert decode(encode(topk, "fp16", "plain"), "fp16", "plain").log_probs[0].tolist() == [0.0, -80.0]


def test_sharply_peaked_rows_keep_a_denormal_tail() -> None:
    topk = rows_of(np.array([[0.0, -90.0, -91.0, -92.0]]), k=2)
    found = decode(encode(topk, "u10", "plain"), "u10", "plain")
    assert found.log_probs[0, 0] == pytest.approx(0.0, abs=1e-38)
    assert found.log_tail[0] == pytest.approx(-91 + np.log1p(np.exp(-1.0)), abs=1e-5)


def test_fp32_is_exact() -> None:
    topk = make_topk(100, 7, 31).keep_mass(0.97)
    assert decode(encode(topk, "fp32", "plain"), "fp32", "plain").equals(topk)


@settings(deadline=None)
@given(st.floats(-200.0, -(2.0**-100), width=32))
def test_log1mexp(x: float) -> None:
    # Two float64 forms, each where it is accurate; float32 keeps 24 bits.
    expected = np.log(-np.expm1(np.float64(x))) if x > -0.7 else np.log1p(-np.exp(np.float64(x)))
    assert log1mexp(np.float32([x]))[0] == pytest.approx(expected, rel=3e-7, abs=3e-7)


def test_log1mexp_at_the_ends() -> None:
    assert log1mexp(np.float32([-np.inf, 0.0])).tolist() == [0.0, -np.inf]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codes": None}, "column 'codes' of precision u8, id layout plain: expected uint8 \\(4, 3\\), found nothing"),
        ({"ids": None}, "column 'ids'"),
        ({"ids": np.zeros((4, 3), np.int64)}, "column 'ids' .* expected int32"),
        ({"ids": np.zeros(4, np.int32)}, "column 'ids'"),
        ({"codes": np.zeros((4, 2), np.uint8)}, "column 'codes' .* expected uint8 \\(4, 3\\)"),
        ({"log_tail": np.zeros((4, 1), np.float32)}, "column 'log_tail'"),
        ({"log_tail": np.float32([-1, -1, 0, -1])}, "log_tail"),
        ({"log_tail": np.float32([-1, -1, np.nan, -1])}, "log_tail"),
        ({"num_kept": np.int32([1, 2, 0, 3])}, "num_kept from 0 to 3"),
        ({"num_kept": np.int32([1, 2, 4, 3])}, "num_kept from 1 to 4"),
        ({"codes": np.full((4, 3), 100, np.uint8)}, "highest level"),
    ],
)
def test_columns_that_cannot_be(change: dict[str, np.ndarray | None], match: str) -> None:
    columns = {**encode(make_topk(4, 3, 9), "u8", "plain"), **change}
    with pytest.raises(CorruptionError, match=match):
        decode({name: column for name, column in columns.items() if column is not None}, "u8", "plain")


@pytest.mark.parametrize("codes", [[0, 600, 600], [0, 1000, 65000], [1024, 0, 0]])
def test_sums_above_the_highest_level(codes: list[int]) -> None:
    columns = {**encode(make_topk(1, 3, 9), "u10", "plain"), "codes": np.uint16([codes])}
    with pytest.raises(CorruptionError, match=r"shards/7: .* highest level"):
        decode(columns, "u10", "plain", where="shards/7")


@pytest.mark.parametrize("layout", ["split", "ascending"])
def test_levels_above_the_highest(layout: str) -> None:
    columns = {**encode(make_topk(1, 3, 9), "u10", layout), "codes": np.uint16([[0, 5, 1024]])}
    with pytest.raises(CorruptionError, match=r"shards/7: a level of 1024, above the highest level, 1023"):
        decode(columns, "u10", layout, where="shards/7")


def test_unknown_precisions_and_layouts() -> None:
    with pytest.raises(InputError, match="unknown precision 'u4'; choose from u8, u10, fp16, fp32"):
        column_types("u4", "plain", 3)
    with pytest.raises(InputError, match="unknown id layout 'ranked'; choose from plain, ascending, split"):
        column_types("u8", "ranked", 3)


@pytest.mark.parametrize("layout", ID_LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_ids_the_label_is_the_only_column(precision: str, layout: str) -> None:
    bare = TopKLogProbs.of_labels(make_topk(9, 3, 50).label_log_prob)
    columns = encode(bare, precision, layout)
    assert {name: column.dtype for name, column in columns.items()} == column_types(precision, layout, 0)
    assert columns.keys() == {"label_log_prob"}
    assert decode(columns, precision, layout).equals(bare)
    for wrong in (np.zeros((9, 1), np.float32), np.zeros(9, np.float64)):
        with pytest.raises(CorruptionError, match="shards/7: label_log_prob: expected a column of float32"):
            decode({"label_log_prob": wrong}, precision, layout, where="shards/7")
