"""Tiny random models of many families against a float64 log-softmax of the model's own logits, one sample at a time."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file, save_file

from logitcache_pipeline.engines.base import ScoringRequest, load_teacher
from logitcache_pipeline.engines.transformers import TransformersTeacher, _dtype
from logitcache_pipeline.fingerprint import teacher_identity
from logitcache_pipeline.head import PendingRows
from logitcache_storage.errors import InputError, LogitCacheError

NATS = 2e-5
V = 101
WINDOW = 8
LONGROPE_SWITCH = 16

# A wide initialisation, so that distributions are far from uniform and attention from an average.
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
GPT = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": LONGROPE_SWITCH,
}
WITHOUT_HEAD_DIM = {name: value for name, value in LLAMA.items() if name != "head_dim"}
WITHOUT_GROUPS = {name: value for name, value in WITHOUT_HEAD_DIM.items() if name != "num_key_value_heads"}
FAMILIES = {
    "llama": LLAMA,
    "qwen2": WITHOUT_HEAD_DIM | {"tie_word_embeddings": True},
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mistral": LLAMA | {"sliding_window": WINDOW},
    "gemma2": LLAMA
    | {
        "sliding_window": WINDOW,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": LLAMA | {"sliding_window": WINDOW, "final_logit_softcapping": 3.0},
    "cohere": WITHOUT_HEAD_DIM | {"logit_scale": 0.3},
    "granite": WITHOUT_HEAD_DIM | {"logits_scaling": 4.0},
    "falcon_h1": LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
    "phi": WITHOUT_HEAD_DIM,
    "phi3": WITHOUT_HEAD_DIM | {"rope_parameters": LONGROPE, "original_max_position_embeddings": LONGROPE_SWITCH},
    "gpt_oss": LLAMA | {"num_local_experts": 4, "sliding_window": WINDOW},
    "gpt_neox": WITHOUT_GROUPS,
    "gpt2": GPT | {"n_positions": 64, "initializer_range": 0.3},
    "opt": GPT | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "init_std": 0.3},
    "bloom": GPT | {"initializer_range": 0.3},
    "mamba": GPT | {"state_size": 4},
}


NEVER_PACKED = {"bloom", "falcon_h1", "gemma2", "gpt_oss", "mamba"}
"""Biases or sinks in the attention, a soft-cap on its scores, or a state that runs through the row."""


def save(folder, family, edit=None, **overrides):
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(family, **FAMILIES[family] | overrides)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        if edit is not None:
            edit(model)
    model.save_pretrained(folder)
    return model


def teacher_of(folder, edit=None, **options):
    """With a model of its own, whose attention may be replaced."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if edit is not None:
        edit(model)
    identity = teacher_identity(str(folder), dtype="float32", engine="transformers")
    return TransformersTeacher(model, identity, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save(folder, "llama"), folder


@pytest.fixture
def llama_copy(llama, tmp_path):
    return shutil.copytree(llama[1], tmp_path / "copy")


def ragged(lengths=(5, 40, 2, 17, 16, 33, 9), seed=1):
    rng = np.random.default_rng(seed)
    requests = []
    for length in lengths:
        positions = np.sort(rng.choice(np.arange(1, length), max(1, (length - 1) // 2), replace=False))
        requests.append(ScoringRequest(rng.integers(V, size=length).astype(np.int32), positions.astype(np.int32)))
    return requests


@torch.no_grad()
def full_log_probs(model, request):
    """[M, V] float64, from the sample alone through the model as it is."""
    ids = torch.from_numpy(request.input_ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    return torch.log_softmax(logits, dim=-1).numpy()[request.target_positions - 1]


def assert_scored(model, teacher, requests=None, k=7, atol=NATS):
    """The teacher's answers are what the model says of each sample alone; returns them."""
    requests = ragged() if requests is None else requests
    answers = teacher.score(requests, k)
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        expected = full_log_probs(model, request)
        labels = request.input_ids[request.target_positions]
        outside = expected.copy()
        np.put_along_axis(outside, answer.ids.astype(np.int64), -np.inf, axis=1)
        with np.errstate(invalid="ignore"):
            tail = np.logaddexp.reduce(outside, axis=1)
        assert_allclose(answer.log_probs, -np.sort(-expected, axis=1)[:, :k], rtol=0, atol=atol)
        assert_allclose(np.take_along_axis(expected, answer.ids, 1), answer.log_probs, rtol=0, atol=atol)
        assert_allclose(answer.log_tail, tail, rtol=0, atol=atol)
        assert_allclose(answer.label_log_prob, expected[np.arange(len(labels)), labels], rtol=0, atol=atol)
        assert_array_equal(answer.num_kept, k)
    return answers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_scores_like_its_own_logits(family, tmp_path):
    model = save(tmp_path, family)
    teacher = load_teacher("transformers", str(tmp_path), device="cpu", tokens_per_batch=70)
    assert teacher.vocab_size == V
    assert teacher.layout == ("padded" if family in NEVER_PACKED else "packed")
    assert_scored(model, teacher)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_padded_batches_score_like_packed_ones(family, tmp_path):
    model = save(tmp_path, family)
    teacher = teacher_of(tmp_path, layouts=["padded"], tokens_per_batch=70)
    assert teacher.layout == "padded"
    assert_scored(model, teacher)


def test_the_window_of_the_sliding_family_is_shorter_than_its_samples(tmp_path):
    sliding = save(tmp_path / "sliding", "mistral")
    unlimited = save(tmp_path / "unlimited", "mistral", sliding_window=None)
    request = ragged([40])[0]
    differences = np.abs(full_log_probs(sliding, request) - full_log_probs(unlimited, request)).max(axis=1)
    assert (differences[request.target_positions - 1 >= WINDOW] > 0.1).all()


@pytest.mark.parametrize("k", [0, 1, 64, V])
@pytest.mark.parametrize("tokens_per_batch", [1, 45, 10_000])
def test_any_k_and_any_budget(llama, k, tokens_per_batch):
    model, folder = llama
    teacher = TransformersTeacher.load(str(folder), tokens_per_batch=tokens_per_batch)
    answers = assert_scored(model, teacher, ragged((2, 63, 3, 3, 64, 7, 11, 2)), k)
    assert (k == V) == all(np.isneginf(a.log_tail).all() for a in answers)


def test_no_requests_give_no_answers(llama):
    assert TransformersTeacher.load(str(llama[1])).score([], 3) == []


def test_a_model_that_cannot_be_packed_keeps_its_own_attention(tmp_path):
    save(tmp_path, "falcon_h1")
    with pytest.raises(InputError, match="a sequence scores differently alone and in a batch"):
        teacher_of(tmp_path, layouts=["packed"])
    teacher = teacher_of(tmp_path)
    assert teacher.layout == "padded"
    assert teacher._model.config._attn_implementation == "sdpa"


def test_attention_of_the_users_choice_is_left_alone(llama):
    teacher = TransformersTeacher.load(str(llama[1]), attention="eager", device="cpu")
    assert teacher.layout == "padded"
    assert_scored(llama[0], teacher)


def test_longrope_keeps_short_and_long_sequences_apart(tmp_path):
    save(tmp_path, "phi3")
    teacher = TransformersTeacher.load(str(tmp_path), tokens_per_batch=10_000)
    assert teacher.batches([15, 17, 16, 40]) == [[3, 1], [2, 0]]


def test_the_identity_is_that_of_the_folder_and_the_dtype(llama):
    _, folder = llama
    assert TransformersTeacher.load(str(folder), device="cpu").identity == teacher_identity(
        str(folder), dtype="float32", engine="transformers"
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_the_models_own_bfloat16(family, tmp_path):
    save(tmp_path, family)
    teacher = TransformersTeacher.load(str(tmp_path), dtype="bfloat16", device="cpu")
    assert teacher.identity.dtype == "bfloat16"
    own = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    request = ragged([30])[0]
    # One ulp of bfloat16 is 2^-7 of the logits' binade, here at most 16 (the caps of Gemma bring in a second rounding).
    expected = full_log_probs(own, request)
    label = np.arange(len(expected)), request.input_ids[request.target_positions]
    answer = teacher.score([request], 5)[0]
    assert_allclose(answer.label_log_prob, expected[label], rtol=0, atol=2 * 16 * 2.0**-7)


@pytest.mark.parametrize("k", [-1, V + 1])
def test_k_outside_the_vocabulary_is_refused(llama, k):
    teacher = TransformersTeacher.load(str(llama[1]))
    with pytest.raises(InputError, match=f"k must be between 0 and the teacher's vocabulary size {V}, got {k}"):
        teacher.score(ragged(), k)


def test_requests_the_teacher_cannot_take_are_refused_by_index(llama):
    teacher = TransformersTeacher.load(str(llama[1]))
    position = np.array([1], dtype=np.int32)
    foreign = ScoringRequest(np.array([3, V], dtype=np.int32), position)
    with pytest.raises(InputError, match=rf"request 1 holds token id {V}, the teacher's vocabulary is 0\.\.{V - 1}"):
        teacher.score([ragged()[0], foreign], 3)
    with pytest.raises(InputError, match="request 0 holds token id -1"):
        teacher.score([ScoringRequest(np.array([-1, 2], dtype=np.int32), position)], 3)
    assert teacher.max_length == 64
    with pytest.raises(InputError, match="request 0 has 65 tokens, the teacher takes 64"):
        teacher.score(ragged([65]), 3)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot load a causal language model from '.*nowhere'"):
        TransformersTeacher.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "unknown dtype 'int4'; choose from bfloat16, float16, float32"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(llama, options, message):
    with pytest.raises(InputError, match=message):
        TransformersTeacher.load(str(llama[1]), device="cpu", **options)


def test_weights_that_would_be_random_are_refused(llama_copy):
    tensors = load_file(llama_copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, llama_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaForCausalLM, first 'lm_head\.weight'"):
        TransformersTeacher.load(str(llama_copy))


def test_a_model_that_sees_the_future_is_refused(llama_copy):
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(InputError, match=r"\(LlamaForCausalLM, float32\) .* it is not causal"):
        TransformersTeacher.load(str(llama_copy))


def test_a_head_that_is_not_understood_is_refused(tmp_path):
    # HyperCLOVA X multiplies by what Granite divides by.
    config = tf.AutoConfig.for_model("hyperclovax", **LLAMA, logits_scaling=2.0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\(HyperCLOVAXForCausalLM, float32\) .* its head is more than a linear"):
        TransformersTeacher.load(str(tmp_path))


def test_a_head_that_is_not_linear_is_refused(llama):
    with pytest.raises(InputError, match="has an output layer of Sequential, expected a linear layer"):
        teacher_of(llama[1], lambda model: model.set_output_embeddings(torch.nn.Sequential(model.lm_head)))


def test_a_model_without_a_backbone_is_refused(llama):
    with pytest.raises(InputError, match=r"\(LlamaForCausalLM\) has no 'trunk', expected a backbone"):
        teacher_of(llama[1], lambda model: setattr(model, "base_model_prefix", "trunk"))


@pytest.mark.parametrize(
    ("stored", "on_gpu"),
    [("float32", torch.float32), ("float16", torch.float16), (None, torch.bfloat16), ("float8_e4m3fn", torch.bfloat16)],
)
def test_the_default_dtype_is_the_checkpoints_on_a_gpu_and_float32_on_a_cpu(stored, on_gpu):
    config = tf.AutoConfig.for_model("llama", **LLAMA, dtype=stored)
    assert _dtype(None, config, torch.device("cuda:1")) == on_gpu
    assert _dtype(None, config, torch.device("cpu")) == torch.float32


def test_logits_that_are_no_numbers_are_named(tmp_path):
    save(tmp_path, "gpt2", edit=lambda model: model.transformer.wpe.weight[30].fill_(torch.nan))
    sound, broken = ragged([25])[0], ScoringRequest(ragged([40])[0].input_ids, np.array([31, 35], dtype=np.int32))
    teacher = TransformersTeacher.load(str(tmp_path), tokens_per_batch=50)
    with pytest.raises(LogitCacheError, match="2 of 2 rows, first in request 2 at target position 31"):
        teacher.score([sound, sound, broken], 4)


def test_a_model_of_no_numbers_is_refused(tmp_path):
    save(tmp_path, "gpt2", edit=lambda model: model.transformer.wpe.weight[3].fill_(torch.nan))
    with pytest.raises(InputError, match="cannot be scored exactly: its logits are NaN or infinite"):
        TransformersTeacher.load(str(tmp_path))


def limit_memory(teacher, num_tokens):
    """What the GPU's allocator raises, for inputs above this many tokens; the sizes that were tried are returned."""
    tried = []

    def allocate(module, args, kwargs):
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    teacher._model.base_model.register_forward_pre_hook(allocate, with_kwargs=True)
    return tried


@pytest.mark.parametrize(("layout", "num_halvings"), [("padded", 3), ("packed", 2)])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(llama, layout, num_halvings, caplog):
    model, folder = llama
    teacher = teacher_of(folder, layouts=[layout], tokens_per_batch=10_000)
    requests = ragged((5, 40, 2, 17, 16, 33, 9, 40, 38))
    tried = limit_memory(teacher, 60)
    with caplog.at_level("WARNING"):
        assert_scored(model, teacher, requests)
    assert len([n for n in tried if n > 60]) == len(caplog.records) == num_halvings
    assert f"batches have at most {teacher._tokens_per_batch} from now on" in caplog.messages[-1]
    tried.clear()
    assert_scored(model, teacher, requests)
    assert max(tried) <= 60


def test_a_sequence_that_does_not_fit_by_itself_is_named_and_the_others_can_be_scored(llama):
    model, folder = llama
    teacher = teacher_of(folder, tokens_per_batch=10_000)
    limit_memory(teacher, 30)
    with pytest.raises(
        LogitCacheError, match=r"a sequence of 40 tokens .* memory of cpu \(CUDA out.*; lower max_length"
    ):
        teacher.score(ragged((5, 40, 2, 17)), 7)
    assert_scored(model, teacher, ragged((5, 30, 2, 17)))


def test_the_device_has_the_next_batch_before_the_answers_are_fetched(llama, monkeypatch):
    teacher = teacher_of(llama[1], tokens_per_batch=20)
    events, wait = [], PendingRows.wait
    teacher._model.base_model.register_forward_pre_hook(lambda *_: events.append("start"))
    monkeypatch.setattr(PendingRows, "wait", lambda *args: events.append("fetch") or wait(*args))
    teacher.score(ragged((20, 20, 20, 20)), 3)
    assert events == ["start", "start", "fetch", "start", "fetch", "start", "fetch", "fetch"]


def test_compiled_it_scores_the_same(tmp_path):
    model = save(tmp_path, "llama", num_hidden_layers=1)
    teacher = teacher_of(tmp_path, tokens_per_batch=70, compile=True)
    # Fused, float32 is rounded at other places: a few units in the last place of logits up to 16.
    assert_scored(model, teacher, atol=1e-4)


def test_a_compiler_that_fails_is_told_with_the_remedy(tmp_path):
    """In a process of its own: where something was compiled before, its kernels may be found and nothing fail."""
    save(tmp_path, "llama", num_hidden_layers=1)
    program = (
        "from logitcache_pipeline.engines.transformers import TransformersTeacher;"
        f" TransformersTeacher.load({str(tmp_path)!r}, device='cpu', compile=True)"
    )
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    found = r"InputError: torch.compile cannot compile '.*' \(LlamaForCausalLM\) on cpu.* compile=False"
    assert re.search(found, done.stderr, re.DOTALL), done.stderr[-2000:]
