"""The explorer against autograd of the losses, and against the definition of target_sft in float64.

Shapes: V vocabulary.
"""

import json
import math

import numpy as np
import pytest
import torch

from logitcache_storage.cli import find_entry_points
from logitcache_storage.errors import InputError
from logitcache_storage.testing import make_topk
from logitcache_storage.topk import TopKLogProbs
from logitcache_train import OBJECTIVES, objective, target_loss
from logitcache_train.explorer import explore, objectives, student_log_probs

V, LABEL, K = 37, 7, 6
LABELS = np.array([LABEL], np.int32)
STUDENT = make_topk(1, V, V, seed=1, labels=LABELS)
"""Known in full: what the explorer makes of it needs no assumption."""
TEACHER = make_topk(1, K, V, seed=2, labels=LABELS)
REFERENCE = make_topk(1, K, V, seed=3, labels=LABELS)


def student_V() -> torch.Tensor:
    log_p_V = torch.empty(V, dtype=torch.float64)
    log_p_V[torch.from_numpy(STUDENT.ids[0]).long()] = torch.from_numpy(STUDENT.log_probs[0]).double()
    return log_p_V.softmax(-1)


def caches_for(name):
    given = {"teacher": TEACHER, "reference": REFERENCE}
    return {role: given[role] for role in ("teacher", *OBJECTIVES[name].roles)}


def column(found, name):
    """{token: value}, with None for all others."""
    return {outcome["token"]: outcome[name] for outcome in found["outcomes"]}


@pytest.mark.parametrize("p_label", [None, 0.02, 0.9])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_target_is_p_minus_the_gradient_of_the_loss(name, p_label):
    columns = dict.fromkeys(OBJECTIVES[name].columns, 1.0)
    found = explore(name, {}, LABEL, STUDENT, caches_for(name), vocab_size=V, p_label=p_label, columns=columns, top=10)
    p_V = student_V()
    if p_label is not None:
        rest = 1 - p_V[LABEL]
        p_V = p_V * (1 - p_label) / rest
        p_V[LABEL] = p_label
    z_V = (p_V.log() + 3.0).requires_grad_()
    roles = {role: cache for role, cache in caches_for(name).items() if role in OBJECTIVES[name].roles}
    data = {key: torch.tensor([value]) for key, value in columns.items()}
    target_loss(z_V[None], torch.tensor([LABEL]), objective(name), roles, data).sum().backward()
    expected_V = p_V - z_V.grad

    targets, gradients, own = (column(found, key) for key in ("target", "gradient", "student"))
    assert len(targets) == 12 and next(iter(targets)) == LABEL  # the label first, ten more, and all others
    for token in set(targets) - {None}:
        assert targets[token] == pytest.approx(float(expected_V[token]), abs=1e-12)
        assert gradients[token] == pytest.approx(float(z_V.grad[token]), abs=1e-12)
        assert own[token] == pytest.approx(float(p_V[token]), abs=1e-12)
    assert sum(targets.values()) == pytest.approx(1, abs=1e-12)
    assert sum(gradients.values()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_target_sft_is_what_the_paper_defines(eta):
    found = explore("target_sft", {"eta": eta}, LABEL, STUDENT, {"teacher": TEACHER}, vocab_size=V, top=V)
    p_V, kept = student_V().numpy(), set(TEACHER.ids[0].tolist()) | {LABEL}
    q = dict(zip(TEACHER.ids[0].tolist(), np.exp(TEACHER.log_probs[0].astype(np.float64)), strict=True))
    q[LABEL] = math.exp(TEACHER.label_log_prob[0])
    tau, rho = 1 - sum(q.values()), 1 - sum(p_V[a] for a in kept)
    weights = {a: p_V[a] ** (1 - eta) * q[a] ** eta for a in kept}
    tail = rho ** (1 - eta) * tau**eta
    total = sum(weights.values()) + tail
    residual, teacher, target = (column(found, key) for key in ("residual", "teacher", "target"))
    assert found["gamma"] == found["p_label"] == pytest.approx(p_V[LABEL])
    for a in range(V):
        guided = (weights[a] if a in kept else tail * p_V[a] / rho) / total
        # The float32 values of the cache sum to one within 1e-6; the loss divides by what they sum to.
        assert residual[a] == pytest.approx(guided, abs=3e-6)
        assert teacher[a] == pytest.approx(q[a] if a in kept else tau * p_V[a] / rho, abs=3e-6)
        assert target[a] == pytest.approx(p_V[LABEL] * (a == LABEL) + (1 - p_V[LABEL]) * guided, abs=3e-6)


def test_the_residual_is_what_remains_of_the_target_normalised():
    found = explore("kl_sft", {"weight": 0.5}, LABEL, STUDENT, caches_for("kl_sft"), vocab_size=V)
    assert found["scale"] == 1.5 and found["gamma"] == pytest.approx(1 / 1.5)
    assert found["coefficients"] == pytest.approx({"label": 1, "cached": 0.5, "student": -0.5})
    for outcome in found["outcomes"]:
        assert outcome["residual"] == pytest.approx(outcome["reference"], abs=1e-12)
    none_left = explore("sft", {}, LABEL, STUDENT, {"teacher": TEACHER}, vocab_size=V)
    assert {outcome["residual"] for outcome in none_left["outcomes"]} == {None}


def test_a_student_is_what_its_cache_keeps_and_even_beyond():
    cut = make_topk(1, 4, V, seed=1, labels=LABELS)
    assert LABEL not in cut.ids[0]
    p_V = student_log_probs(cut, LABEL, V).exp().numpy()
    assert p_V.sum() == pytest.approx(1, abs=1e-12)
    assert p_V[cut.ids[0]] == pytest.approx(np.exp(cut.log_probs[0]), rel=2e-6)
    assert p_V[LABEL] == pytest.approx(math.exp(cut.label_log_prob[0]), rel=2e-6)
    others = np.delete(p_V, [*cut.ids[0], LABEL])
    assert np.ptp(others) == pytest.approx(0, abs=1e-15)
    assert others.sum() == pytest.approx(math.exp(cut.log_tail[0]) - math.exp(cut.label_log_prob[0]), rel=1e-5)
    assert others.max() < np.exp(cut.log_probs[0]).min()


def test_a_reference_of_labels_is_enough_where_the_objective_reads_no_more():
    targets = []
    for reference in (REFERENCE, TopKLogProbs.of_labels(REFERENCE.label_log_prob)):
        caches = {"teacher": TEACHER, "reference": reference}
        found = explore("psft", {}, LABEL, STUDENT, caches, vocab_size=V, p_label=0.01, top=V)
        targets.append(column(found, "target"))
    assert targets[0] == targets[1]
    assert "reference" not in found["outcomes"][0]


def test_what_no_cache_keeps_is_marked_as_assumed():
    cut = make_topk(1, 4, V, seed=1, labels=LABELS)
    found = explore("kd", {}, LABEL, cut, {"teacher": TEACHER}, vocab_size=V, top=V)
    for outcome in found["outcomes"]:
        kept = {"student": cut.ids[0], "teacher": TEACHER.ids[0]}
        expected = [name for name, ids in kept.items() if outcome["token"] not in {*ids.tolist(), LABEL}]
        assert outcome["assumed"] == expected


def test_a_label_that_is_moved_leaves_the_ratios_of_the_others():
    before, after = (
        column(explore("kd", {}, LABEL, STUDENT, {"teacher": TEACHER}, vocab_size=V, p_label=p, top=V), "student")
        for p in (None, 0.25)
    )
    assert after[LABEL] == pytest.approx(0.25)
    ratios = [after[a] / before[a] for a in range(V) if a != LABEL]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "nonesuch"}, "unknown objective 'nonesuch'"),
        ({"parameters": {"eta": 2.0}}, r"eta .* \[0, 1\]"),
        ({"p_label": 1.0}, "between 0 and 1, got 1"),
        ({"caches": {}}, "cache role 'teacher'"),
        ({"caches": {"teacher": TopKLogProbs.of_labels(TEACHER.label_log_prob)}}, r"keeps no ids \(k = 0\)"),
        ({"vocab_size": 5}, "outside the vocabulary of 5"),
        ({"name": "critical_tokens", "parameters": {}}, "column 'critical'"),
    ],
)
def test_what_cannot_be_explored_is_refused_by_name(change, message):
    usual = {"name": "target_sft", "parameters": {}, "label": LABEL, "student": STUDENT, "vocab_size": V}
    with pytest.raises(InputError, match=message):
        explore(**{**usual, "caches": {"teacher": TEACHER}, **change})


def test_the_table_is_plain_and_whole():
    table = json.loads(json.dumps(objectives(), allow_nan=False))
    assert [row["name"] for row in table] == list(OBJECTIVES)
    for row in table:
        for parameter in row["parameters"]:
            expected = OBJECTIVES[row["name"]].parameters[parameter["name"]]
            assert parameter["default"] == expected.default and parameter["meaning"] == expected.meaning
            assert parameter["high"] == (None if math.isinf(expected.high) else expected.high)


def test_storage_finds_it_by_its_hook():
    assert find_entry_points("logitcache.hooks")["explore"].load().explore is explore
