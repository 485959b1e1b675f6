"""Many responses to many prompts, in batches of prompts of similar length, padded on the left.

Every response has random numbers of its own, one for each token, which follow from the seed, the number of the problem
and that of the sample. So neither the size of the batches nor what else is in them decides what is drawn.

Shapes: B sequences of a batch, L tokens of its longest prompt, T of the longest response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_train.answers import Problem


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: from the model's own distribution at a temperature, or greedily."""

    max_new_tokens: int
    temperature: float | None = None
    """Above 0; None for greedy decoding."""
    batch_size: int = 256
    """Sequences side by side. Other sizes give the same responses, except where the last bits of logits, which differ
    between shapes of batches, decide a token, or where the longest prompt of a batch leaves less room."""
    seed: int = 0
    """At least 0."""

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}; greedy decoding is reported anyway")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True)
class Generated:
    """What was generated, in the order of the prompts."""

    texts: list[list[str]]
    """The responses to each prompt, special tokens left out."""
    num_tokens: int
    """Up to and with the first token that ends a response."""
    num_cut: int
    """Responses that no such token ended."""


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
) -> Generated:
    """`num_samples` responses to each prompt.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids of each, at least one.
        decoding: how.
        num_samples: responses to each prompt.
        advance: called with the number of responses that are done, for a progress bar.

    Raises:
        InputError: a prompt leaves no room for a response, or the tokenizer has no token that ends one.
        LogitCacheError: the model's logits are no numbers.
    """
    _check_lengths(model, prompts)
    config = _generation_config(model, tokenizer, decoding)
    ends = torch.tensor(config.eos_token_id)
    responses: list[list[str]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    sequences = ((i, sample) for i in longest_first for sample in range(num_samples))
    num_tokens = num_cut = 0
    while batch := list(islice(sequences, decoding.batch_size)):
        new_BT = _generate(model, [prompts[i] for i, _ in batch], config, _samplers(batch, decoding)).cpu()
        num_ends_BT = torch.isin(new_BT, ends).long().cumsum(1)
        num_tokens += int((num_ends_BT - torch.isin(new_BT, ends).long() == 0).sum())
        num_cut += int((num_ends_BT[:, -1] == 0).sum())
        for (i, _), text in zip(batch, tokenizer.batch_decode(new_BT, skip_special_tokens=True), strict=True):
            responses[i].append(text)
        advance(len(batch))
    return Generated(responses, num_tokens, num_cut)


class _Sampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of each sequence, drawn at a temperature by the inverse of the cumulative distribution."""

    def __init__(self, uniform_BT: torch.Tensor, temperature: float) -> None:
        self._next_BT, self._temperature = iter(uniform_BT.T), temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits, [B, V], with all but the token that is drawn at -inf."""
        # The largest is taken off first: a low temperature would make infinities.
        z_BV = (scores - scores.amax(-1, keepdim=True)) / self._temperature
        cumulative_BV = z_BV.double().softmax(-1).cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]
        if not total_B1.isfinite().all():
            raise LogitCacheError(
                "the model's logits are NaN or infinite, as of damaged weights; nothing can be sampled"
            )
        mark_B1 = next(self._next_BT)[:, None].to(scores.device) * total_B1
        token_B1 = torch.searchsorted(cumulative_BV, mark_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


def _samplers(batch: Sequence[tuple[int, int]], decoding: Decoding) -> LogitsProcessorList:
    """For these pairs of problem and sample; none for greedy decoding."""
    if decoding.temperature is None:
        return LogitsProcessorList()
    rows = [np.random.default_rng([decoding.seed, *pair]).random(decoding.max_new_tokens) for pair in batch]
    return LogitsProcessorList([_Sampler(torch.from_numpy(np.stack(rows)), decoding.temperature)])


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, samplers: LogitsProcessorList
) -> torch.Tensor:
    """The tokens behind the prompts, [B, T]."""
    length = max(map(len, prompts))
    ids_BL = torch.full((len(prompts), length), config.pad_token_id)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, length - len(prompt) :] = 1
    inputs = {"input_ids": ids_BL.to(model.device), "attention_mask": mask_BL.to(model.device)}
    longest = min(config.max_new_tokens, _max_length(model) - length)
    with _only(model, config):
        found_BL: torch.Tensor = model.generate(**inputs, max_new_tokens=longest, logits_processor=samplers)
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
    """Nothing of the checkpoint's own (top-k, penalties) but the tokens that end a response.

    Greedy, because where a token is to be drawn, `_Sampler` leaves only that one.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise InputError(
            "the tokenizer has no EOS token, so no response would end; set its eos_token and save it again"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
        do_sample=False,
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


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself; what it puts behind one belongs to no prompt."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
    return whole[:start]
