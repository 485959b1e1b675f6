"""Qwen2 models of random weights, for benchmarks of which only the shape of the teacher matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Shape:
    """What a forward pass costs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    head_size: int = 64


def random_qwen2(shape: Shape) -> Qwen2ForCausalLM:
    """Weights of twice the usual spread, so that the distributions are not all but uniform; equal on every call."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.hidden_size // shape.head_size,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.04,
        )
    )
