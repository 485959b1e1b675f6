"""Several teachers as one: both losses against means of full distributions, in float64 numpy, row by row.

Shapes: N positions, k cached ids, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_train import CachedTopK, fused_target_loss, objective, target_loss
from logitcache_train.loss import target_metrics
from logitcache_train.mixture import CachedMixture, check_mixture
from logitcache_train.positions import BadRowsError

PATHS = ["readable", "fused"]
MEANS = ["arithmetic", "geometric"]
ETA = 0.6
ROWS = {
    "kd": lambda p, label, q, guided: q,
    "kd_hybrid": lambda p, label, q, guided: 0.5 * label + 0.5 * q,
    "asft": lambda p, label, q, guided: (p @ label) * label + 0.1 * q + (1 - p @ label - 0.1) * p,
    "target_sft": lambda p, label, q, guided: (p @ label) * label + (1 - p @ label) * guided,
}
"""The induced target of a row as its definition says, from dense vectors of V probabilities."""


def random_cache(rng, labels_N, V, k, *, spread=2.0, kept="all"):
    """The top-k of random distributions; `kept`: all of them, some of them, or all of them and an empty tail."""
    log_q_NV = torch.tensor(rng.normal(size=(len(labels_N), V)) * spread).log_softmax(-1)
    cache = CachedTopK.from_log_probs(log_q_NV, torch.as_tensor(labels_N), min(k, V))
    if kept == "some":
        num_kept = torch.tensor(rng.integers(1, min(k, V) + 1, size=len(labels_N)))
        beyond_Nk = torch.arange(cache.ids.shape[1]) >= num_kept[:, None]
        kept_N = cache.log_probs.exp().masked_fill(beyond_Nk, 0).sum(-1)
        log_probs, log_tail = cache.log_probs.masked_fill(beyond_Nk, -torch.inf), (1 - kept_N).clamp(min=0).log()
        return CachedTopK(cache.ids.masked_fill(beyond_Nk, 0), log_probs, num_kept, log_tail, cache.label_log_prob)
    if kept == "no tail":
        return CachedTopK(**{**vars(cache), "log_tail": torch.full((len(labels_N),), -torch.inf)})
    return cache


def spread_tail(p_V, inner_V, label, cache, i):
    """One teacher's row as a distribution over the vocabulary: its tail like the student outside its own support."""
    V = len(p_V)
    n = int(cache.num_kept[i])
    kept = {int(t): math.exp(lp) for t, lp in zip(cache.ids[i, :n], cache.log_probs[i, :n], strict=True) if t < V}
    tail, label_prob = math.exp(cache.log_tail[i]), math.exp(cache.label_log_prob[i])
    if label not in kept:
        tail = max(tail - label_prob, 0.0)
    kept[label] = label_prob
    q_V = np.zeros(V)
    q_V[list(kept)] = list(kept.values())
    outside = np.setdiff1d(np.arange(V), list(kept))
    if len(outside):
        weights = np.exp(inner_V[outside] - inner_V[outside].max())
        q_V[outside] = tail * weights / weights.sum()
    return q_V / q_V.sum()


def dense_target(name, z_V, label, parts, weights, mean, i):
    """Q by its definition on whole distributions."""
    z_V = z_V.astype(np.float64)
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    q_IV = np.array([spread_tail(p_V, z_V, label, part, i) for part in parts])
    w_I1 = (np.array(weights) / sum(weights))[:, None]
    q_V = (w_I1 * q_IV).sum(0) if mean == "arithmetic" else (q_IV**w_I1).prod(0)
    q_V /= q_V.sum()
    with np.errstate(divide="ignore"):
        guided_V = p_V ** (1 - ETA) * q_V**ETA
    return p_V, ROWS[name](p_V, np.eye(len(p_V))[label], q_V, guided_V / guided_V.sum())


def gradient(path, z_NV, labels_N, name, cache):
    z_NV, obj = z_NV.clone().requires_grad_(), make_objective(name)
    cached = dict.fromkeys(obj.roles, cache)
    if path == "readable":
        target_loss(z_NV, labels_N, obj, cached).sum().backward()
    else:  # with the identity as head the hidden states are the logits
        head_VV = torch.eye(z_NV.shape[1], dtype=z_NV.dtype)
        fused_target_loss(z_NV, head_VV, labels_N, obj, cached, num_items=1, chunk_size=3).backward()
    return z_NV.grad


def make_objective(name):
    return objective(name, **({"eta": ETA} if name == "target_sft" else {}))


def check(name, path, z_NV, labels_N, parts, weights, mean, tolerance):
    g_NV = gradient(path, z_NV, labels_N, name, CachedMixture(parts, weights, mean))
    for i, g_V in enumerate(g_NV.double().numpy()):
        p_V, q_V = dense_target(name, z_NV[i].numpy(), int(labels_N[i]), parts, weights, mean, i)
        assert np.abs(g_V - (p_V - q_V)).max() <= tolerance
    assert g_NV.sum(-1).abs().max() <= 2 * tolerance  # Q sums to one


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_small_k_against_the_mean_of_whole_distributions(name, mean, path, dtype, tolerance):
    rng = np.random.default_rng(1)
    labels_N = rng.integers(37, size=11)
    # The second teacher knows more tokens than the student has, the third keeps a varying number.
    parts = (
        random_cache(rng, labels_N, 37, 5),
        random_cache(rng, labels_N, 41, 7),
        random_cache(rng, labels_N, 37, 4, kept="some"),
    )
    z_NV = torch.tensor(rng.normal(size=(11, 37)) * 2).to(dtype)
    check(name, path, z_NV, torch.tensor(labels_N), parts, (0.5, 0.2, 1.3), mean, tolerance)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    V=st.integers(2, 13),
    ks=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    kept=st.sampled_from(["all", "some", "no tail"]),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    name=st.sampled_from(list(ROWS)),
    mean=st.sampled_from(MEANS),
    path=st.sampled_from(PATHS),
)
def test_any_sizes(seed, V, ks, kept, scale, name, mean, path):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(V, size=3)
    parts = tuple(random_cache(rng, labels_N, V, k, kept=kept) for k in ks)
    weights = tuple(rng.uniform(0.1, 1, size=len(ks)))
    z_NV = torch.tensor(rng.normal(size=(3, V)) * scale)
    check(name, path, z_NV, torch.tensor(labels_N), parts, weights, mean, 1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_extreme_students_stay_exact_in_float32(mean, path, k):
    rng, V, labels_N = np.random.default_rng(2), 20, np.array([0, 19, 0, 7, 0])
    z_NV = np.zeros((5, V))
    z_NV[0, 0] = z_NV[1, 19] = 31.0  # p_y = 1 - 1e-12
    z_NV[2, 0] = z_NV[3, 5] = 1e4
    z_NV[4] = np.linspace(1e4, 1e4 - 60, V)
    parts = (
        random_cache(rng, labels_N, V, k),
        random_cache(rng, labels_N, V, 2 * k),
        random_cache(rng, labels_N, V, V),
    )
    z_NV = torch.tensor(z_NV.astype(np.float32))
    for name in ROWS:
        check(name, path, z_NV, torch.tensor(labels_N), parts, (1.0, 2.0, 0.5), mean, 1e-6)


def batch(k=4, V=17, N=6):
    rng = np.random.default_rng(3)
    labels_N = rng.integers(V, size=N)
    parts = tuple(random_cache(rng, labels_N, V, k) for _ in range(2))
    return torch.tensor(rng.normal(size=(N, V))), torch.tensor(labels_N), parts


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mean", MEANS)
def test_one_teacher_is_no_mixture_and_weight_zero_is_no_teacher(mean, path):
    z_NV, labels_N, (one, other) = batch()
    damaged = other.map(lambda tensor: tensor * torch.nan if tensor.is_floating_point() else tensor)
    for name in ROWS:
        plain_NV = gradient(path, z_NV, labels_N, name, one)
        alone = CachedMixture((one,), (3.0,), mean)
        with_nothing = CachedMixture((damaged, one), (0.0, 3.0), mean)
        twice = CachedMixture((one, one), (1.0, 3.0), mean)
        for mixture in (alone, with_nothing, twice):
            torch.testing.assert_close(gradient(path, z_NV, labels_N, name, mixture), plain_NV, atol=1e-13, rtol=0)


def test_eta_zero_is_dft_whatever_the_teachers():
    z_NV, labels_N, parts = batch()
    mixture = CachedMixture(parts, (1.0, 1.0), "geometric")
    loss_N = target_loss(z_NV, labels_N, objective("target_sft", eta=0.0), {"teacher": mixture})
    z_NV.requires_grad_()
    (g_NV,) = torch.autograd.grad(target_loss(z_NV, labels_N, objective("dft")).sum(), z_NV)
    (of_mixture_NV,) = torch.autograd.grad(
        target_loss(z_NV, labels_N, objective("target_sft", eta=0.0), {"teacher": mixture}).sum(), z_NV
    )
    assert loss_N.isfinite().all()
    torch.testing.assert_close(of_mixture_NV, g_NV, atol=1e-13, rtol=0)


@pytest.mark.parametrize("mean", MEANS)
def test_whole_distributions_give_their_exact_mean(mean):
    z_NV, labels_N, parts = batch(k=17)
    q_INV = torch.stack([part.log_probs.exp().gather(1, part.ids.argsort(-1)) for part in parts])
    q_NV = 0.7 * q_INV[0] + 0.3 * q_INV[1] if mean == "arithmetic" else q_INV[0] ** 0.7 * q_INV[1] ** 0.3
    q_NV = q_NV / q_NV.sum(-1, keepdim=True)
    g_NV = gradient("readable", z_NV, labels_N, "kd", CachedMixture(parts, (0.7, 0.3), mean))
    torch.testing.assert_close(z_NV.softmax(-1) - g_NV, q_NV, atol=1e-13, rtol=0)


def disjoint_teachers():
    """Each keeps one token and nothing else, but for a little for the label."""
    return tuple(
        CachedTopK(
            torch.tensor([[token]]),
            torch.tensor([[0.99]]).log(),
            torch.tensor([1]),
            torch.tensor([0.01]).log(),
            torch.tensor([0.01]).log(),
        )
        for token in (1, 2)
    )


def test_teachers_that_share_only_the_label():
    z_NV, labels_N = torch.zeros(1, 5, dtype=torch.float64), torch.tensor([0])
    for mean, expected in (("arithmetic", [0.01, 0.495, 0.495, 0, 0]), ("geometric", [1.0, 0, 0, 0, 0])):
        g_NV = gradient("readable", z_NV, labels_N, "kd", CachedMixture(disjoint_teachers(), (1.0, 1.0), mean))
        torch.testing.assert_close(0.2 - g_NV[0], torch.tensor(expected).double(), atol=1e-7, rtol=0)


def test_teachers_that_share_nothing_have_no_geometric_mean():
    nothing = torch.tensor([-torch.inf])
    parts = tuple(
        CachedTopK(part.ids, torch.zeros(1, 1), part.num_kept, nothing, nothing) for part in disjoint_teachers()
    )
    with pytest.raises(BadRowsError, match=r"loss of rows 0 of 1 is not finite: .* leave no mass"):
        gradient("readable", torch.zeros(1, 5), torch.tensor([0]), "kd", CachedMixture(parts, (1.0, 1.0), "geometric"))


@pytest.mark.parametrize("mean", MEANS)
def test_the_tail_in_the_metrics_is_the_mass_outside_the_union(mean):
    z_NV, labels_N, parts = batch()
    metrics = target_metrics(z_NV, labels_N, make_objective("kd"), {"teacher": CachedMixture(parts, (1.0, 3.0), mean)})
    for i, tail in enumerate(metrics["teacher_tail"].tolist()):
        _, q_V = dense_target("kd", z_NV[i].numpy(), int(labels_N[i]), parts, (1.0, 3.0), mean, i)
        union = {int(labels_N[i]), *parts[0].ids[i].tolist(), *parts[1].ids[i].tolist()}
        assert tail == pytest.approx(sum(q_V[a] for a in range(17) if a not in union), abs=1e-12)
    assert metrics["teacher_tail"].min() > 0


def test_label_log_probs():
    z_NV, labels_N, parts = batch()
    mixture = CachedMixture(parts, (3.0, 1.0))
    expected_N = 0.75 * parts[0].label_log_prob.exp() + 0.25 * parts[1].label_log_prob.exp()
    torch.testing.assert_close(mixture.label_log_prob.exp(), expected_N)
    cached = {"reference": parts[0], "teacher": mixture}
    w_N = (expected_N / parts[0].label_log_prob.exp()).clamp(0.2, 1.8)
    nll_N = torch.nn.functional.cross_entropy(z_NV, labels_N, reduction="none")
    torch.testing.assert_close(target_loss(z_NV, labels_N, objective("iw_sft"), cached), w_N * nll_N)
    geometric = {"reference": CachedMixture(parts, (3.0, 1.0), "geometric")}
    with pytest.raises(InputError, match="geometric mean of teachers depends on the student"):
        target_loss(z_NV, labels_N, objective("psft"), geometric)


def test_a_mixture_is_handled_like_one_cache():
    _, _, parts = batch()
    mixture = CachedMixture(list(parts), [1, 3], "geometric")
    assert len(mixture) == 6 and mixture.weights == (0.25, 0.75)
    part = mixture[torch.tensor([4, 1])]
    assert len(part) == 2 and part.mean == "geometric" and part.weights == (0.25, 0.75)
    assert torch.equal(part.parts[1].ids, parts[1].ids[[4, 1]])
    assert mixture.to("cpu").parts[0].log_tail.equal(parts[0].log_tail)
    seen = []
    mixture.map(lambda tensor: seen.append(tensor) or tensor)
    assert len(seen) == 10


@pytest.mark.parametrize("name", ROWS)
def test_no_rows(name):
    z_NV, labels_N, parts = batch()
    mixture = CachedMixture(parts, (1.0, 1.0))[:0]
    assert gradient("readable", z_NV[:0], labels_N[:0], name, mixture).shape == (0, 17)


@pytest.mark.parametrize(
    ("weights", "mean", "message"),
    [
        ((1.0, -0.1), "arithmetic", "must be numbers >= 0, at least one of them above, got"),
        ((0.0, 0.0), "arithmetic", "at least one of them above"),
        ((1.0, math.nan), "arithmetic", "must be numbers"),
        ((1.0, math.inf), "arithmetic", "must be numbers"),
        (("1", 2.0), "arithmetic", "must be numbers"),
        ((), "arithmetic", "at least one"),
        ((1.0,), "arithmetic", "a weight for each part, got 1 for 2"),
        ((1.0, 1.0), "harmonic", "unknown mean 'harmonic' of teachers; choose from arithmetic, geometric"),
    ],
)
def test_weights_and_means_that_make_no_mixture(weights, mean, message):
    _, _, parts = batch()
    with pytest.raises(InputError, match=message):
        CachedMixture(parts, weights, mean)
    if len(weights) != 1:
        with pytest.raises(InputError, match=message):
            check_mixture(weights, mean)


def test_parts_of_other_positions_are_refused():
    z_NV, labels_N, (one, other) = batch()
    with pytest.raises(InputError, match=r"parts of a mixture have \[2, 6\] rows"):
        CachedMixture((one, other[:2]), (1.0, 1.0))
    with pytest.raises(InputError, match="'teacher' has 2 rows, expected one for each of 6 labels"):
        gradient("readable", z_NV, labels_N, "kd", CachedMixture((one[:2], other[:2]), (1.0, 1.0)))
