"""Average@n and greedy accuracy of a model on problems with checkable answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from logitcache_storage.errors import InputError
from logitcache_storage.progress import progress
from logitcache_train.answers import Problem, is_exact
from logitcache_train.generation import Decoding, Generated, encode_prompts, generate_responses
from logitcache_train.loading import check_folder, load_checkpoint
from logitcache_train.lora import quiet_peft

Z_95 = 1.96

Compare = Callable[[str, str], bool | None]
"""Of a response and a reference: right, wrong, or None where nobody can say (which counts as wrong)."""


@dataclass(frozen=True)
class Response:
    """What the model said, and whether it is right."""

    text: str
    right: bool | None


@dataclass(frozen=True)
class Answered:
    """A problem, and the model's responses to it."""

    problem: Problem
    samples: tuple[Response, ...]
    greedy: Response

    @property
    def share(self) -> float:
        """Of right answers among the samples."""
        return sum(bool(response.right) for response in self.samples) / len(self.samples)


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, in [0, 1], and how sure it is."""

    mean: float
    standard_error: float | None
    """Over problems; None for a single one."""
    confidence_95: tuple[float, float]

    @classmethod
    def over(cls, shares: Sequence[float], num_samples: int = 1) -> Accuracy:
        """From the share of right answers among `num_samples` to each problem, at least one.

        The interval is Wilson's at the effective number of independent answers, mean (1 - mean) / error^2, as for
        clustered samples (Korn and Graubard 1998). So it has a width at shares of 0 and 1, too.
        """
        mean, size = statistics.fmean(shares), len(shares)
        error = statistics.stdev(shares) / math.sqrt(size) if size > 1 else None
        effective = mean * (1 - mean) / error**2 if error else (size if mean in (0, 1) else math.inf)
        return cls(mean, error, _wilson(mean, min(effective, size * num_samples)))


@dataclass(frozen=True)
class Evaluation:
    """How a model did."""

    answered: tuple[Answered, ...]
    average: Accuracy
    """Average@n: over problems, of the share of right answers among n samples of each."""
    greedy: Accuracy
    num_samples: int
    num_undecided: int
    """Responses of which the comparison could not say whether they are right; they count as wrong."""
    num_cut: int
    """Responses, greedy ones included, that were not at their end when they had `max_new_tokens`."""
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
    compare: Compare = is_exact,
    quiet: bool = False,
) -> Evaluation:
    """Sample `num_samples` responses to each problem, decode one greedily, and count the right ones.

    Args:
        model: a causal language model; it is put into eval mode.
        tokenizer: its tokenizer.
        problems: at least one.
        decoding: with a temperature; greedy decoding takes its other settings.
        num_samples: n, at least 1.
        compare: whether a response is right.
        quiet: show no progress.

    Raises:
        InputError: `num_samples` is below 1, or a prompt leaves no room for a response.
        LogitCacheError: the model's logits are no numbers.
    """
    if num_samples < 1:
        raise InputError(f"--samples must be at least 1, got {num_samples}")
    model.eval()
    prompts = encode_prompts(tokenizer, problems)
    start, total = time.perf_counter(), len(problems) * (num_samples + 1)
    with progress("generating", total=total, unit="responses", quiet=quiet) as meter:

        def generate(how: Decoding, count: int) -> Generated:
            return generate_responses(model, tokenizer, prompts, how, num_samples=count, advance=meter.advance)

        sampled = generate(decoding, num_samples)
        greedy = generate(Decoding(decoding.max_new_tokens, None, decoding.batch_size, decoding.seed), 1)
    seconds = time.perf_counter() - start
    answered = []
    with progress("comparing", total=total, unit="responses", quiet=quiet) as meter:
        for problem, texts, [text] in zip(problems, sampled.texts, greedy.texts, strict=True):
            *samples, last = (Response(t, compare(t, problem.reference)) for t in (*texts, text))
            answered.append(Answered(problem, tuple(samples), last))
            meter.advance(num_samples + 1)
    return Evaluation(
        answered=tuple(answered),
        average=Accuracy.over([a.share for a in answered], num_samples),
        greedy=Accuracy.over([float(bool(a.greedy.right)) for a in answered]),
        num_samples=num_samples,
        num_undecided=sum(r.right is None for a in answered for r in (*a.samples, a.greedy)),
        num_cut=sampled.num_cut + greedy.num_cut,
        num_tokens=sampled.num_tokens + greedy.num_tokens,
        seconds=seconds,
    )


def load_model(path: str, *, dtype: str | None = None) -> tuple[Any, Any]:
    """A causal language model on the GPU, if there is one, and its tokenizer.

    Args:
        path: folder or hub id of a checkpoint, or a folder of LoRA adapters, whose base is then loaded as well.
        dtype: of the weights; None: float32 on a CPU, elsewhere the checkpoint's.

    Raises:
        InputError: there is none.
    """
    transformers_logging.disable_progress_bar()
    check_folder(path, "--model")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    usual = "float32" if device is None or device.type == "cpu" else "auto"
    base = _base_of_adapters(path)
    model, tokenizer = load_checkpoint(base or path, tokenizer_path=path, dtype=dtype or usual)
    if base is not None:
        from peft import PeftModel

        try:
            with quiet_peft():
                model = PeftModel.from_pretrained(model, path)
        except (OSError, ValueError) as e:
            raise InputError(f"cannot load the adapters in {path!r}: {e}") from e
    return model.to(device), tokenizer


def _base_of_adapters(path: str) -> str | None:
    """What these adapters were trained on; None if it is no folder of adapters."""
    if not (Path(path).expanduser() / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    base: str = PeftConfig.from_pretrained(path).base_model_name_or_path
    return base


def _wilson(mean: float, n: float) -> tuple[float, float]:
    """The interval of a share found in n independent trials (Wilson 1927)."""
    z2_n = Z_95**2 / n
    centre = (mean + z2_n / 2) / (1 + z2_n)
    margin = Z_95 * math.sqrt(mean * (1 - mean) / n + z2_n / (4 * n)) / (1 + z2_n)
    return max(centre - margin, 0.0), min(centre + margin, 1.0)
