"""Rows from YAML: the same gradients as the table's where they say the same, and what they refuse.

Shapes: N positions, V vocabulary.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from logitcache_storage.errors import InputError
from logitcache_train import OBJECTIVES, CachedTopK, fused_target_loss, objective, target_loss
from logitcache_train.custom import objective_from_mapping, read_objective
from logitcache_train.positions import BadRowsError

N, V = 24, 19
EXAMPLE = """
name: floored_target
label: max(p_label, floor)
guided: 1 - max(p_label, floor)
role: teacher
parameters: {eta: 0.5, floor: {default: 0.05, low: 0, high: 1, meaning: the least weight of the label}}
"""
COPIES = {
    "sft": "{label: 1}",
    "dft": "{label: exp(log_p_label)}",
    "prob_power": "{label: p_label ** alpha, parameters: {alpha: 1}}",
    "profit": "{label: 1 - (p_label <= threshold), parameters: {threshold: 1e-1}}",
    "eaft": "{label: top_k_entropy(20)}",
    "iw_sft": "{label: 'max(min(exp(pooled), 1.8), 0.2)', pooled: log_p_label - log_reference_label}",
    "critical_tokens": "{label: \"column('critical')\"}",
    "label_smoothing": "{label: 0.9, uniform: 0.1}",
    "kl_sft": "{label: 1, cached: weight, role: reference, parameters: {weight: {default: 0.1, low: 0}}}",
    "asft": "{label: 1 - p_rest, cached: 0.1, role: reference}",
    "psft": "{label: 'exp(log_p_label - log_reference_label) * (exp(log_p_label - log_reference_label) <= 1.28)'}",
    "gem": "{label: 1, sharpened: -1, parameters: {beta: 0.7}}",
    "kd": "{cached: 1, role: teacher}",
    "kd_hybrid": "{label: half, cached: half, role: teacher, parameters: {half: 0.5}}",
    "target_sft": "{label: p_label, guided: p_rest, role: teacher, parameters: {eta: 0.5}}",
}


def make(text):
    return objective_from_mapping({"name": "mine", **yaml.safe_load(text)})


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(5)
    z_NV = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    labels_N = torch.randint(V, (N,), generator=g)
    cached = {
        role: CachedTopK.from_log_probs(2 * torch.randn(N, V, generator=g).double().log_softmax(-1), labels_N, 4)
        for role in ("teacher", "reference")
    }
    columns = {"critical": torch.arange(N) % 2, "sequence": torch.arange(N) // 5}
    return z_NV, labels_N, cached, columns


def gradient(path, obj, z_NV, labels_N, cached, columns):
    z_NV = z_NV.clone().requires_grad_()
    cached = {role: cached[role] for role in obj.roles}
    if path == "readable":
        target_loss(z_NV, labels_N, obj, cached, columns).sum().backward()
    else:  # with the identity as head the hidden states are the logits
        head_VV = torch.eye(V, dtype=z_NV.dtype)
        fused_target_loss(z_NV, head_VV, labels_N, obj, cached, columns, num_items=1, chunk_size=7).backward()
    return z_NV.grad


@pytest.mark.parametrize("path", ["readable", "fused"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_copy_of_a_row_has_its_gradients(batch, name, path):
    expected_NV = gradient(path, objective(name), *batch)
    assert expected_NV.abs().max() > 0.05
    torch.testing.assert_close(gradient(path, make(COPIES[name]), *batch), expected_NV, atol=1e-13, rtol=0)


def test_the_example(batch):
    z_NV, labels_N, _, _ = batch
    teacher_NV = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
    obj = objective_from_mapping(yaml.safe_load(EXAMPLE)).with_parameters(eta=0.3, floor=0.2)
    assert obj.values == {"eta": 0.3, "floor": 0.2} and obj.roles == ("teacher",)
    whole = CachedTopK.from_log_probs(teacher_NV.log(), labels_N, V)
    g_NV = gradient("readable", obj, z_NV, labels_N, {"teacher": whole}, {})
    p_NV = z_NV.softmax(-1)
    trust_N1 = p_NV[range(N), labels_N].clamp(min=0.2)[:, None]
    residual_NV = p_NV**0.7 * teacher_NV**0.3
    target_NV = trust_N1 * F.one_hot(labels_N, V) + (1 - trust_N1) * residual_NV / residual_NV.sum(-1, keepdim=True)
    torch.testing.assert_close(g_NV, p_NV - target_NV, atol=1e-12, rtol=0)


def test_roles_and_columns_follow_from_the_coefficients():
    obj = make("{label: \"column('a') + log_teacher_label\", uniform: 0.1, cached: 0.5, role: reference}")
    assert obj.roles == ("reference", "teacher") and obj.columns == ("a",)
    assert make(COPIES["iw_sft"]).optional_columns == ("sequence",)
    obj = make("{label: 1, parameters: {eta: 0.2}}")
    assert obj.parameters["eta"].range == "[0, 1]" and obj.formula == "with the gradient 1 (p - label)"


def test_a_mapping_survives_a_run_record(batch):
    mapping = yaml.safe_load(EXAMPLE)
    again = objective_from_mapping(json.loads(json.dumps(mapping)))
    assert torch.equal(gradient("readable", again, *batch), gradient("readable", make(EXAMPLE), *batch))


@pytest.mark.parametrize("label", ["1 / (p_label - p_label)", "log(-p_label)", "1 / zero", "p_label ** (1 / zero) / 0"])
@pytest.mark.parametrize("path", ["readable", "fused"])
def test_a_coefficient_that_is_no_number_is_an_error_of_its_rows(batch, label, path):
    obj = make(f"{{label: {label}, parameters: {{zero: 0}}}}")
    with pytest.raises(BadRowsError, match=r"is not finite: .* a coefficient is no number") as e:
        gradient(path, obj, *batch)
    assert e.value.rows == list(range(N))


def test_only_the_rows_of_a_division_by_zero_are_named(batch):
    with pytest.raises(BadRowsError, match="loss of rows 0, 2, 4"):
        gradient("readable", make("{label: \"1 / column('critical')\"}"), *batch)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([], "must be a mapping with name, formula"),
        ({"label": 1}, "needs a name of letters, digits and underscores, got None"),
        ({"name": "a b", "label": 1}, "got 'a b'"),
        ({"name": "sft", "label": 1}, "'sft' is a row of the table already"),
        ({"name": "mine"}, "has no coefficient; give at least one of label, cached, guided, uniform, sharpened"),
        ({"name": "mine", "label": 1, "student": 0.5}, "the student takes what the others leave of one"),
        ({"name": "mine", "labels": 1}, "has no key 'labels'; its keys: name, .*label, cached"),
        ({"name": "mine", "label": True}, "label of objective 'mine' must be a number or an expression"),
        ({"name": "mine", "label": [1]}, "must be a number or an expression"),
        ({"name": "mine", "label": math.inf}, "must be a number or an expression"),
        ({"name": "mine", "label": "p_lable"}, "label of objective 'mine': the name 'p_lable' cannot be used"),
        ({"name": "mine", "cached": 1}, "must say whose, e.g. role='teacher'"),
        ({"name": "mine", "cached": 1, "role": "base"}, "must be teacher or reference, got 'base'"),
        ({"name": "mine", "guided": 1, "role": "teacher"}, "must have a parameter 'eta'"),
        ({"name": "mine", "label": "pooled"}, "reads 'pooled', and the row does not say what is pooled"),
        ({"name": "mine", "label": 1, "pooled": "pooled"}, "reads 'pooled'"),
        ({"name": "mine", "label": 1, "pooled": 3}, "pooled of objective 'mine' must be an expression, got 3"),
        ({"name": "mine", "label": 1, "parameters": [1]}, "must be a mapping of names"),
        ({"name": "mine", "label": 1, "parameters": {"exp": 1}}, "a parameter's name must be a word other than"),
        ({"name": "mine", "label": 1, "parameters": {"a": {}}}, "parameter 'a' of objective 'mine' needs a default"),
        (
            {"name": "mine", "label": 1, "parameters": {"a": "x"}},
            "default of parameter 'a' .* must be a number, got 'x'",
        ),
        (
            {"name": "mine", "label": 1, "parameters": {"a": {"default": 1, "max": 2}}},
            "has no 'max'; there are default",
        ),
        (
            {"name": "mine", "label": 1, "parameters": {"a": {"default": 1, "low": 3, "high": 2}}},
            "empty range from 3 to 2",
        ),
        (
            {"name": "mine", "label": 1, "parameters": {"a": {"default": 4, "high": 2}}},
            r"must be a number in \(-inf, 2\]",
        ),
        (
            {"name": "mine", "label": 1, "parameters": {"eta": 1.5}},
            r"eta of objective 'mine' must be a number in \[0, 1\]",
        ),
    ],
)
def test_rows_that_make_no_objective(mapping, message):
    with pytest.raises(InputError, match=message):
        objective_from_mapping(mapping)


def test_a_file_with_a_row(tmp_path):
    path = tmp_path / "row.yaml"
    path.write_text("learning_rate: 1e-4\nobjective:\n" + "".join(f"  {line}\n" for line in EXAMPLE.splitlines()))
    assert read_objective(path).values == {"eta": 0.5, "floor": 0.05}
    for text, message in [
        ("objective: sft", "expected a mapping under the key 'objective'"),
        ("[1]", "expected a mapping under the key 'objective'"),
        ("objective: {", "cannot be read as YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_objective(path)
    with pytest.raises(InputError, match="No such file"):
        read_objective(tmp_path / "missing.yaml")


def test_the_snippet_of_the_page_is_the_example():
    page = (Path(__file__).parents[2] / "train" / "OBJECTIVES.md").read_text()
    found = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert found["objective"] == yaml.safe_load(EXAMPLE)
