"""Induced targets and curves, against the definitions of the targets; and the pictures of all rows.

Shapes: P points, V vocabulary.
"""

import math

import pytest
import torch

from logitcache_storage.errors import InputError
from logitcache_train import OBJECTIVES, CachedTopK, objective
from logitcache_train.curves import STUDENT_OTHERS, TEACHER, TOKENS, curves, induced_target
from logitcache_train.plot import draw_objective, make_figure

Q_T = torch.tensor(TEACHER, dtype=torch.float64)
ONE_HOT = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)


def student(p_P):
    others_PV = (1 - p_P)[:, None] * torch.tensor([0.0, *STUDENT_OTHERS], dtype=torch.float64)
    return others_PV + p_P[:, None] * ONE_HOT


def target(name, p, p_V):
    """The induced target of the paper's view, by hand; p is the label's probability."""
    ratio = p / TEACHER[0]
    weight = {
        "sft": 1,
        "dft": p,
        "prob_power": p,
        "profit": float(p > 0.1),
        "eaft": -(p_V * p_V.log()).sum() / math.log(4),
        "iw_sft": min(max(ratio, 0.2), 1.8),
        "critical_tokens": 1,
        "psft": ratio * (ratio <= 1.28),
    }
    if name in weight:
        return weight[name] * ONE_HOT + (1 - weight[name]) * p_V
    sharp_V = p_V ** (1 / 0.7) / (p_V ** (1 / 0.7)).sum()
    guided_V = (p_V * Q_T).sqrt() / (p_V * Q_T).sqrt().sum()
    return {
        "label_smoothing": 0.9 * ONE_HOT + 0.1 / 4,
        "kl_sft": ONE_HOT + 0.1 * (Q_T - p_V),
        "asft": p * ONE_HOT + (1 - p) * p_V + 0.1 * (Q_T - p_V),
        "gem": ONE_HOT + p_V - sharp_V,
        "kd": Q_T,
        "kd_hybrid": 0.5 * ONE_HOT + 0.5 * Q_T,
        "target_sft": p * ONE_HOT + (1 - p) * guided_V,
    }[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_curves_are_those_of_the_definition(name):
    found = curves(objective(name), num_points=18)
    p_PV = student(found.p_label_P)
    expected_PV = torch.stack([target(name, float(p), p_V) for p, p_V in zip(found.p_label_P, p_PV, strict=True)])
    torch.testing.assert_close(found.target_PV, expected_PV, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.gradient_PV, p_PV - expected_PV, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.target_PV.sum(-1), torch.ones(18, dtype=torch.float64))
    assert found.p_label_P[[0, -1]].tolist() == [1 / 19, 18 / 19] and found.target_PV.shape == (18, len(TOKENS))


def test_induced_target_of_given_distributions():
    g = torch.Generator().manual_seed(2)
    log_p_NV, log_q_NV = (torch.randn(5, 9, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    labels_N = torch.tensor([0, 3, 8, 2, 2])
    cached = {"teacher": CachedTopK.from_log_probs(log_q_NV, labels_N, 9)}
    induced = induced_target(log_p_NV, labels_N, objective("kd"), cached)
    torch.testing.assert_close(induced.target_NV, log_q_NV.exp())
    torch.testing.assert_close(induced.gradient_NV, log_p_NV.exp() - log_q_NV.exp())
    assert not induced.target_NV.requires_grad and not log_p_NV.requires_grad
    with torch.no_grad():
        assert torch.equal(induced_target(log_p_NV, labels_N, objective("kd"), cached).target_NV, induced.target_NV)


def test_top_k_of_whole_distributions():
    log_q_NV = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    cache = CachedTopK.from_log_probs(log_q_NV, torch.tensor([3]), 2)
    assert cache.ids.tolist() == [[0, 2]] and cache.num_kept.tolist() == [2]
    torch.testing.assert_close(cache.log_tail.exp(), torch.tensor([0.2]))
    torch.testing.assert_close(cache.label_log_prob.exp(), torch.tensor([0.1]))


@pytest.mark.parametrize("name", ["gem", "psft", "iw_sft"])
def test_lines_of_a_picture(name):
    """The observed token is solid, others dashed, SFT grey, and jumps are gaps."""
    figure, found = make_figure(objective(name)), curves(objective(name))
    for panel, values_PV in zip(figure.axes, (found.target_PV, found.gradient_PV), strict=True):
        lines = {line.get_label(): line for line in panel.lines}
        for v, token in enumerate(TOKENS):
            assert lines[token].get_linestyle() == ("--" if v else "-")
            drawn_P = torch.tensor(lines[token].get_ydata())
            gaps = drawn_P.isnan()
            assert torch.equal(drawn_P[~gaps], values_PV[~gaps, v]) and gaps.sum() == (name == "psft")
        grey = [line for line in panel.lines if line.get_color() == "#a0a0a0"]
        assert len(grey) == 4 and lines["SFT: observed token"] in grey
    assert name in figure.texts[0].get_text()


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")])
def test_the_kind_of_picture_is_that_of_its_name(tmp_path, suffix, start):
    path = tmp_path / f"curves.{suffix}"
    draw_objective(objective("target_sft"), path)
    assert path.read_bytes().startswith(start)


def test_every_row_has_a_picture():
    for name in OBJECTIVES:
        assert len(make_figure(objective(name)).axes) == 2


def test_a_formula_with_a_dollar_sign_is_no_mathematics(tmp_path):
    from logitcache_train import Objective

    draw_objective(Objective("mine", "costs $5 and $_{", "s", label=1.0), tmp_path / "mine.png")


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"--plot .*folder.png: cannot be written: Is a directory"):
        draw_objective(objective("sft"), tmp_path / "folder.png")
    with pytest.raises(InputError, match="the name must end in"):
        draw_objective(objective("sft"), tmp_path / "picture")
