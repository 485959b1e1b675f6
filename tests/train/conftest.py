"""A tiny student, caches that fit it, and a way to train on them."""

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.samples import target_positions
from logitcache_storage.schema import CacheIdentity
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache
from logitcache_train.commands.train import add_arguments
from logitcache_train.demo.models import build_tokenizer
from logitcache_train.run import train
from logitcache_train.settings import parse_settings

COMMON = {
    "objective": "target_sft",
    "learning_rate": "1e-2",
    "logging_steps": "1",
    "save_strategy": "no",
    "batch_tokens": "150",
    "max_steps": "6",
}


@dataclass(frozen=True)
class Made:
    student: Path
    cache: str
    identity: CacheIdentity
    vocab_size: int


def tiny_llama(vocab_size: int, *, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        # Wide enough that logits differ visibly between positions and tokens.
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **changes}))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Made:
    """The student has attention dropout, so that a resumed run must restore the random state to be exact."""
    folder, size = tmp_path_factory.mktemp("made"), len(tokenizer)
    student = folder / "student"
    tiny_llama(size, attention_dropout=0.1).save_pretrained(student)
    tokenizer.save_pretrained(student)
    found = tokenizer_identity(tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template)
    identity = make_identity(tokenizer=found, vocab_size=size, k=5, shard_rows=40, precision="fp32")
    samples, topks = make_samples(60, 5, size, seed=3)
    write_cache(str(folder / "cache"), samples, topks, identity=identity)
    return Made(student, str(folder / "cache"), identity, size)


@pytest.fixture(scope="session")
def plain(made: Made) -> Made:
    """The same without dropout, so that runs can be compared that draw other random numbers."""
    student = made.student.with_name("plain")
    shutil.copytree(made.student, student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    return replace(made, student=student)


@pytest.fixture(scope="session")
def other_teacher(made: Made) -> Callable[..., str]:
    """Writes a cache of the same samples in another order, by another teacher; `keep` says how many it has."""

    def write(url: Path, *, keep: int = 60, seed: int = 77) -> str:
        samples, _ = make_samples(60, 5, made.vocab_size, seed=3)
        order = np.random.default_rng(seed).permutation(60)[:keep]
        labels = [ids[target_positions(ranges.ravel())] for ids, ranges in samples]
        topks = [make_topk(len(labels[i]), 5, made.vocab_size, seed=seed + int(i), labels=labels[i]) for i in order]
        identity = replace(made.identity, shard_rows=55, container="arrow")
        write_cache(str(url), [samples[i] for i in order], topks, identity=identity)
        return str(url)

    return write


@pytest.fixture(scope="session")
def held_out(made: Made) -> str:
    """A cache of other samples."""
    url = str(Path(made.cache).with_name("held-out"))
    samples, topks = make_samples(25, 5, made.vocab_size, seed=9)
    write_cache(url, samples, topks, identity=replace(made.identity, container="arrow"))
    return url


@pytest.fixture(scope="session")
def settings_of() -> Callable[..., Any]:
    """Settings from words of a command line."""

    def settings(*words: str) -> Any:
        parser = ArgumentParser(allow_abbrev=False)
        add_arguments(parser)
        args, args.rest = parser.parse_known_args(words)
        return parse_settings(args)

    return settings


@pytest.fixture(scope="session")
def run(settings_of: Callable[..., Any]) -> Callable[..., list[dict[str, float]]]:
    """Trains with the options given, and returns what was logged; several values of an option stand in a list."""

    def run(made: Made, output: Path, **changes: Any) -> list[dict[str, float]]:
        options = {"student": made.student, "cache": made.cache, "output": output, **COMMON, **changes}
        values = [(name, value) for name, v in options.items() for value in (v if isinstance(v, list) else [v])]
        train(settings_of(*(word for name, v in values if v is not None for word in (f"--{name}", str(v)))))
        history: list[dict[str, float]] = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
        return history

    return run
