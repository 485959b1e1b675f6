"""A tiny student and a cache that fits it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.schema import CacheIdentity
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.demo.models import build_tokenizer


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
