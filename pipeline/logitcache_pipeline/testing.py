"""For tests, here and in projects that build on this one: a teacher that loads in a tenth of a second."""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 271
MAX_LENGTH = 256


def write_teacher(folder: Path, *, seed: int = 0, max_length: int = MAX_LENGTH, head_dim: int = 8) -> Path:
    """A byte-level tokenizer and a Llama of random weights, as an ordinary checkpoint; returns its folder.

    The vocabulary is padded, as many real ones are: the tokenizer has fewer ids than the model's `VOCAB_SIZE`. Some
    kernels of attention need a larger `head_dim`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
