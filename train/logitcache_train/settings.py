"""What a user asked `logitcache train` for: command line and YAML file, checked, as one frozen value."""

from __future__ import annotations

import difflib
import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from logitcache_storage.errors import InputError
from logitcache_train.commands.train import add_arguments, parameter_names
from logitcache_train.objectives import Objective, objective
from logitcache_train.student import Packing

ROLES = ("teacher", "reference")

DEFAULT_WINDOW_SHARDS = 8

REFUSED = {
    "label_smoothing_factor": "use --objective label_smoothing",
    "auto_find_batch_size": "set --batch_tokens or --gradient_accumulation_steps",
    "use_liger_kernel": "the loss is fused already",
    "torch_compile": "the fused loss cannot be traced",
    "ignore_data_skip": "resuming reads nothing twice, and without skipping it would train on the wrong samples",
    "train_sampling_strategy": "micro-batches are of similar length already",
    "eval_strategy": "evaluate checkpoints with 'logitcache evaluate'",
    "deepspeed": "use DDP (torchrun) or --fsdp",
}
"""Fields of TrainingArguments that would be ignored or do harm, and what to do instead."""


@dataclass(frozen=True)
class TrainSettings:
    """One training run."""

    student: str
    """Folder or hub id."""
    caches: Mapping[str, str]
    """Role to URL, at least one; the first says which samples there are."""
    objective: Objective
    arguments: TrainingArguments
    """The Trainer's."""
    batch_tokens: int | None = None
    """Input tokens of a global batch; None: see `run.resolve_batch_tokens`."""
    window_shards: int = DEFAULT_WINDOW_SHARDS
    """Shards of a shuffle window."""
    packing: Packing = "auto"
    dtype: str = "float32"
    attn_implementation: str | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "window_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")

    @property
    def output(self) -> Path:
        """Where the student goes."""
        return Path(str(self.arguments.output_dir))


def parse_settings(args: Namespace) -> TrainSettings:
    """The settings behind parsed arguments of `logitcache train`, with `args.rest` those of the Trainer.

    Raises:
        InputError: an unknown or missing argument, a value out of range, or an unreadable configuration file.
    """
    own, rest = vars(args).copy(), list(args.rest)
    if args.config is not None:
        from_file, file_rest = _read_config(Path(args.config))
        own = {name: from_file.get(name) if value is None else value for name, value in own.items()}
        rest = file_rest + rest
    for name in ("student", "cache", "objective", "output"):
        if not own[name]:
            raise InputError(f"--{name} is missing; 'logitcache train --help' says what it takes")
    parameters = {name: own[name] for name in parameter_names() if own[name] is not None}
    obj = objective(own["objective"], **parameters)
    optional = ("batch_tokens", "window_shards", "packing", "dtype", "attn_implementation", "storage_options")
    return TrainSettings(
        student=own["student"],
        caches=parse_caches(own["cache"], obj),
        objective=obj,
        arguments=_training_arguments(rest, own["output"]),
        **{name: own[name] for name in optional if own[name] is not None},
    )


def parse_caches(words: Sequence[str], obj: Objective) -> dict[str, str]:
    """`URL` or `ROLE=URL` of each cache as role to URL; a URL without a role has the first that the objective needs.

    Raises:
        InputError: an unknown role, or two caches of one role.
    """
    caches: dict[str, str] = {}
    for word in words:
        named = re.fullmatch(r"(\w+)=(.+)", word)
        role, url = (named[1], named[2]) if named else ((*obj.roles, *ROLES)[0], word)
        if role not in ROLES:
            raise InputError(
                f"--cache {word}: unknown role {role!r}; choose from {', '.join(ROLES)}, as in teacher=URL"
            )
        if role in caches:
            raise InputError(
                f"--cache: two {role} caches, {caches[role]} and {url}; give each its role, as in reference=URL"
            )
        caches[role] = url
    return caches


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file as arguments that stand before those of the command line: ours, and the words left for the Trainer."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"--config {path}: cannot be read as YAML: {e}") from e
    if not isinstance(values, dict):
        raise InputError(
            f"--config {path}: expected a mapping such as 'learning_rate: 1e-4', found {type(values).__name__}"
        )
    parser = _Parser(f"--config {path}")
    add_arguments(parser)
    words = [word for name, value in values.items() for word in _words(str(name), value)]
    own, rest = parser.parse_known_args(words)
    if own.config is not None:
        raise InputError(f"--config {path}: names another configuration file; give one file only")
    return vars(own), rest


def _words(name: str, value: Any) -> list[str]:
    """One entry of a configuration file as it would stand on a command line."""
    if value is None:
        return []
    flag = f"--{name}"
    if name == "cache":
        urls = [f"{role}={url}" for role, url in value.items()] if isinstance(value, dict) else value
        return [word for url in ([urls] if isinstance(urls, str) else urls) for word in (flag, str(url))]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict | bool) else str(value)]


def _training_arguments(words: Sequence[str], output: str) -> TrainingArguments:
    parser = _HfParser("logitcache train", TrainingArguments)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            [*_defaults(words), *words, "--output_dir", output], look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"the training arguments do not go together: {e}") from e
    if unknown:
        _refuse_unknown(unknown[0], parser)
    usual = {f.name: f.default for f in fields(TrainingArguments)}
    for name, remedy in REFUSED.items():
        if (value := getattr(arguments, name, None)) != usual.get(name):
            raise InputError(f"--{name} {getattr(value, 'value', value)} does not work here: {remedy}")
    return arguments


def _defaults(words: Sequence[str]) -> list[str]:
    """Where ours are not the Trainer's; all of it a user can change back."""
    ours = ["--logging_steps", "10", "--disable_tqdm", "true", "--remove_unused_columns", "false"]
    # Every parameter has a gradient in every step, and looking for others costs a pass over the graph.
    ours += ["--ddp_find_unused_parameters", "false"]
    if not torch.accelerator.is_available():
        # Naming a backend makes accelerate expect the process group that only a launcher sets up.
        launched = ["--ddp_backend", "gloo"] if "LOCAL_RANK" in os.environ else []
        return [*ours, "--use_cpu", "true", *launched]
    has_chosen = any(re.match(r"--(no[-_])?(bf16|fp16|use[-_]cpu)\b", word) for word in words)
    narrow = not has_chosen and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return [*ours, "--bf16", "true"] if narrow else ours


def _refuse_unknown(word: str, parser: ArgumentParser) -> NoReturn:
    ours = ArgumentParser(allow_abbrev=False)
    add_arguments(ours)
    known = [flag for p in (ours, parser) for action in p._actions for flag in action.option_strings]
    near = difflib.get_close_matches(word.split("=")[0], known, n=1)
    meant = f"did you mean {near[0]}?" if near else "'logitcache train --help' lists what there is"
    raise InputError(f"unknown argument {word}; {meant}")


class _Parser(ArgumentParser):
    """Errors as exceptions, without the usage of a hundred options."""

    def __init__(self, where: str) -> None:
        super().__init__(allow_abbrev=False, add_help=False)
        self._where = where

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self._where}: {message}")


class _HfParser(HfArgumentParser):  # type: ignore[misc]
    """The same for the parser that transformers makes of a dataclass."""

    def __init__(self, where: str, cls: type) -> None:
        super().__init__(cls, allow_abbrev=False, add_help=False)
        self._where = where

    def error(self, message: str) -> NoReturn:
        raise InputError(message)
