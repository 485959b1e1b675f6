import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitcache_pipeline.fingerprint import (
    config_fingerprint,
    teacher_identity,
    tokenizer_identity_of,
    weights_fingerprint,
)
from logitcache_pipeline.testing import write_teacher
from logitcache_storage.errors import InputError


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=997, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_copy_in_other_shards_is_the_same_model(saved, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert weights_fingerprint(tmp_path) == weights_fingerprint(saved)


def test_one_bit_of_a_small_tensor_counts(saved, folder):
    change(folder, lambda tensors: tensors["model.norm.weight"][3].add_(1e-6))
    assert weights_fingerprint(folder) != weights_fingerprint(saved)


@pytest.mark.parametrize("row", [0, 996])
def test_the_ends_of_a_large_tensor_count(saved, folder, row):
    assert load_file(folder / "model.safetensors")["lm_head.weight"].nbytes > 1 << 16
    change(folder, lambda tensors: tensors["lm_head.weight"][row].add_(1e-6))
    assert weights_fingerprint(folder) != weights_fingerprint(saved)


def test_names_and_dtypes_count(saved, folder):
    change(folder, lambda tensors: tensors.update(other=tensors.pop("model.norm.weight")))
    assert weights_fingerprint(folder) != weights_fingerprint(saved)


def test_pickled_weights_have_a_fingerprint_too(folder):
    (folder / "model.safetensors").unlink()
    rng = np.random.default_rng(0)
    (folder / "pytorch_model.bin").write_bytes(rng.bytes(9_000_000))
    before = weights_fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(rng.bytes(9_000_000))
    assert weights_fingerprint(folder) != before


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no weights; expected model\.safetensors or pytorch_model\.bin"):
        weights_fingerprint(tmp_path)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_weights_that_were_cut_off_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="copy the model again"):
        weights_fingerprint(folder)


def test_a_missing_shard_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="unreadable weights, FileNotFoundError"):
        weights_fingerprint(tmp_path)


def test_only_keys_that_change_the_model_count(folder):
    file = folder / "config.json"
    before, config = config_fingerprint(file), json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_version": "9.9", "dtype": "float16", "_name_or_path": "x"}))
    assert config_fingerprint(file) == before
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert config_fingerprint(file) != before


@pytest.mark.parametrize("content", [None, "{"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: not a readable model config"):
        config_fingerprint(tmp_path / "config.json")


def test_the_identity_does_not_depend_on_where_the_model_lies(saved, folder):
    here = teacher_identity(str(saved), dtype="float32", engine="transformers")
    there = teacher_identity(str(folder), dtype="float32", engine="transformers")
    assert (here.weights, here.config) == (there.weights, there.config)
    assert (here.id, here.revision, here.dtype, here.engine) == (str(saved), "", "float32", "transformers")


def test_a_hub_model_is_its_commit_and_works_offline(saved, tmp_path):
    """Other revisions of it, which unlike main have a tokenizer, are loaded wherever the teacher is."""
    commit, old, new = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98", "a" * 40
    repo = tmp_path / "models--some--model"
    shutil.copytree(saved, repo / "snapshots" / commit)
    for other in (old, new):
        write_teacher(repo / "snapshots" / other)
    (repo / "refs").mkdir()
    for name, found in {"main": commit, "old": old, "new": new}.items():
        (repo / "refs" / name).write_text(found)
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "response": "b"}')
    code = (
        "import sys; sys.path[:0] = ['pipeline', 'storage']\n"
        "from logitcache_pipeline.engines import load_teacher\n"
        "from logitcache_pipeline.fingerprint import teacher_identity\n"
        "mine = teacher_identity('some/model', dtype='float32', engine='transformers')\n"
        "assert load_teacher('transformers', 'some/model', device='cpu').identity == mine\n"
        "print(mine.id, mine.revision)\n"
        "try: teacher_identity('some/other', dtype='float32', engine='transformers')\n"
        "except ValueError as e: print(e)\n"
        "from dataclasses import replace\n"
        "from logitcache_pipeline.build import _create_or_continue\n"
        "from logitcache_pipeline.prepare import prepare\n"
        "from logitcache_pipeline.rescore import _load\n"
        "from logitcache_pipeline.settings import BuildSettings\n"
        f"settings = BuildSettings('some/model', ({str(tmp_path / 'c.jsonl')!r},), 'cache', k=9, revision='old')\n"
        "from logitcache_storage.objects import open_store\n"
        f"prepared, store = prepare(settings), open_store({str(tmp_path / 'cache')!r})\n"
        "identity = prepared.identity('float32')\n"
        "print(identity.teacher.revision, _load('some/model', identity, {}).identity.revision)\n"
        "_create_or_continue(store, prepared, 'float32')\n"
        "try: _create_or_continue(store, prepare(replace(settings, revision='new')), 'float32')\n"
        "except ValueError as e: print(e)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert lines[0] == f"some/model {commit}"
    assert "'some/other' is neither a model folder nor a reachable hub id" in lines[1]
    assert lines[2] == f"{old} {old}"
    assert lines[-1] == f"the cache's teacher is another commit: --revision {old}"


def test_a_tokenizer_is_its_vocabulary_special_tokens_and_template():
    def tokenizer(vocabulary, **options):
        model = models.WordLevel(vocabulary, unk_token="a")
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **options)

    first = tokenizer_identity_of(tokenizer({"a": 0, "b": 1}, eos_token="b"))
    assert first == tokenizer_identity_of(tokenizer({"b": 1, "a": 0}, eos_token="b"))
    assert first.vocabulary != tokenizer_identity_of(tokenizer({"a": 1, "b": 0}, eos_token="b")).vocabulary
    assert first.special_tokens != tokenizer_identity_of(tokenizer({"a": 0, "b": 1}, eos_token="a")).special_tokens
