"""Many responses to many prompts, in batches of prompts of similar length, padded on the left.

Shapes: B sequences of a batch, L tokens of its longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from logitcache_storage.errors import InputError
from logitcache_train.answers import Problem


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: from the model's own distribution at a temperature, or greedily."""

    max_new_tokens: int
    temperature: float | None = None
    """Above 0; None for greedy decoding."""
    batch_size: int = 256
    """Sequences side by side; with the same size and seed the same responses come out."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}; greedy decoding is reported anyway")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


def encode_prompts(tokenizer: Any, problems: Sequence[Problem]) -> list[list[int]]:
    """Token ids of each prompt, as `logitcache build` puts them before a response."""
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(list(p.messages), tokenize=False, add_generation_prompt=True)
            for p in problems
        ]
        prefix: list[int] = []
    else:
        texts = [p.prompt + "\n" for p in problems]
        prefix = _prefix(tokenizer)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [prefix + prompt for prompt in ids]


@torch.inference_mode()
def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    num_samples: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[list[str]], int]:
    """`num_samples` responses to each prompt, special tokens left out, and how many tokens were generated.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids of each, at least one.
        decoding: how.
        num_samples: responses to each prompt.
        advance: called with the number of responses that are done, for a progress bar.

    Raises:
        InputError: a prompt leaves no room for a response, or the tokenizer has no token that ends one.
    """
    _check_lengths(model, prompts)
    config = _generation_config(model, tokenizer, decoding)
    responses: list[list[str]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    sequences = (i for i in longest_first for _ in range(num_samples))
    num_tokens, number = 0, 0
    while batch := list(islice(sequences, decoding.batch_size)):
        torch.manual_seed(decoding.seed + number)
        new_BL = _generate(model, [prompts[i] for i in batch], config)
        num_tokens += _count_until_end(new_BL, config)
        for i, text in zip(batch, tokenizer.batch_decode(new_BL, skip_special_tokens=True), strict=True):
            responses[i].append(text)
        advance(len(batch))
        number += 1
    return responses, num_tokens


def _generate(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> torch.Tensor:
    length = max(map(len, prompts))
    ids_BL = torch.full((len(prompts), length), config.pad_token_id)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, length - len(prompt) :] = 1
    inputs = {"input_ids": ids_BL.to(model.device), "attention_mask": mask_BL.to(model.device)}
    room = _max_length(model) - length
    with _only(model, config):
        found_BL: torch.Tensor = model.generate(**inputs, max_new_tokens=min(config.max_new_tokens, room))
    return found_BL[:, length:]


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` takes what its config leaves open from the model's own (a repetition penalty, say): be the own one."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _generation_config(model: Any, tokenizer: Any, decoding: Decoding) -> GenerationConfig:
    """Pure sampling: nothing of the checkpoint's own (top-k, penalties) but the tokens that end a response."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise InputError(
            "the tokenizer has no EOS token, so no response would end; set its eos_token and save it again"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    how = (
        {"do_sample": False}
        if decoding.temperature is None
        else {"do_sample": True, "temperature": decoding.temperature}
    )
    if decoding.temperature is not None:
        how |= {"top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad, use_cache=True, **how
    )


def _check_lengths(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    limit = _max_length(model)
    if too_long := [i for i, prompt in enumerate(prompts) if len(prompt) >= limit]:
        first = too_long[0]
        raise InputError(
            f"the prompt of problem {first + 1} has {len(prompts[first])} tokens, and the model reads {limit}:"
            f" no room for a response; {len(too_long)} of {len(prompts)} problems are too long, leave them out"
        )
    if not min(map(len, prompts)):
        raise InputError("a prompt has no tokens; leave out empty problems")


def _max_length(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 1 << 30


def _count_until_end(new_BL: torch.Tensor, config: GenerationConfig) -> int:
    """Tokens up to and with the first that ends a response."""
    is_end_BL = torch.isin(new_BL, torch.tensor(config.eos_token_id, device=new_BL.device))
    return int((is_end_BL.cumsum(1) - is_end_BL.long() == 0).sum())


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself; what it puts behind one belongs to no prompt."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
    return whole[:start]
