"""What belongs to a position: bad input is named, by row where it is one, by both losses alike.

Shapes: N positions, V vocabulary.
"""

import math

import pytest
import torch

from logitcache_storage.errors import InputError
from logitcache_train import CachedTopK, Objective, fused_target_loss, objective, target_loss
from logitcache_train.positions import BadRowsError

PATHS = ["readable", "fused"]


def evaluate(path, z_NV, labels_N, obj, cached=None, columns=None, **options):
    if path == "readable":
        return target_loss(z_NV, labels_N, obj, cached, columns, **options)
    # With the identity as head the hidden states are the logits.
    head_VV = torch.eye(z_NV.shape[1], dtype=z_NV.dtype)
    return fused_target_loss(z_NV, head_VV, labels_N, obj, cached, columns, **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kd", {"cached": None}, "'kd' needs the cache role 'teacher', given: none; .*--cache teacher=URL"),
        ("asft", {}, "needs the cache role 'reference', given: teacher"),
        ("critical_tokens", {}, "needs the column 'critical', given: none"),
        (
            "critical_tokens",
            {"columns": {"critical": torch.ones(3)}},
            "'critical' has 3 rows, expected one for each of 4",
        ),
        ("sft", {"labels": [0, 1, 2, 7]}, "labels of rows 3 are outside the vocabulary of 7 tokens, the first is 7"),
        ("sft", {"labels": [-100, 1, -100, 0]}, "labels of rows 0, 2 are outside .* the first is -100"),
        ("sft", {"vocab_size": 3}, "labels of rows 3 are outside the vocabulary of 3 tokens"),
        ("sft", {"z": (1, math.nan)}, "logits of rows 1 of 4 hold NaN or infinite values"),
        ("profit", {"z": (2, math.inf)}, "logits of rows 2 of 4 hold NaN or infinite values"),
        ("kd", {"log_tail": math.nan}, "loss of rows 0 of 4 is not finite: .*cached log-probs are damaged"),
    ],
)
def test_bad_input_is_named(path, name, change, message):
    labels_N = torch.tensor(change.get("labels", [0, 1, 2, 3]))
    z_NV = torch.arange(28.0).reshape(4, 7) % 5
    if "z" in change:
        row, value = change["z"]
        z_NV[row, 4] = value
    log_q_NV = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    cache = CachedTopK.from_log_probs(log_q_NV, torch.arange(4), 3)
    cache.log_tail[0] = change.get("log_tail", cache.log_tail[0])
    cached = change.get("cached", {"teacher": cache})
    with pytest.raises(InputError, match=message) as e:
        evaluate(
            path, z_NV, labels_N, objective(name), cached, change.get("columns"), vocab_size=change.get("vocab_size")
        )
    if isinstance(e.value, BadRowsError):
        assert all(0 <= row < 4 for row in e.value.rows)


def test_a_logit_of_minus_infinity_is_refused_where_it_matters():
    z_NV = torch.zeros(4, 7)
    z_NV[2, 4] = -math.inf
    labels_N = torch.tensor([0, 1, 2, 3])
    with pytest.raises(BadRowsError, match="loss of rows 2 of 4 is not finite: a logit is -inf"):
        target_loss(z_NV, labels_N, objective("label_smoothing"))
    torch.testing.assert_close(target_loss(z_NV, labels_N, objective("sft"))[2], torch.tensor(6.0).log())


def test_many_bad_rows_are_counted():
    with pytest.raises(BadRowsError, match="rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are outside") as e:
        target_loss(torch.zeros(20, 3), torch.full((20,), 5), objective("sft"))
    assert e.value.rows == list(range(20))


def test_a_coefficient_must_declare_what_it_reads():
    obj = Objective("mine", "f", "s", label=lambda at, par: at.column("weight"))
    with pytest.raises(InputError, match="objective 'mine' reads 'weight': declare it in its columns"):
        target_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), obj, columns={"weight": torch.ones(2)})


@pytest.mark.parametrize("path", PATHS)
def test_a_column_that_is_no_number_is_an_error_of_its_rows(path):
    columns = {"critical": torch.tensor([1.0, math.nan, 0.0, math.inf])}
    with pytest.raises(BadRowsError, match=r"loss of rows 1, 3 of 4 is not finite: .* a coefficient is no number") as e:
        evaluate(path, torch.zeros(4, 7), torch.arange(4), objective("critical_tokens"), columns=columns)
    assert e.value.rows == [1, 3]
