"""The fused loss against autograd through the readable one (whose oracles are in test_objectives and test_loss).

Shapes: N positions, k cached ids, V vocabulary, D hidden.
"""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_train import OBJECTIVES, CachedTopK, fused_target_loss, objective, target_loss
from logitcache_train import fused as fused_module
from logitcache_train.fused import CHUNK_BYTES, default_chunk_size, fused_loss_and_metrics, split_rows
from logitcache_train.kernels import eager
from logitcache_train.loss import target_metrics
from logitcache_train.positions import BadRowsError

N, V, D, K = 31, 67, 13, 5
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": 0.25},
    "capped": {"logit_softcap": 3.0},
    "all": {"bias": True, "logit_scale": 1.5, "logit_softcap": 5.0, "vocab_size": 60},
}


def random_cache(seed, labels_N, num_tokens):
    g = torch.Generator().manual_seed(seed)
    log_q_NV = (2 * torch.randn(len(labels_N), num_tokens, generator=g, dtype=torch.float64)).log_softmax(-1)
    log_probs_Nk, ids_Nk = log_q_NV.topk(K)
    return CachedTopK(
        ids=ids_Nk.int(),
        log_probs=log_probs_Nk,
        num_kept=torch.full((len(labels_N),), K),
        log_tail=log_q_NV.scatter(1, ids_Nk, -torch.inf).logsumexp(-1),
        label_log_prob=log_q_NV.gather(1, labels_N[:, None])[:, 0],
    )


class Batch:
    """Hidden states, a head, labels, caches and columns."""

    def __init__(self, num_rows=N, dtype=torch.float64, *, bias=False, vocab_size=None, **head):
        g = torch.Generator().manual_seed(1)
        self.hidden_ND = torch.randn(num_rows, D, generator=g, dtype=torch.float64).to(dtype)
        self.weight_VD = (0.7 * torch.randn(V, D, generator=g, dtype=torch.float64)).to(dtype)
        self.bias_V = torch.randn(V, generator=g, dtype=torch.float64).to(dtype) if bias else None
        self.labels_N = torch.randint(vocab_size or V, (num_rows,), generator=g)
        self.labels_N[::3] = (self.hidden_ND @ self.weight_VD[: vocab_size or V].T)[::3].argmax(-1)
        self.cached = {role: random_cache(i, self.labels_N, V) for i, role in enumerate(["teacher", "reference"])}
        self.columns = {"critical": torch.arange(num_rows) % 2, "sequence": torch.arange(num_rows) // 7}
        self.head = head
        self.vocab_size = vocab_size

    def sources(self):
        tensors = (self.hidden_ND, self.weight_VD, self.bias_V)
        return [None if t is None else t.clone().requires_grad_() for t in tensors]

    def dense(self, obj, dtype=torch.float64):
        """Loss and gradients by autograd over all logits."""
        hidden_ND, weight_VD, bias_V = (None if t is None else t.to(dtype).requires_grad_() for t in self.sources())
        z_NV = hidden_ND @ weight_VD.T
        z_NV = self.head.get("logit_scale", 1.0) * (z_NV if bias_V is None else z_NV + bias_V)
        if cap := self.head.get("logit_softcap"):
            z_NV = cap * (z_NV / cap).tanh()
        options = {"vocab_size": self.vocab_size}
        loss = target_loss(z_NV, self.labels_N, obj, self.cached, self.columns, **options).mean()
        tensors = [t for t in (hidden_ND, weight_VD, bias_V) if t is not None]
        metrics = target_metrics(z_NV, self.labels_N, obj, self.cached, self.columns, **options)
        return loss.detach(), torch.autograd.grad(loss, tensors), metrics

    def fused(self, obj, **options):
        hidden_ND, weight_VD, bias_V = self.sources()
        options = {"chunk_size": 9, "bias": bias_V, "vocab_size": self.vocab_size} | self.head | options
        loss, metrics = fused_loss_and_metrics(
            hidden_ND, weight_VD, self.labels_N, obj, self.cached, self.columns, **options
        )
        loss.backward()
        return loss.detach(), [t.grad for t in (hidden_ND, weight_VD, bias_V) if t is not None], metrics


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_hidden_states_weight_and_bias(name, head):
    batch, obj = Batch(**HEADS[head]), objective(name)
    loss, gradients, metrics = batch.dense(obj)
    fused_loss, fused_gradients, fused_metrics = batch.fused(obj)
    torch.testing.assert_close(fused_loss, loss, atol=1e-12, rtol=1e-12)
    assert max(g.abs().max() for g in gradients) > 1e-3
    for fused, expected in zip(fused_gradients, gradients, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-14, rtol=1e-10)
    assert fused_metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(fused_metrics[key], value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["sft", "label_smoothing", "kd"])
def test_gradients_by_finite_differences(name):
    # Only where no coefficient depends on the student is the loss's own derivative p - Q.
    batch = Batch(num_rows=3, bias=True, logit_scale=0.8, logit_softcap=4.0)
    obj, step = objective(name), 1e-5
    _, gradients, _ = batch.fused(obj)
    g = torch.Generator().manual_seed(7)
    for source, gradient in zip(("hidden_ND", "weight_VD", "bias_V"), gradients, strict=True):
        value = getattr(batch, source)
        direction = torch.randn(value.shape, generator=g, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            setattr(batch, source, value + sign * step * direction)
            losses.append(batch.fused(obj)[0])
        setattr(batch, source, value)
        slope = (losses[0] - losses[1]) / (2 * step)
        # central differences: error of step^2 times a third derivative of order |direction|^3 ~ 1e3 here
        torch.testing.assert_close((gradient * direction).sum(), slope, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 30, 31, 32, 1000, None])
@pytest.mark.parametrize("name", ["target_sft", "iw_sft", "gem"])
def test_any_chunk_size_gives_the_same(name, chunk_size):
    batch = Batch()
    loss, gradients, _ = batch.fused(objective(name), chunk_size=7)
    other_loss, other_gradients, _ = batch.fused(objective(name), chunk_size=chunk_size)
    torch.testing.assert_close(other_loss, loss)
    for other, expected in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(other, expected, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """Against float64 on the same (rounded) inputs.

    With unit roundoff u, rounding the logits moves log p_a by at most 2 u max|z|, so g by that factor of its bound
    C + |pull| <= 2; storing g and the sums once more costs 3 u. dh and dW are sums of g times W or h.
    """
    batch, obj = Batch(dtype=dtype), objective(name, **({"threshold": 0.5} if name == "profit" else {}))
    loss, (dh, dw), _ = batch.dense(obj)
    fused_loss, (fused_dh, fused_dw), _ = batch.fused(obj)
    assert fused_dh.dtype == fused_dw.dtype == dtype and fused_loss.dtype == torch.float32
    hidden_ND, weight_VD = batch.hidden_ND.double(), batch.weight_VD.double()
    u = torch.finfo(dtype).eps / 2
    error = u * (2 * (hidden_ND @ weight_VD.T).abs().max() + 3)
    assert (fused_dh - dh).abs().max() <= error * 2 * weight_VD.abs().max() / N
    assert (fused_dw - dw).abs().max() <= error * 2 * hidden_ND.abs().max()
    assert (fused_loss - loss).abs() <= error * 4


def test_float16_gradients_survive_many_tokens():
    batch, obj = Batch(dtype=torch.float16), objective("sft")
    hidden_ND, weight_VD, _ = batch.sources()
    loss = fused_target_loss(hidden_ND, weight_VD, batch.labels_N, obj, num_items=2**22)
    (loss * 2.0**22).backward()  # what a loss scale does
    _, (dh, _), _ = batch.dense(obj)
    assert ((hidden_ND.grad / N - dh).abs().max() / dh.abs().max()) < 0.01


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_weights():
    batch, obj = Batch(dtype=torch.float32), objective("target_sft")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, (dh, dw), _ = batch.fused(obj)
    assert loss.dtype == dh.dtype == dw.dtype == torch.float32
    rounded = Batch(dtype=torch.float32)
    rounded.hidden_ND, rounded.weight_VD = rounded.hidden_ND.bfloat16(), rounded.weight_VD.bfloat16()
    low_loss, (low_dh, low_dw), _ = rounded.fused(obj)
    torch.testing.assert_close(loss, low_loss)
    torch.testing.assert_close(dh, low_dh.float(), atol=0, rtol=2**-7)
    torch.testing.assert_close(dw, low_dw.float(), atol=0, rtol=2**-7)


def test_weights_are_widened_by_tiles(monkeypatch):
    batch, obj = Batch(dtype=torch.bfloat16), objective("kd")
    whole = batch.fused(obj)[1]
    monkeypatch.setattr("logitcache_train.head.WEIGHT_TILE", 10)
    for tiled, expected in zip(batch.fused(obj)[1], whole, strict=True):
        assert torch.equal(tiled, expected)


def test_only_wanted_gradients_are_made():
    batch, obj = Batch(), objective("target_sft")
    full = batch.fused(obj)[1]
    hidden_ND = batch.hidden_ND.clone().requires_grad_()
    fused_target_loss(hidden_ND, batch.weight_VD, batch.labels_N, obj, batch.cached).backward()
    torch.testing.assert_close(hidden_ND.grad, full[0])
    weight_VD = batch.weight_VD.clone().requires_grad_()
    fused_target_loss(batch.hidden_ND, weight_VD, batch.labels_N, obj, batch.cached).backward()
    torch.testing.assert_close(weight_VD.grad, full[1])
    loss = fused_target_loss(batch.hidden_ND, batch.weight_VD, batch.labels_N, obj, batch.cached)
    assert not loss.requires_grad
    with torch.no_grad():
        loss = fused_target_loss(hidden_ND, weight_VD, batch.labels_N, obj, batch.cached)
    assert not loss.requires_grad


def test_num_items_divides_the_sum_and_micro_batches_add_up():
    batch, obj = Batch(), objective("target_sft")
    loss, (dh, dw), _ = batch.fused(obj)
    hidden_ND, weight_VD, _ = batch.sources()
    parts = []
    for rows in (slice(0, 4), slice(4, N)):
        cached = {role: topk[rows] for role, topk in batch.cached.items()}
        part = fused_target_loss(
            hidden_ND[rows], weight_VD, batch.labels_N[rows], obj, cached, num_items=torch.tensor(N)
        )
        part.backward()
        parts.append(part.detach())
    torch.testing.assert_close(sum(parts), loss)
    torch.testing.assert_close(hidden_ND.grad, dh)
    torch.testing.assert_close(weight_VD.grad, dw)


def test_the_factor_from_above_scales_the_gradients():
    batch, obj = Batch(), objective("gem")
    _, (dh, dw), _ = batch.fused(obj)
    hidden_ND, weight_VD, _ = batch.sources()
    (-3 * fused_target_loss(hidden_ND, weight_VD, batch.labels_N, obj)).backward()
    torch.testing.assert_close(hidden_ND.grad, -3 * dh)
    torch.testing.assert_close(weight_VD.grad, -3 * dw)


def test_a_second_backward_is_refused_and_not_wrong():
    batch = Batch()
    hidden_ND, weight_VD, _ = batch.sources()
    loss = fused_target_loss(hidden_ND, weight_VD, batch.labels_N, objective("sft"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_gather_both_gradients():
    batch, ids_N = Batch(), torch.arange(N) % V
    results = []
    for fused in (True, False):
        weight_VD = batch.weight_VD.clone().requires_grad_()
        hidden_ND = weight_VD[ids_N].tanh()
        if fused:
            loss = fused_target_loss(hidden_ND, weight_VD, batch.labels_N, objective("dft"))
        else:
            loss = target_loss(hidden_ND @ weight_VD.T, batch.labels_N, objective("dft")).mean()
        loss.backward()
        results.append(weight_VD.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows(name):
    loss, gradients, metrics = Batch(num_rows=0).fused(objective(name))
    assert loss == 0 and all((g == 0).all() for g in gradients) and metrics["p_label"].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sft", "gem"])
def test_no_tensor_of_all_logits(name, dtype, monkeypatch):
    """While chunks are visited nothing larger than a chunk is alive, and in float32 nothing larger than a block."""
    num_rows, num_tokens, chunk_size, block_size = 40, 1031, 16, 4
    largest, overwrite = {torch.float32: [], torch.bfloat16: []}, fused_module._overwrite_with_gradient

    def spy(*args):
        overwrite(*args)
        for tensor in (o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype in largest):
            largest[tensor.dtype].append(tensor.untyped_storage().nbytes() // tensor.dtype.itemsize)

    hidden_ND = torch.randn(num_rows, 4, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(num_tokens, 4, dtype=dtype, requires_grad=True)
    gc.collect()
    monkeypatch.setattr(eager, "BLOCK_BYTES", 4 * block_size * num_tokens)
    monkeypatch.setattr(fused_module, "_overwrite_with_gradient", spy)
    labels_N = torch.arange(num_rows)
    fused_target_loss(hidden_ND, weight_VD, labels_N, objective(name), chunk_size=chunk_size).backward()
    assert max(largest[dtype]) == chunk_size * num_tokens
    assert dtype == torch.float32 or max(largest[torch.float32]) == block_size * num_tokens


def test_default_chunks_hold_a_bounded_number_of_bytes():
    for device, dtype, work_bytes in [("cpu", torch.float32, 0), ("meta", torch.bfloat16, 1 << 24)]:
        limit = CHUNK_BYTES["cpu" if device == "cpu" else "cuda"]
        for num_tokens in (1, 32_000, 151_936, 512_000, 10**9):
            # One column that is expanded takes no memory.
            weight_VD = torch.empty(1, 1, device=device, dtype=dtype).expand(num_tokens, 1)
            rows = default_chunk_size(weight_VD, work_bytes)
            assert rows == 1 or rows * num_tokens * dtype.itemsize + work_bytes <= limit
    assert default_chunk_size(torch.empty(1, 1).expand(151_936, 1), 2 * eager.BLOCK_BYTES) >= 128


@given(
    lengths=st.lists(st.integers(1, 9), max_size=12),
    size=st.integers(1, 12),
    order=st.randoms(use_true_random=False),
    shuffled=st.booleans(),
)
def test_chunks_end_where_sequences_end(lengths, size, order, shuffled):
    groups = [i for i, length in enumerate(lengths) for _ in range(length)]
    if shuffled:
        order.shuffle(groups)
    chunks = split_rows(len(groups), size, torch.tensor(groups, dtype=torch.long))
    assert [i for rows, _ in chunks for i in range(rows.start, rows.stop)] == list(range(len(groups)))
    for rows, is_split in chunks:
        assert rows.stop - rows.start <= size
        inside = groups[rows]
        assert is_split == any(groups.count(g) != inside.count(g) for g in inside)
    if not shuffled and max(lengths, default=0) <= size:
        assert not any(is_split for _, is_split in chunks)


def test_chunks_of_rows_that_stand_alone_are_full():
    assert split_rows(7, 3, None) == [(slice(0, 3), False), (slice(3, 6), False), (slice(6, 7), False)]
    assert split_rows(0, 3, None) == [(slice(0, 0), False)]


@pytest.mark.parametrize(("chunk_size", "products"), [(7, 5), (16, 3), (6, 11)])
def test_only_chunks_with_a_part_of_a_sequence_are_multiplied_twice(chunk_size, products, monkeypatch):
    """Sequences of 7 rows, the last of 3; of the 6 chunks of at most 6 rows only that of the last is whole."""
    reduce, calls = fused_module._reduce, []
    monkeypatch.setattr(fused_module, "_reduce", lambda *args: calls.append(1) or reduce(*args))
    Batch().fused(objective("iw_sft"), chunk_size=chunk_size)
    assert len(calls) == products


@pytest.mark.parametrize("order", ["as given", "shuffled"])
def test_sequences_need_not_be_in_one_piece(order):
    batch, obj = Batch(), objective("iw_sft")
    if order == "shuffled":
        shuffle_N = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        batch.columns["sequence"] = batch.columns["sequence"][shuffle_N]
    loss, gradients, _ = batch.dense(obj)
    fused_loss, fused_gradients, _ = batch.fused(obj)
    torch.testing.assert_close(fused_loss, loss, atol=1e-12, rtol=1e-12)
    for fused, expected in zip(fused_gradients, gradients, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-14, rtol=1e-10)


def test_logits_that_are_no_numbers_are_refused_by_row():
    batch = Batch()
    batch.hidden_ND[11, 0] = torch.nan
    batch.hidden_ND[23, 0] = torch.inf
    with pytest.raises(BadRowsError, match="logits of rows 11, 23 of 31 hold NaN or infinite values") as e:
        batch.fused(objective("target_sft"))
    assert e.value.rows == [11, 23]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(N, D + 1)}, r"hidden states must be \[N, D\] and the head's weight \[V, D\]"),
        ({"hidden_ND": torch.zeros(N - 1, D)}, "30 hidden states for 31 labels"),
        ({"bias_V": torch.zeros(V - 1)}, r"bias must be \[V\] with V = 67, got \[66\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    batch = Batch(dtype=torch.float32)
    vars(batch).update(change)
    with pytest.raises(InputError, match=message):
        batch.fused(objective("sft"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_softcap": 0.0}, "logit_softcap must be > 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"num_items": 0}, "num_items must be > 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Batch().fused(objective("sft"), **options)
