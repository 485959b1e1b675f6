"""Average@n and greedy accuracy of a model on problems with checkable answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from logitcache_storage.errors import InputError
from logitcache_storage.progress import progress
from logitcache_train.answers import Problem, is_correct
from logitcache_train.generation import Decoding, encode_prompts, generate_responses

Z_95 = 1.96


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, in [0, 1], and how sure it is."""

    mean: float
    standard_error: float
    """Over problems; NaN for a single one."""

    @classmethod
    def over(cls, shares: Sequence[float]) -> Accuracy:
        """From the share of right answers to each problem, at least one."""
        spread = statistics.stdev(shares) if len(shares) > 1 else math.nan
        return cls(statistics.fmean(shares), spread / math.sqrt(len(shares)))

    @property
    def confidence_95(self) -> tuple[float, float]:
        """The 95% interval of the normal approximation, within [0, 1]."""
        margin = Z_95 * self.standard_error
        return max(self.mean - margin, 0.0), min(self.mean + margin, 1.0)


@dataclass(frozen=True)
class Evaluation:
    """How a model did."""

    average: Accuracy
    """Average@n: over problems, of the share of right answers among n samples of each."""
    greedy: Accuracy
    num_problems: int
    num_samples: int
    num_tokens: int
    """Generated, greedy decoding included."""
    seconds: float
    """Of generation."""


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    decoding: Decoding,
    *,
    num_samples: int,
    quiet: bool = False,
) -> Evaluation:
    """Sample `num_samples` responses to each problem, decode one greedily, and count the right ones.

    Args:
        model: a causal language model; it is put into eval mode.
        tokenizer: its tokenizer.
        problems: at least one.
        decoding: with a temperature; greedy decoding takes its other settings.
        num_samples: n, at least 1.
        quiet: show no progress.

    Raises:
        InputError: `num_samples` is below 1, or a prompt leaves no room for a response.
    """
    if num_samples < 1:
        raise InputError(f"--samples must be at least 1, got {num_samples}")
    model.eval()
    prompts = encode_prompts(tokenizer, problems)
    greedily = Decoding(decoding.max_new_tokens, None, decoding.batch_size, decoding.seed)
    start, num_tokens, accuracies = time.perf_counter(), 0, []
    with progress("evaluating", total=len(problems) * (num_samples + 1), unit="responses", quiet=quiet) as meter:
        for how, count in ((decoding, num_samples), (greedily, 1)):
            responses, tokens = generate_responses(
                model, tokenizer, prompts, how, num_samples=count, advance=meter.advance
            )
            num_tokens += tokens
            accuracies.append(Accuracy.over([_share(r, p) for r, p in zip(responses, problems, strict=True)]))
    seconds = time.perf_counter() - start
    sampled, greedy = accuracies
    return Evaluation(sampled, greedy, len(problems), num_samples, num_tokens, seconds)


def load_model(path: str, *, dtype: str | None = None) -> tuple[Any, Any]:
    """A causal language model on the GPU, if there is one, and its tokenizer.

    Args:
        path: folder or hub id.
        dtype: of the weights; None: float32 on a CPU, elsewhere the checkpoint's.

    Raises:
        InputError: there is none.
    """
    transformers_logging.disable_progress_bar()
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise InputError(f"--model {path}: no such folder")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    usual = "float32" if device is None or device.type == "cpu" else "auto"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or usual, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as e:
        raise InputError(f"cannot load a causal language model with its tokenizer from {path!r}: {e}") from e
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{path!r} lacks {len(missing)} weights, first {missing[0]!r}: they would be random")
    return model.to(device), tokenizer


def _share(responses: Sequence[str], problem: Problem) -> float:
    return sum(is_correct(response, problem.answer) for response in responses) / len(responses)
