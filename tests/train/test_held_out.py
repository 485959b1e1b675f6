"""Metrics of a held-out cache against float64 sums over the whole vocabulary, for functions and for whole runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_samples, make_topk, write_cache
from logitcache_storage.topk import TopKLogProbs
from logitcache_train.atoms import CachedTopK
from logitcache_train.data import CachedSamples
from logitcache_train.fused import fused_loss_and_metrics
from logitcache_train.held_out import HeldOutSampler, held_out_metrics
from logitcache_train.mixture import CachedMixture
from logitcache_train.objectives import objective

N, V, D, K = 23, 37, 9, 5


def by_hand(log_p_V, label, topk, row, vocab_size):
    """nll, KL and agreement of one position: a dictionary of outcomes, one of them the tail."""
    q = {int(t): math.exp(x) for t, x in zip(topk.ids[row], topk.log_probs[row], strict=True) if t < vocab_size}
    in_tail = 0.0 if label in q else math.exp(topk.label_log_prob[row])
    q[label] = math.exp(topk.label_log_prob[row])
    tail = max(math.exp(topk.log_tail[row]) - in_tail, 0.0) if len(q) < vocab_size else 0.0
    total = sum(q.values()) + tail
    p = {t: math.exp(log_p_V[t]) for t in q}
    terms = [(q[t] / total, p[t]) for t in q] + [(tail / total, 1 - sum(p.values()))]
    kl = sum(a * math.log(a / b) for a, b in terms if a > 0)
    return -log_p_V[label], kl, float(max(q, key=q.get) == int(np.argmax(log_p_V)))


def make_case(*, k=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, weight_VD = (torch.randn(n, D, generator=generator) for n in (N, V))
    labels_N = torch.randint(V, (N,), generator=generator)
    return hidden_ND, weight_VD, labels_N, make_topk(N, k, V, seed=seed, labels=labels_N.numpy().astype(np.int32))


def observed(hidden_ND, weight_VD, labels_N, teacher, **head):
    """What a pass of the fused loss says of each position, for an objective that does not read the teacher."""
    teacher = CachedTopK.from_numpy(teacher) if isinstance(teacher, TopKLogProbs) else teacher

    def observe(head, products_nV, rows):
        before = products_nV.clone()
        found = held_out_metrics(head, products_nV, labels_N[rows], None if teacher is None else teacher[rows])
        assert torch.equal(products_nV, before)
        return found

    return fused_loss_and_metrics(hidden_ND, weight_VD, labels_N, objective("sft"), observe=observe, **head)[1]


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize(
    ("k", "vocab_size", "softcap"), [(K, None, None), (1, None, 3.0), (V, None, None), (K, 31, None)]
)
def test_metrics_of_each_position_are_those_of_the_whole_vocabulary(k, vocab_size, softcap, chunk_size):
    hidden_ND, weight_VD, labels_N, topk = make_case(k=k)
    size = vocab_size or V
    labels_N %= size
    if vocab_size:
        topk = make_topk(N, k, V, seed=5, labels=labels_N.numpy().astype(np.int32))
    bias_V = torch.linspace(-1, 1, V)
    z_NV = 0.5 * (hidden_ND.double() @ weight_VD.double().T + bias_V.double())
    z_NV = (z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap))[:, :size]
    expected = [
        by_hand(log_p_V, int(label), topk, row, size)
        for row, (log_p_V, label) in enumerate(zip(z_NV.log_softmax(-1).numpy(), labels_N, strict=True))
    ]
    head = {"bias": bias_V, "logit_scale": 0.5, "logit_softcap": softcap, "vocab_size": vocab_size}
    found = observed(hidden_ND, weight_VD, labels_N, topk, chunk_size=chunk_size, **head)
    for name, values in zip(("nll", "kl", "top_1_agreement"), zip(*expected, strict=True), strict=True):
        # Float32 logits of about 5 are off by 1e-6, and so are their differences.
        assert found[name].tolist() == pytest.approx(values, abs=5e-6), name
    assert 0 < found["top_1_agreement"].sum() < N or k == 1


def test_without_a_teacher_there_is_the_nll_alone():
    hidden_ND, weight_VD, labels_N, _ = make_case()
    found = observed(hidden_ND, weight_VD, labels_N, None)
    log_p_NV = (hidden_ND.double() @ weight_VD.double().T).log_softmax(-1)
    assert not found.keys() & {"kl", "top_1_agreement"}
    assert found["nll"].tolist() == pytest.approx((-log_p_NV[range(N), labels_N]).tolist(), abs=5e-6)


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher():
    hidden_ND, weight_VD, labels_N, topk = make_case()
    teacher = CachedTopK.from_numpy(topk)
    alone = observed(hidden_ND, weight_VD, labels_N, teacher)
    twice = observed(hidden_ND, weight_VD, labels_N, CachedMixture((teacher, teacher), (0.3, 0.7)))
    for name, values_N in alone.items():
        torch.testing.assert_close(twice[name], values_N, rtol=1e-4, atol=1e-5, msg=name)


def test_no_positions_have_no_metrics():
    hidden_ND, weight_VD, labels_N, topk = make_case()
    found = observed(hidden_ND[:0], weight_VD, labels_N[:0], CachedTopK.from_numpy(topk)[:0])
    assert found.keys() >= {"nll", "kl", "top_1_agreement"} and not any(len(values) for values in found.values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_samples_in_equally_many_passes(held_out, world_size):
    samples = CachedSamples({"teacher": [Cache.open(held_out)]}, objective("kd"), window_shards=1)
    ranks = [HeldOutSampler(samples, batch_size=4, rank=r, world_size=world_size) for r in range(world_size)]
    passes = [list(sampler) for sampler in ranks]
    assert {len(each) for each in passes} == {len(ranks[0])}
    assert np.concatenate([part.batch for part in passes[0]]).tolist() == list(range(25))
    assert all((part.index, part.num_parts) == (r, world_size) for r, each in enumerate(passes) for part in each)


EVALUATE = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": "true", "max_steps": 6}


def evaluations(log):
    names = ("loss", "nll", "kl", "top_1_agreement")
    found = [{n: entry[f"eval_{n}"] for n in names if f"eval_{n}" in entry} for entry in log]
    return [entry for entry in found if entry]


def test_a_run_evaluates_the_student_that_it_has(run, made, held_out, tmp_path):
    """The student has dropout, which must be off, and on again afterwards: losses are those of a run without."""
    options = {"objective": "kd", "eval_cache": held_out, **EVALUATE}
    log = run(made, tmp_path / "out", **options, save_strategy="steps", save_steps=3, per_device_eval_batch_size=7)
    found = evaluations(log)
    assert len(found) == 3
    for entry, student in zip(found, (made.student, tmp_path / "out" / "checkpoint-3", tmp_path / "out"), strict=True):
        expected = over_the_whole_vocabulary(student, held_out, made.vocab_size)
        assert entry == pytest.approx(expected, abs=1e-5)
    assert found[2]["kl"] < found[0]["kl"]

    without = run(made, tmp_path / "without", objective="kd", max_steps=6)
    assert [e["loss"] for e in without if "loss" in e] == [e["loss"] for e in log if "loss" in e]
    other_batches = evaluations(run(made, tmp_path / "other", **options, per_device_eval_batch_size=1))
    assert other_batches[0] == pytest.approx(found[0], abs=1e-6)


def over_the_whole_vocabulary(student, url, vocab_size):
    model, rows = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).eval(), []
    for sample in Cache.open(url):
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor(sample.input_ids[None], dtype=torch.long)).logits[0]
        log_p_MV = logits_LV[sample.target_positions - 1].log_softmax(-1).numpy()
        for row, label in enumerate(sample.labels):
            nll, kl, agrees = by_hand(log_p_MV[row], int(label), sample.topk, row, vocab_size)
            rows.append((nll, kl + entropy(sample.topk, row, int(label)), kl, agrees))
    # The loss of kd is the cross-entropy: its divergence and the entropy of the teacher.
    names = ("nll", "loss", "kl", "top_1_agreement")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def entropy(topk, row, label):
    q = {int(t): math.exp(x) for t, x in zip(topk.ids[row], topk.log_probs[row], strict=True)}
    q[label] = math.exp(topk.label_log_prob[row])
    masses = np.array([*q.values(), max(1 - sum(q.values()), 0)])
    masses = masses[masses > 0] / masses.sum()
    return float(-(masses * np.log(masses)).sum())


def test_an_objective_without_a_teacher_is_measured_against_one(run, made, held_out, tmp_path):
    options = {"objective": "dft", "eval_cache": f"teacher={held_out}", "max_steps": 1, "num_train_epochs": 1}
    [found] = evaluations(run(made, tmp_path / "out", **options, save_strategy="epoch"))
    expected = over_the_whole_vocabulary(tmp_path / "out", held_out, made.vocab_size)
    assert {n: found[n] for n in ("nll", "kl")} == pytest.approx({n: expected[n] for n in ("nll", "kl")}, abs=1e-5)
    record = json.loads((tmp_path / "out" / "checkpoint-1" / "logitcache.json").read_text())
    assert record["eval_caches"]["teacher"][0]["identity"]["k"] == 5


def test_the_best_checkpoint_is_loaded_at_the_end(run, made, held_out, tmp_path):
    """A learning rate that ruins the student: the first checkpoint is the best."""
    options = {"eval_cache": held_out, "learning_rate": 1, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": "true"}
    found = evaluations(run(made, tmp_path / "out", **options, metric_for_best_model="kl"))
    best = min((0, 1), key=lambda i: found[i]["kl"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == found[best]["kl"] and state["best_global_step"] == 2 * (best + 1)
    expected = over_the_whole_vocabulary(tmp_path / "out", held_out, made.vocab_size)
    assert found[best]["kl"] == pytest.approx(expected["kl"], abs=1e-4)


def test_held_out_caches_must_have_what_the_objective_reads(run, made, held_out, other_teacher, tmp_path):
    both = [f"teacher={made.cache}", f"reference={made.cache}"]
    with pytest.raises(
        InputError, match=r"'asft' needs a reference cache, given: teacher; add --eval_cache reference="
    ):
        run(made, tmp_path / "out", objective="asft", cache=both, eval_cache=f"teacher={held_out}")
    with pytest.raises(
        InputError, match=r"'iw_sft' needs a teacher cache, given: reference; add --eval_cache teacher="
    ):
        run(made, tmp_path / "out", objective="iw_sft", cache=both, eval_cache=f"reference={held_out}")


def test_held_out_caches_of_another_tokenizer_are_refused(run, made, tmp_path):
    samples, topks = make_samples(5, 5, made.vocab_size)
    identity = replace(made.identity, tokenizer=tokenizer_identity({"x": 0}, {}, None))
    write_cache(str(tmp_path / "other"), samples, topks, identity=identity)
    with pytest.raises(MismatchError, match="are caches of tokenizers with different vocabulary"):
        run(made, tmp_path / "out", eval_cache=tmp_path / "other")
