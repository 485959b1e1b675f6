"""The student's loss and gradients against its own logits, one sample at a time, in float64; and who is refused."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from logitcache_storage.errors import InputError
from logitcache_storage.testing import make_topk
from logitcache_train.collate import TrainingSample, collate
from logitcache_train.objectives import objective
from logitcache_train.student import HeadSettings, check_head, choose_layout, make_student

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
FAMILIES = {
    "llama": SIZES,
    "gemma2": {**SIZES, "final_logit_softcapping": 3.0},
    "cohere": {**SIZES, "logit_scale": 0.25},
    "granite": {**SIZES, "logits_scaling": 4.0},
    "gpt2": GPT2,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def make_model(family="llama", *, seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def make_training_samples(num_samples=5, *, k=V, seed=0):
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(num_samples):
        ids = rng.integers(V, size=rng.integers(2, 14)).astype(np.int32)
        num_targets = rng.integers(1, len(ids))
        positions = np.sort(rng.choice(np.arange(1, len(ids)), size=num_targets, replace=False)).astype(np.int32)
        topk = make_topk(num_targets, k, V, seed=seed * 100 + i, labels=ids[positions])
        samples.append(TrainingSample(f"key{i}", ids, positions, {"teacher": (topk,)}))
    return samples


def one_by_one(model, samples, name, num_items):
    """Full-vocabulary loss of each sample alone, from the model's own logits, in float64."""
    total = 0.0
    for sample in samples:
        logits_LV = model(input_ids=torch.from_numpy(sample.input_ids).long()[None]).logits[0].double()
        for row, position in enumerate(sample.target_positions):
            log_p_V = logits_LV[position - 1].log_softmax(-1)
            if name == "kd":
                topk = sample.topks["teacher"][0]
                q_V = torch.zeros(V, dtype=torch.float64)
                q_V[topk.ids[row].astype(np.int64)] = torch.from_numpy(topk.log_probs[row]).double().exp()
                total = total - (q_V * log_p_V).sum()
            else:
                weight = log_p_V[sample.input_ids[position]].detach().exp() if name == "dft" else 1.0
                total = total - weight * log_p_V[sample.input_ids[position]]
    return total / num_items


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Float32 backbones in other shapes of batches: a few hundred roundings of 6e-8, relative to the largest entry.
        bound = 1e-4 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=bound, msg=name)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["sft", "dft", "kd"])
def test_batched_loss_and_gradients_equal_the_samples_one_by_one(name, layout):
    samples, num_items = make_training_samples(), 37
    model = make_model(tie_word_embeddings=True)
    expected = one_by_one(model, samples, name, num_items)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    make_student(model, objective(name), vocab_size=V)
    out = model(**collate(samples, num_items=num_items, layout=layout))
    out["loss"].backward()
    # kd over the whole vocabulary: make_topk's float32 log-probs are normalised to about 1e-7.
    assert out["loss"].item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_with_other_names_give_their_own_loss(family):
    """Those with the names of Llama are in `test_families.py`."""
    model = make_model(family)
    assert choose_layout(model, "off") == "padded"
    samples = make_training_samples(3, seed=1)
    expected = one_by_one(model, samples, "sft", 11)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    make_student(model, objective("sft"), vocab_size=V)
    out = model(**collate(samples, num_items=11, layout="padded"))
    out["loss"].backward()
    assert out["loss"].item() == pytest.approx(expected.item(), rel=5e-6)
    assert_same_gradients(gradients(model), wanted)


def test_metrics_are_sums_over_targets():
    samples = make_training_samples()
    model = make_model()
    p_label = sum(
        model(input_ids=torch.from_numpy(s.input_ids).long()[None])
        .logits[0, s.target_positions - 1]
        .softmax(-1)[range(len(s.target_positions)), s.input_ids[s.target_positions]]
        .sum()
        .item()
        for s in samples
    )
    make_student(model, objective("dft"), vocab_size=V)
    metrics = model(**collate(samples, num_items=1, layout="padded"))["metrics"]
    assert metrics["p_label"].item() == pytest.approx(p_label, rel=1e-5)
    # For dft c_label = p_y, and nothing else: gamma is p_y.
    assert metrics["gamma"].item() == pytest.approx(p_label, rel=1e-5)


def test_a_padded_head_gives_no_mass_and_no_gradient_to_ids_beyond_the_vocabulary():
    samples, used = make_training_samples(), V
    model = make_model(vocab_size=V + 7)
    logits = [model(input_ids=torch.from_numpy(s.input_ids).long()[None]).logits[0, :, :used] for s in samples]
    expected = -sum(
        row.double().log_softmax(-1)[label]
        for s, z in zip(samples, logits, strict=True)
        for row, label in zip(z[s.target_positions - 1], s.input_ids[s.target_positions], strict=True)
    )
    make_student(model, objective("sft"), vocab_size=used)
    out = model(**collate(samples, num_items=1, layout="padded"))
    out["loss"].backward()
    assert out["loss"].item() == pytest.approx(expected.item(), rel=2e-6)
    assert (model.lm_head.weight.grad[used:] == 0).all()


def test_an_empty_micro_batch_has_no_loss_and_zero_gradients_everywhere():
    model = make_model()
    make_student(model, objective("kd"), vocab_size=V)
    out = model(**collate([make_training_samples(1)[0].without_targets()], num_items=9, layout="padded"))
    out["loss"].backward()
    assert out["loss"].item() == 0
    found = gradients(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all((gradient == 0).all() for gradient in found.values())


def test_without_targets_the_model_is_what_it_was(tmp_path):
    model, ids = make_model(), torch.arange(5)[None]
    before = model(input_ids=ids, labels=ids)
    signature = inspect.signature(model.forward)
    make_student(model, objective("sft"), vocab_size=V)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert inspect.signature(model.forward) == signature
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is LlamaForCausalLM
    assert torch.equal(again(input_ids=ids).logits, before.logits)


def test_a_copy_of_a_student_is_a_student_of_its_own():
    model = make_model()
    make_student(model, objective("sft"), vocab_size=V)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    batch = collate(make_training_samples(1), num_items=1, layout="padded")
    num_targets = len(batch["targets"].labels_N)
    assert other(**batch)["loss"].item() == pytest.approx(num_targets * np.log(V), rel=1e-5)
    assert model(**batch)["loss"].item() != pytest.approx(num_targets * np.log(V), rel=1e-3)


def test_activation_checkpointing_gives_the_same_gradients():
    batch = collate(make_training_samples(), num_items=3, layout="padded")
    found = []
    for checkpointing in (False, True):
        model = make_model()
        make_student(model, objective("sft"), vocab_size=V)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model(**batch)["loss"].backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_on_is_allowed_where_samples_are_kept_apart(attention):
    model = make_model()
    model.set_attn_implementation(attention)
    assert choose_layout(model, "on") == "packed"
    assert choose_layout(model, "auto") == "padded"


def test_packing_on_is_refused_where_a_sample_sees_its_neighbour():
    model = make_model("opt")
    with pytest.raises(InputError, match=r"--packing on: .*OPTForCausalLM.* does not keep samples apart"):
        choose_layout(model, "on")


def test_packing_on_is_refused_where_positions_are_unknown():
    config = CONFIGS["bloom"](vocab_size=V, hidden_size=32, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert choose_layout(model, "off") == "padded"
    with pytest.raises(InputError, match="--packing on"):
        choose_layout(model, "on")


def test_the_checks_leave_the_model_in_its_mode():
    model = make_model().train()
    choose_layout(model, "off")
    assert model.training


def test_a_model_that_sees_what_comes_later_is_refused():
    sizes = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    model = AutoModelForCausalLM.from_config(CONFIGS["bert"](**sizes))
    with pytest.raises(InputError, match=r"BertLMHeadModel.* cannot be a student: it is not causal"):
        choose_layout(model, "off")


class ScaledLlama(LlamaForCausalLM):
    """Its config does not say what its head does."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 1.5 * out.logits
        return out


def test_a_head_that_is_more_than_its_config_says_is_refused():
    model = ScaledLlama(CONFIGS["llama"](**SIZES)).eval()
    with pytest.raises(InputError, match=r"ScaledLlama.* its head is more than a linear layer"):
        choose_layout(model, "off")


class Adapted(nn.Linear):
    """As adapters and quantised layers are: a linear layer by type, something else by arithmetic."""


def test_a_head_that_is_no_plain_linear_layer_is_refused():
    model = make_model()
    model.lm_head = Adapted(32, V, bias=False)
    with pytest.raises(InputError, match=r"has an output layer of \S+\.Adapted, expected a plain linear layer"):
        check_head(model)


def test_a_router_loss_is_refused():
    config = CONFIGS["mixtral"](**SIZES, num_local_experts=2, output_router_logits=True)
    with pytest.raises(InputError, match="load-balancing loss of its routers"):
        check_head(AutoModelForCausalLM.from_config(config))


def test_head_settings_come_from_the_config():
    assert HeadSettings.of(make_model("gemma2").config) == HeadSettings(1.0, 3.0)
    assert HeadSettings.of(make_model("cohere").config) == HeadSettings(0.25, None)
    assert HeadSettings.of(make_model("granite").config) == HeadSettings(0.25, None)
    assert HeadSettings.of(make_model("llama").config) == HeadSettings(1.0, None)
