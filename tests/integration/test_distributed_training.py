"""Two ranks under torchrun against one: the same global batches, the same losses, checkpoints that either takes up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from logitcache_storage.cli import main
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.demo.models import build_tokenizer

K = 5
COMMON = {
    "objective": "target_sft",
    "learning_rate": "1e-3",
    "batch_tokens": "150",
    "max_steps": "8",
    "logging_steps": "1",
    "save_strategy": "steps",
    "save_steps": "3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student without dropout, because ranks draw their own, and a cache of 60 samples."""
    folder, tokenizer = tmp_path_factory.mktemp("distributed"), build_tokenizer()
    tokenizer.save_pretrained(folder / "student")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "student")
    loaded = AutoTokenizer.from_pretrained(folder / "student")
    identity = make_identity(
        tokenizer=tokenizer_identity(loaded.get_vocab(), loaded.special_tokens_map, loaded.chat_template),
        vocab_size=len(loaded),
        k=K,
        shard_rows=40,
    )
    samples, topks = make_samples(60, K, len(loaded), seed=3)
    write_cache(str(folder / "cache"), samples, topks, identity=identity)
    return folder


def run(folder, name, *, ranks, **changes):
    """Train, with several ranks in processes of their own; returns what those said, and the logged losses."""
    options = {"student": folder / "student", "cache": folder / "cache", "output": folder / name, **COMMON, **changes}
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    if ranks == 1:
        assert main(["train", *words]) == 0
        return None, losses(folder / name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "logitcache_train", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done, losses(folder / name)


def losses(output: Path):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def one_rank(folder):
    return run(folder, "one", ranks=1)[1]


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run(folder, "two", ranks=2, gradient_accumulation_steps=2)


def test_two_ranks_have_the_losses_of_one(one_rank, two_ranks):
    assert len(one_rank) == 8
    assert two_ranks[1] == pytest.approx(one_rank, abs=1e-5)
    assert max(one_rank) - min(one_rank) > 1e-2


def test_only_the_main_process_prints(two_ranks):
    done, _ = two_ranks
    assert done.stdout.count("saved ") == 1
    assert done.stderr.count("step 8 of 8") == 1


def test_one_rank_goes_on_from_a_checkpoint_of_two(folder, one_rank, two_ranks):
    _, found = run(folder, "resumed", ranks=1, resume_from_checkpoint=folder / "two" / "checkpoint-3")
    assert found == pytest.approx(one_rank, abs=1e-5)


def test_ranks_without_a_sample_of_their_own_change_nothing(folder):
    """Batches of one or two samples, so that in most steps a rank has nothing to train on."""
    few = {"batch_tokens": 15, "save_strategy": "no"}
    _, expected = run(folder, "few-one", ranks=1, **few)
    _, found = run(folder, "few-two", ranks=2, **few)
    assert found == pytest.approx(expected, abs=1e-5)
