"""The demo's tokenizer and models, pre-trained from scratch as ordinary `transformers` checkpoints.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from logitcache_train.demo.task import Author, vocabulary

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Pretraining:
    """How a model is made: on whose demonstrations, for how long, from which seed."""

    author: Author
    seed: int
    exclude: frozenset[str] = frozenset()
    """Prompts that the model must not meet."""
    num_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_rate: float = 0.1
    """Where the cosine ends, as a fraction of `learning_rate`."""

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0: linear warm-up times a cosine down to `final_rate`."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.num_steps))
        return self.learning_rate * warmup * (self.final_rate + (1.0 - self.final_rate) * cosine)


@dataclass(frozen=True)
class Pretrained:
    """What came of it."""

    num_parameters: int
    loss: float
    """Mean over the last tenth of the steps, nats per solution token."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the task: words are separated by spaces, a newline is a word of its own."""
    words = ["<pad>", "<eos>", "<unk>", "\n", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A Llama of about 0.23M parameters with random weights.

    The embedding starts wide (standard deviation 0.3): with the usual 0.02 a teacher answered 35% of the
    held-out problems after 1,000 steps instead of all.
    """
    torch.manual_seed(seed)
    width, head_std, embedding_std = 96, 0.02, 0.3
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=1.0 / math.sqrt(width),
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=embedding_std)
    torch.nn.init.normal_(model.lm_head.weight, std=head_std)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, records: Sequence[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of records, each [B, L]; labels are IGNORE_INDEX outside the response and its EOS.

    Padding stands on the right, where causal attention never looks, so that no attention mask is needed.
    """
    prompts = tokenizer([r["prompt"] + "\n" for r in records]).input_ids
    responses = tokenizer([r["response"] + " " + tokenizer.eos_token for r in records]).input_ids
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids_BL = torch.full((len(records), length), tokenizer.pad_token_id)
    labels_BL = torch.full((len(records), length), IGNORE_INDEX)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids_BL[row, :end] = torch.tensor(prompt + response)
        labels_BL[row, len(prompt) : end] = ids_BL[row, len(prompt) : end]
    return ids_BL, labels_BL


def pretrain(config: Pretraining, output: Path) -> Pretrained:
    """Train a model on one thread and save it with its tokenizer; equal configs give equal weights."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    records = config.author.records(config.num_steps * config.batch_size, seed=config.seed, exclude=config.exclude)
    losses = []
    for step in range(config.num_steps):
        batch = records[step * config.batch_size : (step + 1) * config.batch_size]
        ids_BL, labels_BL = encode(tokenizer, batch)
        logits_BLV = model(input_ids=ids_BL[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    last = losses[-max(1, config.num_steps // 10) :]
    return Pretrained(model.num_parameters(), sum(last) / len(last))


def pretrain_in_parallel(configs: Sequence[Pretraining], outputs: Sequence[Path]) -> list[Pretrained]:
    """Run `pretrain` for each config in a process of its own; what came of them, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(configs), mp_context=context) as pool:
        return list(pool.map(pretrain, configs, outputs))
