"""Cached rows against new answers: every number by a dictionary and a loop in float64, and what is called agreement."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from logitcache_storage.agreement import ARITHMETIC_NATS, Agreement, agreement, agrees
from logitcache_storage.encoding import decode, encode
from logitcache_storage.schema import PRECISIONS
from logitcache_storage.testing import make_topk
from logitcache_storage.topk import TopKLogProbs

N, K, VOCAB = 23, 7, 61
LABELS = np.random.default_rng(5).integers(VOCAB, size=N).astype(np.int32)


def answers(k: int, *, nats: float = 0.0, seed: int = 0) -> TopKLogProbs:
    """The same distributions to k ids, every log-prob moved by up to so many nats, as another batch would."""
    rng = np.random.default_rng(1000 + seed)
    exact = make_topk(N, VOCAB, VOCAB, labels=LABELS)
    full = np.empty((N, VOCAB))
    np.put_along_axis(full, exact.ids.astype(np.int64), exact.log_probs.astype(np.float64), axis=1)
    full += rng.uniform(-nats, nats, full.shape)
    full -= np.log(np.exp(full).sum(1, keepdims=True))
    ids = np.argsort(-full, axis=1, kind="stable")[:, :k]
    outside = full.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(outside).sum(1))
    return TopKLogProbs(
        ids.astype(np.int32),
        np.take_along_axis(full, ids, 1).astype(np.float32),
        np.full(N, k, np.int32),
        tail.astype(np.float32),
        full[np.arange(N), LABELS].astype(np.float32),
    )


def cached(precision: str = "fp32", kept_mass: float = 1.0) -> TopKLogProbs:
    return decode(encode(answers(K).keep_mass(kept_mass), precision, "plain"), precision, "plain")


def judged(old: TopKLogProbs, new: TopKLogProbs, precision: str = "fp32") -> bool:
    return agrees(agreement(old, new, precision=precision, dtype="float32"), dtype="float32")


@pytest.mark.parametrize("kept_mass", [1.0, 0.7])
def test_the_numbers_are_those_of_a_loop_over_dictionaries(kept_mass: float) -> None:
    old, new = cached("fp32", kept_mass), answers(20, nats=0.3)
    found = agreement(old, new, precision="fp32", dtype="float32")
    for n in range(N):
        new_row = dict(zip(new.ids[n].tolist(), new.log_probs[n].astype(np.float64).tolist(), strict=True))
        old_row = dict(zip(old.ids[n, : old.num_kept[n]].tolist(), old.log_probs[n].astype(np.float64), strict=False))
        off = [abs(value - new_row[i]) for i, value in old_row.items()]
        outside = sum(math.exp(v) for i, v in new_row.items() if i not in old_row) + math.exp(new.log_tail[n])
        assert found.kept[n] == pytest.approx(max(off))
        assert found.kept_sum[n] == pytest.approx(sum(off))
        assert found.num_kept[n] == len(off)
        assert found.tail[n] == pytest.approx(abs(math.log(outside) - float(old.log_tail[n])), abs=1e-6)
        assert found.label[n] == pytest.approx(abs(float(old.label_log_prob[n]) - float(new.label_log_prob[n])))
        rest = math.exp(float(old.log_tail[n]))
        kl = sum(math.exp(v) * (v - new_row[i]) for i, v in old_row.items()) + rest * math.log(rest / outside)
        assert found.kl[n] == pytest.approx(kl, abs=1e-5)
        assert found.same_top_1[n] == (old.ids[n, 0] == new.ids[n, 0])


@pytest.mark.parametrize("kept_mass", [1.0, 0.6])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoding_and_the_arithmetic_of_another_batch_are_agreement(precision: str, kept_mass: float) -> None:
    old = cached(precision, kept_mass)
    for seed in range(5):
        assert judged(old, answers(20, nats=2e-5, seed=seed), precision)
    assert not judged(old, answers(20, nats=0.01), precision)


def test_equal_rows_differ_by_nothing() -> None:
    found = agreement(answers(K), answers(K), precision="fp32", dtype="bfloat16")
    for name in ("kept", "kept_sum", "label", "tail", "severity"):
        assert getattr(found, name).max() < 1e-6
    assert found.same_top_1.all()


@pytest.mark.parametrize(
    ("name", "nats", "is_kept_by_u8"),
    [("log_probs", 0.01, True), ("log_probs", 0.6, False), ("label_log_prob", 0.01, False), ("log_tail", 0.01, False)],
)
def test_one_wrong_value_is_found(name: str, nats: float, is_kept_by_u8: bool) -> None:
    """What the encoding may move it may move; the label and the tail are exact in every encoding."""
    for precision in ("fp32", "u8"):
        old = cached(precision)
        values = getattr(old, name).copy()
        values[(11, 2) if values.ndim == 2 else 11] -= nats
        found = agreement(dataclasses.replace(old, **{name: values}), answers(20), precision=precision, dtype="float32")
        assert agrees(found, dtype="float32") is (precision == "u8" and is_kept_by_u8)
        if precision == "fp32":
            assert int(np.argmax(found.severity)) == 11 and np.count_nonzero(found.severity > 1) == 1


def test_a_small_shift_of_all_labels_is_no_rounding() -> None:
    """Each within what one row may be off, together too much: rounding has no direction."""
    old = cached()
    shifted = dataclasses.replace(old, label_log_prob=old.label_log_prob - np.float32(0.5 * ARITHMETIC_NATS["float32"]))
    found = agreement(shifted, answers(20), precision="fp32", dtype="float32")
    assert (found.severity < 1).all() and not agrees(found, dtype="float32")


def test_an_id_that_the_new_answer_does_not_keep() -> None:
    """It lies below all that are kept: no difference where that may be, the least possible one where it may not."""
    old, new = cached(), answers(3)
    found = agreement(old, new, precision="fp32", dtype="float32")
    assert found.kept.max() < 1e-5
    raised = dataclasses.replace(old, log_probs=np.where(np.arange(K) < 4, old.log_probs[:, :1], old.log_probs))
    found = agreement(raised, new, precision="fp32", dtype="float32")
    assert (found.kept >= (old.log_probs[:, 0] - new.log_probs[:, 2]) - 1e-5).all()


def test_rows_without_a_tail() -> None:
    old, new = answers(VOCAB), answers(VOCAB, nats=1e-5)
    assert np.isneginf(old.log_tail).all()
    found = agreement(old, new, precision="fp32", dtype="float32")
    assert (found.tail == 0).all() and agrees(found, dtype="float32")
    gained = dataclasses.replace(old, log_tail=np.full(N, -5, np.float32))
    assert not judged(gained, new)


def test_nan_is_no_agreement() -> None:
    broken = dataclasses.replace(answers(20), label_log_prob=np.full(N, np.nan, np.float32))
    assert not judged(cached(), broken)


def test_parts_are_joined_in_order() -> None:
    whole = agreement(cached(), answers(20, nats=0.1), precision="fp32", dtype="float32")
    parts = [
        agreement(cached()[rows], answers(20, nats=0.1)[rows], precision="fp32", dtype="float32")
        for rows in (slice(0, 5), slice(5, N))
    ]
    joined = Agreement.join(parts)
    np.testing.assert_array_equal(joined.severity, whole.severity)
    np.testing.assert_array_equal(joined.tail, whole.tail)
