"""Each broken invariant is found, with its row; sound rows pass, encoded or not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.encoding import decode, encode
from logitcache_storage.errors import CorruptionError
from logitcache_storage.invariants import LABEL_TOLERANCE, check_rows
from logitcache_storage.schema import PRECISIONS
from logitcache_storage.testing import make_topk
from logitcache_storage.topk import TopKLogProbs

V = 20


def rows(num_rows: int = 6, k: int = 5, seed: int = 0) -> tuple[TopKLogProbs, np.ndarray]:
    labels = np.random.default_rng(seed).integers(V, size=num_rows).astype(np.int32)
    return make_topk(num_rows, k, V, seed=seed, labels=labels), labels


def changed(name: str, index: object, value: object) -> TopKLogProbs:
    topk, _ = rows()
    column = getattr(topk, name).copy()
    column[index] = value
    return dataclasses.replace(topk, **{name: column})


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, V),
    mass=st.sampled_from([0.5, 0.99, 1.0]),
    precision=st.sampled_from([None, *PRECISIONS]),
)
def test_sound_rows_pass(seed: int, k: int, mass: float, precision: str | None) -> None:
    topk, labels = rows(7, k, seed)
    topk = topk.keep_mass(mass)
    if precision is not None:
        topk = decode(encode(topk, precision, "plain"), precision, "plain")
    check_rows(topk, labels, V, where="x", precision=precision)


def test_no_rows_pass() -> None:
    check_rows(make_topk(0, 3, V), np.zeros(0, np.int32), V, where="x")


@pytest.mark.parametrize(
    ("topk", "match"),
    [
        (changed("ids", (2, 0), V), r"ids outside \[0, 20\) at row 2"),
        (changed("ids", (2, 0), -1), r"ids outside \[0, 20\) at row 2"),
        (changed("ids", 3, 7), "the same id twice in a row at row 3"),
        (changed("num_kept", 1, 0), r"num_kept outside \[1, 5\] at row 1 \(found 0\)"),
        (changed("num_kept", 1, 6), r"num_kept outside \[1, 5\] at row 1 \(found 6\)"),
        (changed("log_probs", (4, 4), np.nan), "not finite or above 0 at row 4"),
        (changed("log_probs", (4, 4), -np.inf), "not finite or above 0 at row 4"),
        (changed("log_probs", (4, 0), 0.1), "not finite or above 0 at row 4"),
        (changed("log_probs", (5, 4), -0.01), "increase along a row at row 5"),
        (changed("log_tail", 0, np.nan), "log_tail that is NaN or not below 0 at row 0"),
        (changed("log_tail", 0, 0.0), "log_tail that is NaN or not below 0 at row 0"),
        (changed("log_tail", slice(None), -0.01), r"kept mass \+ tail that is not one .* 6 of 6 rows"),
        (changed("label_log_prob", 3, -np.inf), "label_log_prob that is not finite or above 0 at row 3"),
        (changed("label_log_prob", 3, 0.5), "label_log_prob that is not finite or above 0 at row 3"),
    ],
)
def test_broken_rows(topk: TopKLogProbs, match: str) -> None:
    with pytest.raises(CorruptionError, match=match) as e:
        check_rows(topk, rows()[1], V, where="shards/00017-3f9c")
    assert str(e.value).startswith("shards/00017-3f9c: ")


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_labels_that_differ_from_their_entry(precision: str | None) -> None:
    topk, _ = rows()
    labels = topk.ids[:, 1].copy()
    exact = dataclasses.replace(topk, label_log_prob=topk.log_probs[:, 1].copy())
    check_rows(exact, labels, V, where="x", precision=precision)
    nats, part = LABEL_TOLERANCE[precision or "fp32"]
    off = exact.label_log_prob.copy()
    off[2] -= 1.1 * (nats + part * abs(off[2])) + part * nats
    with pytest.raises(CorruptionError, match="differs from its entry among the ids at row 2"):
        check_rows(dataclasses.replace(exact, label_log_prob=off), labels, V, where="x", precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_far_below_the_top_survive_the_encoding(precision: str) -> None:
    """Beyond 32 nats the codes say only how far their range goes; fp16 is coarse there."""
    topk = TopKLogProbs(
        np.array([[3, 1, 4]], np.int32),
        np.array([[0.0, -31.9, -300.3]], np.float32),
        np.array([3], np.int32),
        np.array([-400.0], np.float32),
        np.array([-300.3], np.float32),
    )
    labels = np.array([4], np.int32)
    check_rows(topk, labels, V, where="x")
    check_rows(decode(encode(topk, precision, "plain"), precision, "plain"), labels, V, where="x", precision=precision)


def test_labels_outside_the_vocabulary_or_of_another_length() -> None:
    topk, labels = rows()
    with pytest.raises(CorruptionError, match="6 rows for 5 target positions"):
        check_rows(topk, labels[:5], V, where="x")
    with pytest.raises(CorruptionError, match=r"label outside \[0, 20\) at row 1 \(found 20\)"):
        check_rows(topk, np.where(np.arange(6) == 1, V, labels).astype(np.int32), V, where="x")


def test_rows_without_ids() -> None:
    topk, labels = rows()
    bare = TopKLogProbs.of_labels(topk.label_log_prob)
    for precision in (None, *PRECISIONS):
        check_rows(bare, labels, V, where="shard 7", precision=precision)
    for name, value, match in (
        ("log_tail", -1e-6, "log_tail other than 0, with no id kept at row 2"),
        ("num_kept", 1, r"num_kept outside \[0, 0\] at row 2"),
        ("label_log_prob", 0.5, "label_log_prob that is not finite or above 0 at row 2"),
    ):
        column = getattr(bare, name).copy()
        column[2] = value
        with pytest.raises(CorruptionError, match=match):
            check_rows(dataclasses.replace(bare, **{name: column}), labels, V, where="shard 7")
