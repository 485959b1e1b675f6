"""Adapters: the base's own loss before they are trained, exact gradients after, runs that end in usable adapters."""

import json

import numpy as np
import peft
import pytest
import torch
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_train.collate import TrainingSample, collate
from logitcache_train.lora import LoraSettings, add_adapters
from logitcache_train.objectives import objective
from logitcache_train.student import check_head, make_student

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SAMPLES = [
    TrainingSample("a", np.arange(3, 12, dtype=np.int32), np.arange(2, 9, dtype=np.int32)),
    TrainingSample("b", np.arange(40, 45, dtype=np.int32), np.array([1, 3], dtype=np.int32)),
]


def make_model(family, **changes):
    torch.manual_seed(0)
    config = CONFIGS[family](**SIZES, num_key_value_heads=2, initializer_range=0.2, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def loss_of_logits(model):
    """-log p_y over the targets, from the model's own logits, in float64."""
    total = 0.0
    for sample in SAMPLES:
        ids_1L = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        log_p_LV = model(input_ids=ids_1L).logits[0].double().log_softmax(-1)
        total = total - sum(log_p_LV[t - 1, sample.input_ids[t]] for t in sample.target_positions)
    return total


def student_of(model):
    make_student(model, objective("sft"), vocab_size=V)
    return add_adapters(model, LoraSettings(4), student="base")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_new_adapters_change_nothing_and_trained_ones_have_exact_gradients(family, tied):
    base = make_model(family, tie_word_embeddings=tied)
    expected = loss_of_logits(base).item()
    student, batch = student_of(base), collate(SAMPLES, num_items=1, layout="padded")
    assert student(**batch)["loss"].item() == pytest.approx(expected, rel=2e-6)

    adapters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
    own = loss_of_logits(student)
    assert own.item() != pytest.approx(expected, rel=1e-3)
    wanted = torch.autograd.grad(own, list(adapters.values()))
    out = student(**batch)
    assert out["loss"].item() == pytest.approx(own.item(), rel=2e-6)
    found = torch.autograd.grad(out["loss"], list(adapters.values()))
    for name, a, b in zip(adapters, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=name)


def test_a_frozen_head_costs_no_gradient():
    student = student_of(make_model("llama"))
    loss = student(**collate(SAMPLES, num_items=1, layout="padded"))["loss"]
    shape = student.get_output_embeddings().weight.shape
    assert all(tensor is None or tensor.shape != shape for tensor in loss.grad_fn.saved_tensors)


def test_an_adapted_head_is_refused_by_name():
    with pytest.raises(InputError, match="--lora_targets names lm_head, the output layer"):
        add_adapters(make_model("llama"), LoraSettings(4, targets=("q_proj", "lm_head")), student="base")
    model = make_model("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(InputError, match=r"has an output layer of peft\.\S+, expected a plain linear layer"):
        check_head(model)


def test_targets_that_name_no_layer_are_refused_with_those_there_are():
    with pytest.raises(
        InputError, match=r"the student has no layer 'q'; its linear layers: down_proj, gate_proj, k_proj, o_proj, q"
    ):
        add_adapters(make_model("llama"), LoraSettings(4, targets=("q_proj", "q")), student="base")


LORA = {"lora_rank": 4, "lora_targets": "q_proj,down_proj", "lora_dropout": 0.1, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def trained(run, made, held_out, tmp_path_factory):
    """A run with adapters, and its log."""
    output = tmp_path_factory.mktemp("lora") / "out"
    evaluate = {"eval_cache": held_out, "eval_strategy": "steps", "eval_steps": 5, "eval_on_start": "true"}
    return output, run(made, output, **LORA, save_steps=3, max_steps=5, **evaluate)


def test_a_resumed_run_ends_in_the_same_bits(run, made, held_out, trained, tmp_path, recwarn):
    output, log = trained
    resume = {"resume_from_checkpoint": output / "checkpoint-3"}
    again = run(made, tmp_path / "again", **LORA, save_steps=3, max_steps=5, eval_cache=held_out, **resume)
    assert [e["loss"] for e in again if "loss" in e] == [e["loss"] for e in log if "loss" in e]
    assert not [w for w in recwarn if "gradient_checkpointing" in str(w.message)], "peft's affair, not a user's"
    folders = (output, tmp_path / "again")
    first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert first == second
    record = json.loads((output / "checkpoint-3" / "logitcache.json").read_text())
    assert record["lora"] == {"rank": 4, "alpha": None, "dropout": 0.1, "targets": ["q_proj", "down_proj"]}


def test_the_saved_adapters_load_as_a_model_that_is_as_good(made, held_out, trained):
    output, log = trained
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made.student) and config["lora_alpha"] == 8
    assert not (output / "model.safetensors").exists()
    evaluations = [entry["eval_nll"] for entry in log if "eval_nll" in entry]
    assert evaluations[0] == pytest.approx(mean_nll(made.student, held_out), abs=1e-5)
    assert evaluations[-1] == pytest.approx(mean_nll(output, held_out), abs=1e-5)
    assert abs(evaluations[-1] - evaluations[0]) > 1e-3


def mean_nll(folder, url):
    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for sample in Cache.open(url):
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor(sample.input_ids[None], dtype=torch.long)).logits[0].double()
        log_p_MV = logits_LV[sample.target_positions - 1].log_softmax(-1)
        found += (-log_p_MV[range(len(sample.labels)), sample.labels]).tolist()
    return np.mean(found)


def test_adapters_are_no_student_and_another_rank_is_another_run(run, made, trained, tmp_path):
    output, _ = trained
    with pytest.raises(InputError, match=r"holds adapters, not a whole model; merge them into their base first"):
        run(made, tmp_path / "out", student=output)
    options = {**LORA, "lora_rank": 8, "resume_from_checkpoint": output / "checkpoint-3"}
    with pytest.raises(InputError, match=r"another run \(lora: .*'rank': 8.*, there .*'rank': 4"):
        run(made, tmp_path / "out", **options)
