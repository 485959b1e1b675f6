"""Coefficients as text: what they compute, against Python's own arithmetic, and what they refuse."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_train.expressions import MAX_LENGTH, check_parameter_name, parse_expression

P = [0.05, 0.3, 0.9]
PARAMETERS = {"floor": False, "k": True}
PAR = SimpleNamespace(floor=0.2, k=3)


def positions():
    """What an expression may look at, at three positions."""
    p_N = torch.tensor(P, dtype=torch.float64)
    return SimpleNamespace(
        p_label=p_N,
        log_p_label=p_N.log(),
        p_rest=1 - p_N,
        pooled=-p_N,
        column=lambda name: {"critical": torch.tensor([0.0, 1.0, math.nan]).double()}[name],
        label_log_prob=lambda role: {"teacher": p_N / 2, "reference": p_N / 4}[role].log(),
        top_k_entropy=lambda k: p_N / k,
    )


def evaluate(text):
    value = parse_expression(text, PARAMETERS, what="label")(positions(), PAR)
    return value.expand(3).tolist()


def expected(text):
    """The same by Python's own arithmetic on numbers, one position at a time."""
    functions = {"min": min, "max": max, "abs": abs, "exp": math.exp, "log": math.log}
    functions["clamp"] = lambda x, low, high: min(max(x, low), high)
    names = [{"p_label": p, "log_p_label": math.log(p), "p_rest": 1 - p, "floor": 0.2, "k": 3} for p in P]
    return [float(eval(text, {**functions, **scope})) for scope in names]


leaves = st.sampled_from(["p_label", "p_rest", "log_p_label", "floor", "k", "2", "0.5", "1e-3"])
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "<", "<=", ">", ">=", "==", "!="]), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda parts: f"{parts[0]}({parts[1]}, {parts[2]})"
        ),
        inner.map(lambda x: f"clamp({x}, -1, floor)"),
        inner.map(lambda x: f"abs(-{x})"),
        inner.map(lambda x: f"exp(min({x}, 3))"),
        inner.map(lambda x: f"log(abs({x}) + 1)"),
        inner.map(lambda x: f"abs({x}) ** 0.5"),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(expressions)
def test_any_expression_is_what_python_makes_of_it(text):
    try:
        wanted = expected(text)
    except ZeroDivisionError:
        assert not all(math.isfinite(value) for value in evaluate(text)) or "<" in text or ">" in text or "=" in text
        return
    # Where Python rounds differently, a comparison of equals may fall to the other side.
    if not any(sign in text for sign in "<>="):
        assert evaluate(text) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("p_label > 0.3", [0, 0, 1]),
        ("p_label >= 0.3", [0, 1, 1]),
        ("1 - (p_label == 0.3)", [1, 0, 1]),
        ("-p_label ** 2", [-0.0025, -0.09, -0.81]),
        ("2 ** k ** 2", [512] * 3),
        ("pooled", [-0.05, -0.3, -0.9]),
        ("exp(log_teacher_label - log_reference_label)", [2, 2, 2]),
        ("column('critical') / 2", [0, 0.5, math.nan]),
        ("column('critical') > 0", [0, 1, math.nan]),
        ("max(column('critical'), 2)", [2, 2, math.nan]),
        ("top_k_entropy(k) + top_k_entropy(2)", [p / 3 + p / 2 for p in P]),
        ("1 / (floor - floor)", [math.inf] * 3),
        ("1 / 0", [math.inf] * 3),
        ("log(-1)", [math.nan] * 3),
        ("(-1) ** 0.5", [math.nan] * 3),
        ("9 ** 9 ** 9", [math.inf] * 3),
    ],
)
def test_values(text, wanted):
    assert evaluate(text) == pytest.approx(wanted, nan_ok=True)


def test_what_an_expression_reads_is_known_before_it_runs():
    text = "column('a') * log_reference_label + column('b') * log_teacher_label + log_reference_label"
    expression = parse_expression(text, {}, what="label")
    assert expression.columns == ("a", "b") and expression.label_roles == ("reference", "teacher")
    assert not expression.is_pooled and parse_expression("1 - pooled", {}, what="label").is_pooled
    assert str(expression.text) == text and "function" not in repr(expression)


def test_expressions_travel_to_other_processes():
    expression = parse_expression("max(exp(p_label), floor) * (p_rest < 1) - column('critical')", PARAMETERS, what="x")
    again = pickle.loads(pickle.dumps(expression))
    assert again(positions(), PAR).tolist()[:2] == expression(positions(), PAR).tolist()[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "p_lable",
            "label: the name 'p_lable' cannot be used; there are numbers, .* floor, k, p_label, .*top_k_entropy",
        ),
        ("__import__('os').system('true')", "__import__.* cannot be used"),
        ("open('x')", "the function 'open' cannot be used"),
        ("p_label.grad", "'p_label.grad' cannot be used"),
        ("p_label[0]", "cannot be used"),
        ("[p_label]", "cannot be used"),
        ("lambda: 1", "cannot be used"),
        ("p_label if floor else 1", "cannot be used"),
        ("p_label and 1", "cannot be used"),
        ("not p_label", "cannot be used"),
        ("0 < p_label < 1", "'0 < p_label < 1' cannot be used; .*comparisons of two values"),
        ("p_label % 2", "cannot be used"),
        ("p_label // 2", "cannot be used"),
        ("p_label @ p_label", "cannot be used"),
        ("True", "'True' cannot be used"),
        ("1j", "'1j' cannot be used"),
        ("'a'", "cannot be used"),
        ("f'{p_label}'", "cannot be used"),
        ("exp(*[1])", "cannot be used"),
        ("exp(x=1)", "cannot be used"),
        ("exp(1, 2)", "exp takes 1 argument, got 2"),
        ("min(1)", "min takes 2 arguments or more, got 1"),
        ("clamp(1, 2)", "clamp takes 3 arguments, got 2"),
        ("column(critical)", r"column is .* as in column\('critical'\); got column\(critical\)"),
        ("column('a', 'b')", "column is"),
        ("top_k_entropy(2.5)", "k a whole number"),
        ("top_k_entropy(floor)", "k a whole number"),
        ("top_k_entropy(0)", "k a whole number"),
        ("top_k_entropy(True)", "k a whole number"),
        ("", "no arithmetic expression"),
        ("1 +", "no arithmetic expression"),
        ("x = 1", "no arithmetic expression"),
        ("1; 2", "no arithmetic expression"),
        ("1\x00", "no arithmetic expression"),
        ("(" * 400 + ")" * 400, "no arithmetic expression"),
        ("-" * 400 + "1", "more than 100 operations are nested"),
        ("+".join("1" * 200), "more than 100 operations are nested"),
        ("1" + "0" * 400, "larger than 1e308"),
        ("1" * (MAX_LENGTH + 1), "has 1001 characters, expected at most 1000"),
    ],
)
def test_anything_else_is_refused_by_name(text, message):
    with pytest.raises(InputError, match=message):
        parse_expression(text, PARAMETERS, what="label")


@pytest.mark.parametrize("name", ["p_label", "exp", "column", "lambda", "1a", "a b", "", 3])
def test_parameters_have_names_of_their_own(name):
    with pytest.raises(InputError, match="a parameter's name must be a word other than"):
        check_parameter_name(name, what="objective 'mine'")
