"""The readable loss, and the fused one through it, against dense targets in float64, one row at a time in numpy.

Shapes: N positions, k cached ids, V vocabulary.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_train import OBJECTIVES, CachedTopK, fused_target_loss, objective, target_loss
from logitcache_train.loss import target_metrics
from logitcache_train.positions import BadRowsError

PATHS = ["readable", "fused"]
ETA, BETA = 0.6, 0.8
# (label, cached, guided, uniform, sharpened) by objective; p and r are the label's probability and ratio to the
# reference, e the entropy of the top five, c the critical flag
COEFFICIENTS = {
    "sft": lambda p, r, e, c: (1, 0, 0, 0, 0),
    "dft": lambda p, r, e, c: (p, 0, 0, 0, 0),
    "prob_power": lambda p, r, e, c: (p**2, 0, 0, 0, 0),
    "profit": lambda p, r, e, c: (float(p > 0.05), 0, 0, 0, 0),
    "eaft": lambda p, r, e, c: (e, 0, 0, 0, 0),
    "iw_sft": lambda p, r, e, c: (min(max(r, 0.2), 1.8), 0, 0, 0, 0),
    "critical_tokens": lambda p, r, e, c: (c, 0, 0, 0, 0),
    "label_smoothing": lambda p, r, e, c: (0.9, 0, 0, 0.1, 0),
    "kl_sft": lambda p, r, e, c: (1, 0.1, 0, 0, 0),
    "asft": lambda p, r, e, c: (p, 0.1, 0, 0, 0),
    "psft": lambda p, r, e, c: (r if r <= 1.28 else 0, 0, 0, 0, 0),
    "gem": lambda p, r, e, c: (1, 0, 0, 0, -1),
    "kd": lambda p, r, e, c: (0, 1, 0, 0, 0),
    "kd_hybrid": lambda p, r, e, c: (0.5, 0.5, 0, 0, 0),
    "target_sft": lambda p, r, e, c: (p, 0, 1 - p, 0, 0),
}
PARAMETERS = {
    "prob_power": {"alpha": 2.0},
    "profit": {"threshold": 0.05},
    "eaft": {"entropy_k": 5},
    "gem": {"beta": BETA},
    "target_sft": {"eta": ETA},
}


def dense_gradient(name, z_V, label, row, reference_label, critical):
    """p - Q with the cached tail spread like the student's, in float64."""
    z_V = z_V.astype(np.float64)
    V = len(z_V)
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    top = np.sort(p_V)[::-1][:5]
    num_top, top = len(top), top[top > 0] / top.sum()
    entropy = -(top * np.log(top)).sum() / math.log(num_top)
    c = COEFFICIENTS[name](p_V[label], p_V[label] / reference_label, entropy, critical)
    sharp_V = np.exp((z_V - z_V.max()) / BETA)
    atoms = [
        np.eye(V)[label],
        *dense_cached_and_guided(p_V, z_V, label, row),
        np.full(V, 1 / V),
        sharp_V / sharp_V.sum(),
    ]
    return sum((c_j * (p_V - atom_V) for c_j, atom_V in zip(c, atoms, strict=True) if c_j), np.zeros(V))


def dense_cached_and_guided(p_V, z_V, label, row):
    V = len(p_V)
    kept = {int(i): math.exp(lp) for i, lp in zip(row.ids[: row.num_kept], row.log_probs, strict=False) if i < V}
    tail = math.exp(row.log_tail)
    if label not in kept:
        tail = max(tail - math.exp(row.label_log_prob), 0.0)
    kept[label] = math.exp(row.label_log_prob)
    inside = list(kept)
    outside = np.setdiff1d(np.arange(V), inside)
    inner = np.exp(z_V[outside] - z_V[outside].max(initial=-np.inf))
    inner /= max(inner.sum(), 1)  # right also where p_V underflows
    cached_V, guided_V = np.zeros(V), np.zeros(V)
    total = sum(kept.values()) + (tail if len(outside) else 0.0)
    cached_V[inside] = np.array(list(kept.values())) / total
    guided_V[inside] = p_V[inside] ** (1 - ETA) * cached_V[inside] ** ETA
    if len(outside):
        cached_V[outside] = tail / total * inner
        guided_V[outside] = p_V[outside].sum() ** (1 - ETA) * (tail / total) ** ETA * inner
    return cached_V, guided_V / guided_V.sum()


def random_cache(rng, labels_N, V, k, *, quantise=False, vary_kept=False):
    """A top-k of random distributions; quantised ones round the log-probs to eighths."""
    N = len(labels_N)
    q_NV = np.exp(rng.normal(size=(N, V)) * 2)
    q_NV /= q_NV.sum(-1, keepdims=True)
    ids_Nk = np.argsort(-q_NV, axis=-1)[:, :k]
    num_kept_N = rng.integers(1, k + 1, size=N) if vary_kept else np.full(N, k)
    log_probs_Nk = np.log(np.take_along_axis(q_NV, ids_Nk, -1))
    beyond_Nk = np.arange(k) >= num_kept_N[:, None]
    kept_mass_N = np.exp(np.where(beyond_Nk, -np.inf, log_probs_Nk)).sum(-1)
    with np.errstate(divide="ignore"):
        log_tail_N = np.log(np.maximum(1 - kept_mass_N, 0) * (kept_mass_N < 1 - 1e-12))
    if quantise:
        log_probs_Nk = np.round(log_probs_Nk * 8) / 8
    return CachedTopK(
        ids=torch.tensor(np.where(beyond_Nk, 0, ids_Nk)),
        log_probs=torch.tensor(np.where(beyond_Nk, -np.inf, log_probs_Nk)),
        num_kept=torch.tensor(num_kept_N),
        log_tail=torch.tensor(log_tail_N),
        label_log_prob=torch.tensor(np.log(q_NV[range(N), labels_N])),
    )


def row_of(cache, i):
    return SimpleNamespace(**{name: getattr(cache, name)[i].numpy() for name in cache.__dataclass_fields__})


def gradient_at_logits(path, z_NV, labels_N, obj, cached=None, columns=None, **options):
    z_NV = z_NV.clone().requires_grad_()
    if path == "readable":
        target_loss(z_NV, labels_N, obj, cached, columns, **options).sum().backward()
    else:  # with the identity as head the hidden states are the logits
        head_VV = torch.eye(z_NV.shape[1], dtype=z_NV.dtype)
        options = {"num_items": 1, "chunk_size": 5} | options
        fused_target_loss(z_NV, head_VV, labels_N, obj, cached, columns, **options).backward()
    return z_NV.grad


def check_against_dense(name, path, z_NV, labels_N, cache, tolerance, **options):
    reference_N = torch.linspace(-3, -0.5, len(labels_N), dtype=torch.float64)
    label_only = random_cache(np.random.default_rng(5), labels_N.numpy(), max(z_NV.shape[1], 3), 2)
    reference = CachedTopK(**{**vars(label_only), "label_log_prob": reference_N})
    critical_N = torch.arange(len(labels_N)) % 2
    obj = objective(name, **PARAMETERS.get(name, {}))
    cached = {"teacher": cache, "reference": cache}
    if obj.role is None:
        cached = {"reference": reference}
    g_NV = gradient_at_logits(path, z_NV, labels_N, obj, cached, {"critical": critical_N}, **options)
    for i, g_V in enumerate(g_NV.double().numpy()):
        row, ratio = row_of(cache, i), math.exp(reference_N[i])
        expected_V = dense_gradient(name, z_NV[i].double().numpy(), int(labels_N[i]), row, ratio, int(critical_N[i]))
        assert np.abs(g_V - expected_V).max() <= tolerance
    # Q sums to one: p - Q sums to zero
    assert g_NV.sum(-1).abs().max() <= 2 * tolerance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_small_k_against_the_dense_target(name, path, dtype, tolerance):
    rng = np.random.default_rng(11)
    N, V, k = 23, 41, 6
    labels_N = rng.integers(V, size=N)
    z_NV = torch.tensor(rng.normal(size=(N, V)) * 2).to(dtype)
    cache = random_cache(rng, labels_N, V, k, quantise=True, vary_kept=True)
    check_against_dense(name, path, z_NV, torch.tensor(labels_N), cache, tolerance)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    V=st.integers(2, 19),
    k=st.integers(1, 19),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    quantise=st.booleans(),
    name=st.sampled_from(["target_sft", "kd_hybrid", "asft", "gem", "label_smoothing", "eaft"]),
    path=st.sampled_from(PATHS),
)
def test_any_size_against_the_dense_target(seed, V, k, scale, quantise, name, path):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(V, size=4)
    cache = random_cache(rng, labels_N, V, min(k, V), quantise=quantise, vary_kept=True)
    z_NV = torch.tensor(rng.normal(size=(4, V)) * scale)
    check_against_dense(name, path, z_NV, torch.tensor(labels_N), cache, 1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("k", [1, 3, 30])
def test_extreme_students_stay_exact_in_float32(name, path, k):
    """Logits of 1e4, p_y = 1 - 1e-12 with the label first and last, a student that is sure of something else."""
    V, labels_N = 30, np.array([0, 29, 0, 7, 7, 0])
    z_NV = np.zeros((6, V))
    z_NV[0, 0] = z_NV[1, 29] = 31.0
    z_NV[2, 0] = 1e4
    z_NV[3, 5] = 1e4
    z_NV[4] = -1e4
    z_NV[4, 7] = -1e4 + 8
    z_NV[5] = np.linspace(1e4, 1e4 - 29 * 4, V)
    z_NV = torch.tensor(z_NV.astype(np.float32))
    cache = random_cache(np.random.default_rng(2), labels_N, V, k)
    check_against_dense(name, path, z_NV, torch.tensor(labels_N), cache, 1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["kd", "target_sft", "kl_sft"])
def test_a_tail_the_student_cannot_represent_still_gets_its_mass(name, path):
    """The student's tail is exp(-1e4) = 0 in any float; the teacher's is a half."""
    z_NV = torch.zeros(1, 6)
    z_NV[0, 0] = 1e4
    z_NV[0, 3] = 2.0
    cache = CachedTopK(
        torch.tensor([[0]]),
        torch.tensor([[0.5]]).log(),
        torch.tensor([1]),
        torch.tensor([0.5]).log(),
        torch.tensor([0.5]).log(),
    )
    obj = objective(name, eta=1.0) if name == "target_sft" else objective(name)
    g_NV = gradient_at_logits(path, z_NV, torch.tensor([0]), obj, {"teacher": cache, "reference": cache})
    # 1 - p_y = 0 leaves the residual of target_sft no weight
    weight = {"kd": 0.5, "target_sft": 0.0, "kl_sft": 0.05}[name]
    inner_V = z_NV[0, 1:].softmax(-1)
    torch.testing.assert_close(g_NV[0, 1:], -weight * inner_V, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(g_NV[0, 0], torch.tensor(weight), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [-0.5, 1.3, 2.0])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_extrapolated_eta_against_the_normalised_product(path, eta, k, dtype, tolerance):
    rng = np.random.default_rng(6)
    V, labels_N = 11, rng.integers(11, size=8)
    z_NV = torch.tensor(rng.normal(size=(8, V))).to(dtype)
    cache = random_cache(rng, labels_N, V, k)
    obj = objective("target_sft", eta=eta, extrapolate=True)
    g_NV = gradient_at_logits(path, z_NV, torch.tensor(labels_N), obj, {"teacher": cache})
    for i, label in enumerate(labels_N):
        z_V = z_NV[i].double().numpy()
        p_V = np.exp(z_V) / np.exp(z_V).sum()
        cached_V, _ = dense_cached_and_guided(p_V, z_V, label, row_of(cache, i))
        product_V = p_V ** (1 - eta) * cached_V**eta
        residual_V = product_V / product_V.sum()
        expected_V = p_V - p_V[label] * np.eye(V)[label] - (1 - p_V[label]) * residual_V
        assert np.abs(g_NV[i].double().numpy() - expected_V).max() <= tolerance


@pytest.mark.parametrize("path", PATHS)
def test_extrapolated_eta_names_the_rows_with_infinite_weights(path):
    z_NV, labels_N = torch.zeros(4, 7), torch.tensor([0, 1, 2, 3])
    cache = random_cache(np.random.default_rng(0), labels_N.numpy(), 7, 3)
    cache.log_tail[1], cache.label_log_prob[1] = -torch.inf, cache.log_probs[1, 0]
    cache.ids[1, 0] = 1

    def gradient(eta):
        obj = objective("target_sft", eta=eta, extrapolate=True)
        return gradient_at_logits(path, z_NV, labels_N, obj, {"teacher": cache})

    assert gradient(1.3).isfinite().all()  # an empty tail to the power 1.3 is empty
    with pytest.raises(
        BadRowsError, match=r"rows 1 of 4 is not finite: .* eta outside \[0, 1\] gives a token infinite"
    ) as e:
        gradient(-0.3)
    assert e.value.rows == [1]
    z_NV[2, cache.ids[2]] = -math.inf
    with pytest.raises(BadRowsError, match="rows 2 of 4"):
        gradient(1.3)


@pytest.mark.parametrize("path", PATHS)
def test_two_rows_of_the_table_meet_where_the_mathematics_says_so(path):
    rng = np.random.default_rng(4)
    N, V = 50, 37
    labels_N = rng.integers(V, size=N)
    z_NV, labels_N = torch.tensor(rng.normal(size=(N, V)), dtype=torch.float32), torch.tensor(labels_N)
    cache = random_cache(rng, labels_N.numpy(), V, 5)
    cached = {"teacher": cache, "reference": cache}

    def gradient(name, **parameters):
        return gradient_at_logits(path, z_NV, labels_N, objective(name, **parameters), cached)

    torch.testing.assert_close(gradient("target_sft", eta=0.0), gradient("dft"), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient("kl_sft", weight=0.0), gradient("sft"), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient("kd_hybrid", weight=1.0), gradient("kd"), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient("prob_power", alpha=1.0), gradient("dft"), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient("gem", beta=1.0), gradient("sft"), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient("label_smoothing", smoothing=0.0), gradient("sft"), atol=1e-7, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["sft", "label_smoothing", "gem", "eaft", "kd", "target_sft"])
def test_logits_beyond_the_caches_vocabulary_do_not_exist(name, path):
    rng = np.random.default_rng(8)
    V, padded = 21, 32
    labels_N = torch.tensor(rng.integers(V, size=7))
    z_NV = torch.tensor(rng.normal(size=(7, padded)))
    z_NV[:, V:] += 50
    cached = {"teacher": random_cache(rng, labels_N.numpy(), V, 4)}
    obj = objective(name)
    g_NV = gradient_at_logits(path, z_NV, labels_N, obj, cached, vocab_size=V)
    assert torch.equal(g_NV[:, V:], torch.zeros(7, padded - V, dtype=torch.float64))
    torch.testing.assert_close(g_NV[:, :V], gradient_at_logits(path, z_NV[:, :V], labels_N, obj, cached))


@pytest.mark.parametrize("path", PATHS)
def test_cached_ids_beyond_the_students_vocabulary_carry_no_mass(path):
    rng = np.random.default_rng(9)
    V_student, V_cache = 15, 24
    labels_N = rng.integers(V_student, size=9)
    cache = random_cache(rng, labels_N, V_cache, 8)
    assert (cache.ids >= V_student).any(-1).all()
    z_NV = torch.tensor(rng.normal(size=(9, V_student)))
    check_against_dense("target_sft", path, z_NV, torch.tensor(labels_N), cache, 1e-12, vocab_size=V_cache)


def test_losses_are_cross_entropies_with_the_target():
    rng = np.random.default_rng(3)
    labels_N = torch.tensor(rng.integers(17, size=6))
    z_NV = torch.tensor(rng.normal(size=(6, 17)))
    nll_N = torch.nn.functional.cross_entropy(z_NV, labels_N, reduction="none")
    torch.testing.assert_close(target_loss(z_NV, labels_N, objective("sft")), nll_N)
    smooth_N = torch.nn.functional.cross_entropy(z_NV, labels_N, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(target_loss(z_NV, labels_N, objective("label_smoothing")), smooth_N)
    torch.testing.assert_close(target_loss(z_NV, labels_N, objective("dft")), (-nll_N).exp() * nll_N)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(name, dtype):
    """Reductions are in float32, so the gradient is off by its own rounding alone, u |g| with |g| <= 2."""
    rng = np.random.default_rng(12)
    labels_N = rng.integers(41, size=23)
    z_NV = torch.tensor(rng.normal(size=(23, 41)) * 2).to(dtype)
    cache = random_cache(rng, labels_N, 41, 6)
    check_against_dense(name, "readable", z_NV, torch.tensor(labels_N), cache, torch.finfo(dtype).eps / 2 * 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["kl_sft", "asft", "kd", "kd_hybrid", "target_sft"])
def test_empty_tails(name, path):
    """The teacher gives nothing to what is outside its top-k, neither to some labels."""
    rng = np.random.default_rng(13)
    labels_N = rng.integers(20, size=30)
    z_NV = torch.tensor(rng.normal(size=(30, 20)) * 2).float()
    cache = random_cache(rng, labels_N, 20, 5)
    kept_N = (cache.ids == torch.tensor(labels_N)[:, None]).any(-1)
    assert 3 < kept_N.sum() < 27
    nothing_N = torch.full((30,), -math.inf, dtype=torch.float64)
    label_N = torch.where(kept_N, cache.label_log_prob, nothing_N)
    empty = CachedTopK(cache.ids, cache.log_probs, cache.num_kept, nothing_N, label_N)
    check_against_dense(name, path, z_NV, torch.tensor(labels_N), empty, 1e-6)


def test_half_precision_logits_are_reduced_in_float32():
    rng = np.random.default_rng(3)
    labels_N = torch.tensor(rng.integers(300, size=6))
    z_NV = torch.tensor(rng.normal(size=(6, 300))).bfloat16()
    loss_N = target_loss(z_NV, labels_N, objective("sft"))
    assert loss_N.dtype == torch.float32
    torch.testing.assert_close(loss_N, target_loss(z_NV.float(), labels_N, objective("sft")))


def test_metrics():
    rng = np.random.default_rng(1)
    N, V = 8, 12
    labels_N = torch.tensor(rng.integers(V, size=N))
    z_NV = torch.tensor(rng.normal(size=(N, V)), requires_grad=True)
    cache = random_cache(rng, labels_N.numpy(), V, V - 1)  # at most one token in the tail, so coarse is dense
    obj = objective("target_sft", eta=ETA)
    metrics = target_metrics(z_NV, labels_N, obj, {"teacher": cache})
    assert not any(value.requires_grad for value in metrics.values())
    p_NV = z_NV.detach().softmax(-1)
    g_NV = gradient_at_logits("readable", z_NV.detach(), labels_N, obj, {"teacher": cache})
    q_NV = p_NV - g_NV
    torch.testing.assert_close(metrics["p_label"], p_NV[range(N), labels_N])
    torch.testing.assert_close(metrics["gamma"], p_NV[range(N), labels_N])
    torch.testing.assert_close(metrics["target_entropy"], -(q_NV * q_NV.log()).sum(-1))
    torch.testing.assert_close(metrics["loss"], target_loss(z_NV.detach(), labels_N, obj, {"teacher": cache}))
    outside_N = (cache.ids == labels_N[:, None]).any(-1).logical_not()
    expected_N = torch.where(outside_N, 0, cache.log_tail.exp())
    torch.testing.assert_close(metrics["teacher_tail"], expected_N, atol=1e-9, rtol=0)

    metrics = target_metrics(z_NV, labels_N, objective("kl_sft", weight=0.25), {"reference": cache})
    torch.testing.assert_close(metrics["gamma"], torch.full((N,), 0.8, dtype=torch.float64))
    assert "teacher_tail" not in target_metrics(z_NV, labels_N, objective("sft"))


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match=r"logits must be \[N, V\] with N = 2 labels, got \[3, 4\]"):
        target_loss(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), objective("sft"))
    with pytest.raises(InputError, match=r"labels must be \[N\], got \[2, 1\]"):
        target_loss(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long), objective("sft"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows_give_no_losses(name):
    labels_N = torch.zeros(0, dtype=torch.long)
    cache = random_cache(np.random.default_rng(0), np.zeros(1, int), 7, 3)[:0]
    columns = {"critical": labels_N, "sequence": labels_N}
    loss_N = target_loss(torch.zeros(0, 7), labels_N, objective(name), {"teacher": cache, "reference": cache}, columns)
    assert loss_N.shape == (0,)
