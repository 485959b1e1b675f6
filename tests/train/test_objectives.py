"""The table: names and parameters, and every row against autograd of its textbook loss over the full vocabulary.

Shapes: N positions, V vocabulary.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from logitcache_storage.errors import InputError
from logitcache_train import OBJECTIVES, CachedTopK, Objective, Parameter, fused_target_loss, objective, target_loss

N, V = 29, 53
NAMES = [
    *("sft", "dft", "prob_power", "profit", "eaft", "iw_sft", "critical_tokens", "label_smoothing"),
    *("kl_sft", "asft", "psft", "gem", "kd", "kd_hybrid", "target_sft"),
]
PARAMETERS = {
    "prob_power": {"alpha": 0.7},
    "profit": {"threshold": 0.3},
    "eaft": {"entropy_k": 7},
    "iw_sft": {"clip_low": 0.3, "clip_high": 1.5},
    "label_smoothing": {"smoothing": 0.2},
    "kl_sft": {"weight": 0.4},
    "asft": {"weight": 1.7},
    "psft": {"clip_high": 0.5},
    "gem": {"beta": 0.6},
    "kd_hybrid": {"weight": 0.3},
    "target_sft": {"eta": 0.7},
}


def textbook(name, z_NV, y_N, teacher_NV, reference_NV, critical_N, sequence_N, **par):
    """The losses as their papers write them, [N]; teacher and reference are full distributions."""
    p_NV, log_p_NV = z_NV.softmax(-1), z_NV.log_softmax(-1)
    rows_N = range(len(y_N))
    p_y, nll = p_NV[rows_N, y_N], F.cross_entropy(z_NV, y_N, reduction="none")
    kl_to_reference = F.kl_div(log_p_NV, reference_NV, reduction="none").sum(-1)
    if name == "sft":
        return nll
    if name == "dft":
        return p_y.detach() * nll
    if name == "prob_power":
        return (1 - p_y ** par["alpha"]) / par["alpha"]
    if name == "profit":
        return (p_y > par["threshold"]) * nll
    if name == "eaft":
        top = p_NV.detach().topk(par["entropy_k"]).values
        top = top / top.sum(-1, keepdim=True)
        return -(top * top.log()).sum(-1) / math.log(par["entropy_k"]) * nll
    if name == "iw_sft":
        log_ratio = (p_y / reference_NV[rows_N, y_N]).detach().log()
        weights = torch.empty_like(nll)
        for s in set(sequence_N.tolist()):
            mean = log_ratio[sequence_N == s].mean().exp()
            weights[sequence_N == s] = mean.clamp(par["clip_low"], par["clip_high"])
        return weights.detach() * nll
    if name == "critical_tokens":
        return critical_N * nll
    if name == "label_smoothing":
        return F.cross_entropy(z_NV, y_N, reduction="none", label_smoothing=par["smoothing"])
    if name == "kl_sft":
        return nll + par["weight"] * kl_to_reference
    if name == "asft":
        return p_y.detach() * nll + par["weight"] * kl_to_reference
    if name == "psft":
        r = p_y / reference_NV[rows_N, y_N]
        return -torch.minimum(r, r.clamp(1 - par.get("clip_low", 0.2), 1 + par["clip_high"]))
    if name == "gem":
        return nll + ((z_NV / par["beta"]).softmax(-1).detach() * log_p_NV).sum(-1)
    if name == "kd":
        return F.kl_div(log_p_NV, teacher_NV, reduction="none").sum(-1)
    if name == "kd_hybrid":
        kl = F.kl_div(log_p_NV, teacher_NV, reduction="none").sum(-1)
        return (1 - par["weight"]) * nll + par["weight"] * kl
    if name == "target_sft":
        residual = p_NV ** (1 - par["eta"]) * teacher_NV ** par["eta"]
        residual = residual / residual.sum(-1, keepdim=True)
        target = p_y[:, None] * F.one_hot(y_N, z_NV.shape[1]) + (1 - p_y[:, None]) * residual
        return -(target.detach() * log_p_NV).sum(-1)
    raise AssertionError(name)


def full_cache(q_NV, y_N):
    """A distribution as a cache that keeps every token."""
    num_rows, vocab_size = q_NV.shape
    probs, ids = q_NV.sort(-1, descending=True)
    return CachedTopK(
        ids=ids,
        log_probs=probs.log(),
        num_kept=torch.full((num_rows,), vocab_size),
        log_tail=torch.full((num_rows,), -torch.inf),
        label_log_prob=q_NV[range(num_rows), y_N].log(),
    )


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(3)
    z_NV = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    y_N = torch.randint(V, (N,), generator=g)
    z_NV[range(0, N, 2), y_N[::2]] += 5 * torch.rand(len(y_N[::2]), generator=g)  # likely and unlikely labels
    teacher_NV, reference_NV = (
        (z_NV / 2 + torch.randn(N, V, generator=g, dtype=torch.float64)).softmax(-1) for _ in range(2)
    )
    z_NV = z_NV.float().double()
    return {
        "z_NV": z_NV,
        "y_N": y_N,
        "teacher_NV": teacher_NV,
        "reference_NV": reference_NV,
        "critical_N": torch.randint(2, (N,), generator=g),
        "sequence_N": torch.randint(40, 45, (N,), generator=g),
    }


def gradient_at_logits(path, z_NV, y_N, obj, cached, columns):
    z_NV = z_NV.clone().requires_grad_()
    if path == "readable":
        target_loss(z_NV, y_N, obj, cached, columns).sum().backward()
    else:  # with the identity as head the hidden states are the logits
        head_VV = torch.eye(z_NV.shape[1], dtype=z_NV.dtype)
        fused_target_loss(z_NV, head_VV, y_N, obj, cached, columns, num_items=1, chunk_size=12).backward()
    return z_NV.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("path", ["readable", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_textbook_loss(batch, name, path, dtype, tolerance):
    par = PARAMETERS.get(name, {})
    z_NV = batch["z_NV"].clone().requires_grad_()
    rest = {key: value for key, value in batch.items() if key != "z_NV"}
    textbook(name, z_NV, **rest, **par).sum().backward()
    assert z_NV.grad.abs().max() > 0.05, "an oracle without a gradient shows nothing"

    cached = {role: full_cache(batch[f"{role}_NV"], batch["y_N"]) for role in objective(name).roles}
    columns = {"critical": batch["critical_N"], "sequence": batch["sequence_N"]}
    obj = objective(name, **par)
    g_NV = gradient_at_logits(path, batch["z_NV"].to(dtype), batch["y_N"], obj, cached, columns)
    assert (g_NV - z_NV.grad).abs().max() <= tolerance


def test_iw_sft_takes_a_teacher_as_q_and_stands_alone_without_sequences(batch):
    y_N, obj = batch["y_N"], objective("iw_sft")
    cached = {role: full_cache(batch[f"{role}_NV"], y_N) for role in ("teacher", "reference")}
    w_N = (batch["teacher_NV"] / batch["reference_NV"])[range(N), y_N].clamp(0.2, 1.8)
    loss_N = target_loss(batch["z_NV"], y_N, obj, cached)
    torch.testing.assert_close(loss_N, w_N * F.cross_entropy(batch["z_NV"], y_N, reduction="none"))


def test_the_fifteen_names():
    assert list(OBJECTIVES) == NAMES
    assert all(OBJECTIVES[name].name == name and OBJECTIVES[name].formula for name in NAMES)


def test_defaults_and_needs():
    assert objective("target_sft").values == {"eta": 0.5}
    assert objective("psft").values == {"clip_low": 0.2, "clip_high": 0.28}
    assert objective("eaft").values == {"entropy_k": 20}
    assert objective("target_sft").roles == ("teacher",) and objective("asft").roles == ("reference",)
    assert objective("sft").roles == () and objective("critical_tokens").columns == ("critical",)


def test_rows_declare_what_their_expressions_read():
    assert objective("psft").roles == ("reference",) and objective("psft").role is None
    row = Objective(
        "mine", "f", "s", label="column('a') * log_teacher_label", columns=("b",), label_roles=("reference",)
    )
    assert row.columns == ("b", "a") and row.roles == ("reference", "teacher")
    assert row.label.text == "column('a') * log_teacher_label" and row.with_parameters().columns == ("b", "a")


def test_eta_leaves_its_range_where_that_is_asked_for():
    with pytest.raises(
        InputError, match=r"in \[0, 1\], got 1.3; .* extrapolate=True \(--extrapolate\) lifts the range"
    ):
        objective("target_sft", eta=1.3)
    obj = objective("target_sft", eta=1.3, extrapolate=True)
    assert obj.values == {"eta": 1.3} and obj.with_parameters(eta=-0.5).values == {"eta": -0.5}
    with pytest.raises(InputError, match=r"in \[0, 1\], got 1.3"):
        obj.with_parameters(extrapolate=False)
    with pytest.raises(InputError, match="got nan"):
        objective("target_sft", eta=math.nan, extrapolate=True)
    with pytest.raises(InputError, match="'kd_hybrid' has no parameter that extrapolates"):
        objective("kd_hybrid", weight=1.5, extrapolate=True)


def test_parameters_do_not_leak_into_the_table():
    assert objective("target_sft", eta=0.1).values == {"eta": 0.1}
    assert OBJECTIVES["target_sft"].values == {"eta": 0.5}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("target", {}, "unknown objective 'target'; choose from asft, .*target_sft"),
        ("target_sft", {"beta": 1.0}, "'target_sft' has no parameter 'beta'; its parameters: eta"),
        ("sft", {"eta": 1.0}, "its parameters: none"),
        ("target_sft", {"eta": 1.5}, r"eta of objective 'target_sft' must be a number in \[0, 1\], got 1.5"),
        ("target_sft", {"eta": math.nan}, "got nan"),
        ("target_sft", {"eta": "0.5"}, "got '0.5'"),
        ("kl_sft", {"weight": -0.1}, r"weight of objective 'kl_sft' must be a number in \[0, inf\)"),
        ("prob_power", {"alpha": math.inf}, "got inf"),
        ("kd_hybrid", {"weight": 1.1}, r"in \[0, 1\]"),
        ("eaft", {"entropy_k": 2.5}, "must be an integer"),
        ("gem", {"beta": 0}, "beta of objective 'gem'"),
    ],
)
def test_wrong_names_and_parameters_are_refused(name, parameters, message):
    with pytest.raises(InputError, match=message):
        objective(name, **parameters)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"guided": 1.0, "role": "teacher"}, "must have a parameter 'eta'"),
        ({"sharpened": 1.0}, "must have a parameter 'beta'"),
        ({"cached": 1.0}, "must say whose, e.g. role='teacher'"),
        ({"label": 1.0, "pooled": lambda at, par: at.p_label}, "must declare it"),
        ({"label": "pooled"}, "label of objective 'mine' reads 'pooled', and the row does not say what is pooled"),
        ({"label": "p_lable"}, "label of objective 'mine': the name 'p_lable' cannot be used"),
        ({"label": 1.0, "parameters": {"exp": Parameter(1, 0, 1, "a share")}}, "a parameter's name must be"),
    ],
)
def test_rows_that_cannot_work_are_refused(row, message):
    with pytest.raises(InputError, match=message):
        Objective("mine", "formula", "source", **row)


def test_the_snippet_for_an_own_row(batch):
    page = (Path(__file__).parents[2] / "train" / "OBJECTIVES.md").read_text()
    snippet = page.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    try:
        exec(compile(snippet, "OBJECTIVES.md", "exec"), scope)
    finally:
        OBJECTIVES.pop("floored_target", None)
    obj = scope["obj"]
    assert obj.values == {"eta": 0.3, "floor": 0.05}

    z_NV, y_N, teacher_NV = batch["z_NV"], batch["y_N"], batch["teacher_NV"]
    g_NV = gradient_at_logits("fused", z_NV, y_N, obj, {"teacher": full_cache(teacher_NV, y_N)}, {})
    p_NV = z_NV.softmax(-1)
    trust_N1 = p_NV[range(N), y_N].clamp(min=0.05)[:, None]
    residual_NV = p_NV**0.7 * teacher_NV**0.3
    target_NV = trust_N1 * F.one_hot(y_N, V) + (1 - trust_N1) * residual_NV / residual_NV.sum(-1, keepdim=True)
    torch.testing.assert_close(g_NV, p_NV - target_NV)


def test_a_parameter_knows_its_range():
    assert Parameter(1, 0, 1, "a share").range == "[0, 1]"
    assert Parameter(1, -math.inf, 2, "x").range == "(-inf, 2]" and Parameter(1, 0, math.inf, "x").range == "[0, inf)"
    with pytest.raises(InputError, match=r"x must be a number in \[0, 1\], got True; it is a share"):
        Parameter(1, 0, 1, "a share").check(True, what="x")


def test_the_table_needs_no_torch():
    code = "import sys, logitcache_train.commands.objectives, logitcache_train; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
