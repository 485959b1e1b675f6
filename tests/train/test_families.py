"""Loss and gradients of students of many architectures against `target_loss` on the model's own logits.

The oracle takes each sample alone, through the model's own forward pass and all of its head, and leaves the gradients
to autograd; so a test fails where a scale, a cap, a bias, padding or a neighbour in the batch is not taken as the model
takes it. The objective has every atom.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from logitcache_storage.errors import InputError
from logitcache_storage.testing import make_topk
from logitcache_train.atoms import CachedTopK
from logitcache_train.collate import TrainingSample, collate
from logitcache_train.loss import target_loss
from logitcache_train.objectives import Objective, Parameter
from logitcache_train.student import HeadSettings, choose_layout, make_student

V, K, NUM_ITEMS = 61, 7, 23
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A window of 4 and caps of 3 and 5 are narrow enough to matter at 14 tokens and logits of this size.
GEMMA_2 = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 4}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": GEMMA_2,
    "gemma3_text": {"sliding_window": 4},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4},
    "olmo2": {},
    "starcoder2": {},
    "smollm3": {},
    "mixtral": {"num_local_experts": 2},
}
EVERYTHING = Objective(
    "everything",
    "one of each atom",
    "this test",
    label=lambda at, par: 0.5 * at.p_label,
    cached=0.3,
    guided=lambda at, par: 0.4 * at.p_rest,
    uniform=0.1,
    sharpened=-0.2,
    role="teacher",
    parameters={
        "eta": Parameter(0.6, 0, 1, "the teacher's say"),
        "beta": Parameter(0.7, 1e-3, 9, "the temperature"),
    },
)


def make_model(family, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family], **changes})
    # The faster implementation of experts knows no float64.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)
    return model.to(dtype)


def make_batch(seed=0):
    """Samples of 3 to 14 tokens with cached rows; every other label is outside its top-k."""
    rng = np.random.default_rng(seed)
    samples, topks = [], []
    for i, length in enumerate((14, 3, 9)):
        ids = rng.integers(V, size=length).astype(np.int32)
        positions = np.sort(rng.choice(np.arange(1, length), size=length // 2 + 1, replace=False)).astype(np.int32)
        samples.append(TrainingSample(f"key{i}", ids, positions))
        topks.append(make_topk(len(positions), K, V, seed=10 * seed + i, labels=ids[positions]))
    fields = ("ids", "log_probs", "num_kept", "log_tail", "label_log_prob")
    cached = CachedTopK(*(torch.from_numpy(np.concatenate([getattr(t, f) for t in topks])) for f in fields))
    return samples, cached


def own_loss(model, samples, cached, vocab_size=None):
    """From the logits that the model gives for each sample alone."""
    logits = [model(input_ids=torch.from_numpy(s.input_ids).long()[None]).logits[0] for s in samples]
    rows = torch.cat([z[s.target_positions - 1] for z, s in zip(logits, samples, strict=True)])
    labels = torch.from_numpy(np.concatenate([s.input_ids[s.target_positions] for s in samples])).long()
    obj = EVERYTHING
    return target_loss(rows, labels, obj, {"teacher": cached}, vocab_size=vocab_size).sum() / NUM_ITEMS


def student_loss(model, samples, cached, layout):
    inputs = collate(samples, num_items=NUM_ITEMS, layout=layout)
    inputs["targets"] = replace(inputs["targets"], cached={"teacher": cached})
    return model(**inputs)["loss"]


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, layout, *, rel, vocab_size=V):
    """The student's loss and gradients against the model's own; distances relative to each gradient's norm."""
    samples, cached = make_batch()
    expected = own_loss(model, samples, cached, vocab_size)
    wanted = gradients(expected, model)
    make_student(model, EVERYTHING, vocab_size=vocab_size)
    loss = student_loss(model, samples, cached, layout)
    found = gradients(loss, model)
    assert loss.item() == pytest.approx(expected.item(), rel=rel)
    assert found.keys() == wanted.keys()
    largest = max(g.float().norm() for g in wanted.values())
    for name, gradient in wanted.items():
        # What is no more than rounding against the rest (a key's bias has no gradient) is compared with the largest.
        scale = max(gradient.float().norm(), 1e-3 * largest)
        assert (found[name] - gradient).float().norm() <= rel * scale, name
    return found


# Float64, but norms and rotary angles that these architectures compute in float32, 6e-8 each, in two layers.
ROUNDING = 1e-5


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family, layout):
    model = make_model(family)
    assert choose_layout(model, "on" if layout == "packed" else "off") == layout
    compare(model, layout, rel=ROUNDING)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_tied_and_untied_heads_get_their_whole_gradient(family, tied):
    model = make_model(family, tie_word_embeddings=tied)
    found = compare(model, "padded", rel=ROUNDING)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    # Every token's row gets a pull through the head, of the input only those that occur.
    embedding = next(g for name, g in found.items() if "embed" in name)
    assert bool((embedding.abs().sum(-1) > 0).all()) is tied


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "cohere"])
def test_rows_of_a_padded_head_carry_no_mass(family):
    model = make_model(family, vocab_size=V + 11)
    found = compare(model, "padded", rel=ROUNDING, vocab_size=V)
    head = next(g for name, g in found.items() if name.startswith(("lm_head", "model.embed", "embed_out")))
    assert (head[V:] == 0).all() and (head[:V] != 0).any()


def test_a_head_with_bias_trains_its_bias():
    found = compare(make_model("phi"), "padded", rel=ROUNDING)
    assert (found["lm_head.bias"] != 0).all()


# A number is rounded to 2^-11 or 2^-8, some ten times on its way through two layers and back; the oracle's logits once
# more. Norms of differences stay within about ten of these.
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "cohere", "gpt_neox"])
def test_narrow_dtypes_stay_within_their_rounding(family, dtype, rel):
    model = make_model(family, dtype)
    assert choose_layout(model, "off") == "padded"
    found = compare(model, "padded", rel=rel)
    assert all(g.dtype == dtype and g.isfinite().all() for g in found.values())


def test_what_the_configs_say_of_heads_is_found():
    """Guards the tests above: a family whose config lost its cap or scale would pass them idly."""
    expected = {"gemma2": (1.0, 3.0), "granite": (0.25, None), "cohere": (0.25, None), "cohere2": (0.25, None)}
    for family in FAMILIES:
        found = HeadSettings.of(make_model(family).config.get_text_config())
        assert (found.scale, found.softcap) == expected.get(family, (1.0, None)), family


def test_an_encoder_decoder_is_refused_by_name():
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2))
    with pytest.raises(InputError, match=r"T5ForConditionalGeneration.* has an encoder besides its decoder"):
        make_student(model, EVERYTHING, vocab_size=V)


def test_a_head_of_more_than_one_layer_is_refused_by_name():
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    model = BertLMHeadModel(BertConfig(**sizes, is_decoder=True))
    with pytest.raises(InputError, match=r"BertLMHeadModel.* its head is more than a linear layer"):
        choose_layout(model, "off")


def test_a_model_without_a_language_head_is_refused_by_name():
    with pytest.raises(InputError, match=r"LlamaForSequenceClassification.* output layer of .*NoneType"):
        make_student(LlamaForSequenceClassification(LlamaConfig(**SIZES)), EVERYTHING, vocab_size=V)


def test_routers_with_a_loss_of_their_own_are_refused_by_name():
    model = make_model("mixtral", output_router_logits=True)
    with pytest.raises(InputError, match=r"MixtralForCausalLM.*output_router_logits"):
        make_student(model, EVERYTHING, vocab_size=V)


@pytest.mark.parametrize("family", ["opt", "xglm"])
def test_packing_is_refused_by_name_where_a_family_cannot_keep_samples_apart(family):
    config = CONFIG_MAPPING[family](**{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_layers": 2})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert choose_layout(model, "off") == "padded"
    with pytest.raises(InputError, match=rf"--packing on: .*{type(model).__name__}"):
        choose_layout(model, "on")
