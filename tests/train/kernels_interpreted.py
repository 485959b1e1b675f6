"""The Triton kernels against the readable loss, on a GPU or in Triton's interpreter; `test_kernels.py` runs this file.

Shapes: N positions, k cached ids, V vocabulary, D hidden.
"""

import pytest
import torch

from logitcache_train import OBJECTIVES, CachedTopK, Objective, Parameter, objective, target_loss
from logitcache_train import fused as fused_module
from logitcache_train.fused import fused_loss_and_metrics
from logitcache_train.kernels import triton_tail
from logitcache_train.positions import BadRowsError

# Rows without a tail compute -inf - -inf, which is masked afterwards; only NumPy, in the interpreter, mentions it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 13
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "capped": {"logit_softcap": 3.0},
    "all": {"bias": True, "logit_scale": -1.5, "logit_softcap": 5.0, "vocab_size": 999},
}
EVERYTHING = Objective(
    "everything",
    "every atom, and the entropy of the top-k",
    "this test",
    label=lambda at, par: at.top_k_entropy(20),
    cached=0.3,
    guided=lambda at, par: 1 - at.p_label,
    uniform=0.2,
    sharpened=-0.4,
    role="teacher",
    parameters={"eta": Parameter(0.6, 0, 1, "eta"), "beta": Parameter(0.7, 0, 1, "beta")},
)
used = []


@pytest.fixture(autouse=True)
def triton_passes(monkeypatch):
    """Use the kernels on the CPU too, and make sure that they ran."""

    def choose(head, atoms, max_rows):
        used.append(triton_tail.TritonTail(head, atoms))
        return used[-1]

    monkeypatch.setattr(fused_module, "choose_passes", choose)
    used.clear()
    yield
    assert used


def case(dtype, *, num_rows=3, num_tokens=1003, k=5, bias=False, vocab_size=None, spread=0.7, **head):
    g = torch.Generator().manual_seed(num_rows + num_tokens + k)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    size = vocab_size or num_tokens
    labels_N = torch.randint(size, (num_rows,), generator=g)
    log_q_NV = (2 * random(num_rows, num_tokens)).log_softmax(-1)
    log_probs_Nk, ids_Nk = log_q_NV.topk(k)
    topk = CachedTopK(
        ids=ids_Nk,
        log_probs=log_probs_Nk,
        num_kept=torch.full((num_rows,), k),
        log_tail=log_q_NV.scatter(1, ids_Nk, -torch.inf).logsumexp(-1),
        label_log_prob=log_q_NV.gather(1, labels_N[:, None])[:, 0],
    ).to(DEVICE)
    columns = {"critical": torch.arange(num_rows) % 2, "sequence": torch.arange(num_rows) // 3}
    return {
        "hidden_ND": random(num_rows, D).to(DEVICE, dtype),
        "weight_VD": (spread * random(num_tokens, D)).to(DEVICE, dtype),
        "bias_V": random(num_tokens).to(DEVICE, dtype) if bias else None,
        "labels_N": labels_N.to(DEVICE),
        "cached": {"teacher": topk, "reference": topk},
        "columns": {name: column.to(DEVICE) for name, column in columns.items()},
        "vocab_size": vocab_size,
        "head": head,
    }


def leaves(made, dtype=None):
    tensors = [made[name] for name in ("hidden_ND", "weight_VD", "bias_V") if made[name] is not None]
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def readable(made, obj):
    """Sum of the losses and its gradients, in float64 on the same (rounded) inputs."""
    inputs = leaves(made, torch.float64)
    z_NV = inputs[0] @ inputs[1].T
    z_NV = made["head"].get("logit_scale", 1.0) * (z_NV if made["bias_V"] is None else z_NV + inputs[2])
    if cap := made["head"].get("logit_softcap"):
        z_NV = cap * (z_NV / cap).tanh()
    loss = target_loss(
        z_NV, made["labels_N"], obj, made["cached"], made["columns"], vocab_size=made["vocab_size"]
    ).sum()
    return loss.detach(), torch.autograd.grad(loss, inputs), z_NV.detach()


def fused(made, obj, chunk_size=4):
    inputs = leaves(made)
    options = {"bias": inputs[2] if len(inputs) > 2 else None, "vocab_size": made["vocab_size"], **made["head"]}
    loss, _ = fused_loss_and_metrics(
        *inputs[:2], made["labels_N"], obj, made["cached"], made["columns"], 1, chunk_size, **options
    )
    loss.backward()
    return loss.detach(), [t.grad for t in inputs]


def agree(made, obj, tolerance, **options):
    """Gradients to `tolerance` of the largest, which is a sum of g (at most C + |pull|) times W, h or 1."""
    expected_loss, expected, _ = readable(made, obj)
    loss, gradients = fused(made, obj, **options)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=tolerance)
    for found, right in zip(gradients, expected, strict=True):
        assert (found - right).abs().max() <= tolerance * max(1, right.abs().max())


@pytest.mark.parametrize(("head", "num_rows"), [("plain", 7), ("all", 3)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name, head, num_rows):
    agree(case(torch.float32, num_rows=num_rows, **HEADS[head]), objective(name), 5e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_in_bfloat16(name):
    """Products and gradients are rounded to 2^-9; a logit of 8 moves by 2^-6, and a p with it."""
    parameters = {"threshold": 0.5} if name == "profit" else {}
    agree(case(torch.bfloat16), objective(name, **parameters), 2**-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head, dtype):
    agree(case(dtype, **HEADS[head]), EVERYTHING, 5e-6 if dtype == torch.float32 else 2**-5)


@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (2, 1), (9, 9), (130, 129), (4096, 1), (4097, 3), (9000, 64)])
def test_every_size(num_tokens, k):
    agree(case(torch.float32, num_tokens=num_tokens, k=k), EVERYTHING, 5e-6)


@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_every_chunk_size(chunk_size):
    for obj in (EVERYTHING, objective("iw_sft")):
        agree(case(torch.float32, num_rows=5), obj, 5e-6, chunk_size=chunk_size)


def test_confident_students():
    """The maximum moves from tile to tile; float32 products of 1,500 are right to 3e-4, and so are their p."""
    agree(case(torch.float32, num_tokens=9001, spread=100.0), EVERYTHING, 3e-4)


def test_no_rows():
    loss, gradients = fused(case(torch.float32, num_rows=0), EVERYTHING)
    assert loss == 0 and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["sft", "label_smoothing"])
def test_logits_that_are_no_numbers(name, value):
    made = case(torch.float32)
    made["hidden_ND"][:, 0], made["weight_VD"][:, 0] = 1, 0
    made["weight_VD"][(made["labels_N"][0] + 1) % 1003, 0] = value
    if value == float("-inf") and name == "sft":
        fused(made, objective(name))  # a token that cannot be: no mass, no loss
        return
    with pytest.raises(BadRowsError, match=r"not finite|NaN or infinite"):
        fused(made, objective(name))
