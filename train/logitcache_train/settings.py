"""What a user asked `logitcache train` for: command line and YAML file, checked, as one frozen value."""

from __future__ import annotations

import difflib
import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from logitcache_storage.errors import InputError
from logitcache_train.argument_checks import check_arguments
from logitcache_train.collate import EQUALLY, Mixing
from logitcache_train.commands.train import add_arguments, parameter_names
from logitcache_train.custom import objective_from_mapping, read_parameters
from logitcache_train.held_out import check_metric
from logitcache_train.joining import Missing
from logitcache_train.lora import ALL_LINEAR, LoraSettings
from logitcache_train.mixture import check_mixture
from logitcache_train.objectives import ROLES, Objective, objective
from logitcache_train.student import Packing

DEFAULT_WINDOW_SHARDS = 8

DEFAULT_LOCAL_CACHE_BYTES = 100 * 10**9

COMMA_SEPARATED = ("mix_weights", "lora_targets")
"""Options of several values in one word."""

REFUSED = {
    "label_smoothing_factor": "use --objective label_smoothing",
    "dataloader_drop_last": "every sample of an epoch is trained on, in batches of about equal tokens",
    "auto_find_batch_size": "set --batch_tokens or --gradient_accumulation_steps",
    "use_liger_kernel": "the loss is fused already",
    "torch_compile": "the fused loss cannot be traced",
    "ignore_data_skip": "resuming reads nothing twice, and without skipping it would train on the wrong samples",
    "train_sampling_strategy": "micro-batches are of similar length already",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "deepspeed": "use DDP (torchrun) or --fsdp",
}
"""Fields of TrainingArguments that would be ignored or do harm, and what to do instead."""


@dataclass(frozen=True)
class TrainSettings:
    """One training run."""

    student: str
    """Folder or hub id."""
    caches: Mapping[str, tuple[str, ...]]
    """Role to URLs, at least one; the first says which samples there are."""
    objective: Objective
    """With the optional roles that are given among those that it needs, and without the others."""
    arguments: TrainingArguments
    """The Trainer's."""
    objective_row: Mapping[str, Any] | None = None
    """The mapping that the objective was made of, where it is a user's own."""
    eval_caches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role to URLs of what is evaluated on; none: nothing is."""
    mixing: Mixing = EQUALLY
    """Of several teachers."""
    missing: Missing = "error"
    """What to do with samples that one of the caches lacks."""
    allow_partial: bool = False
    """Train on what there is of a cache whose build has not ended."""
    lora: LoraSettings | None = None
    batch_tokens: int | None = None
    """Input tokens of a global batch; None: see `run.resolve_batch_tokens`."""
    window_shards: int = DEFAULT_WINDOW_SHARDS
    """Shards of a shuffle window."""
    packing: Packing = "auto"
    dtype: str = "float32"
    attn_implementation: str | None = None
    columns: tuple[str, ...] = ()
    """Files with per-target data, see `ColumnFiles`."""
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    local_cache: str | None = None
    """Folder on a local disk for what is read of the caches; None: they are read in place."""
    local_cache_bytes: int | None = None
    """Bound of that folder; None: `DEFAULT_LOCAL_CACHE_BYTES`."""

    def __post_init__(self) -> None:
        if self.local_cache_bytes is not None and self.local_cache is None:
            raise InputError("--local_cache_bytes bounds the folder of --local_cache; add --local_cache DIR")
        for name in ("batch_tokens", "window_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        student = Path(self.student).expanduser()
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"--output {self.output} is a file, expected a folder for the student")
        if student.is_dir() and self.output.is_dir() and student.samefile(self.output):
            raise InputError(
                f"--output {self.output} is the student, which would be written over; choose another folder"
            )

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
    obj, rest = _objective(own, rest)
    caches, eval_caches = (parse_caches(own[name] or [], obj, option=f"--{name}") for name in ("cache", "eval_cache"))
    given = tuple(role for role in obj.optional_roles if role in caches)
    obj = replace(obj, label_roles=(*obj.label_roles, *given), optional_roles=())
    optional = (
        "batch_tokens",
        "window_shards",
        "packing",
        "dtype",
        "attn_implementation",
        "storage_options",
        "missing",
        "local_cache",
        "local_cache_bytes",
    )
    return TrainSettings(
        student=own["student"],
        caches=caches,
        objective=obj,
        objective_row=own["objective"] if isinstance(own["objective"], dict) else None,
        arguments=_training_arguments(rest, own["output"], eval_caches),
        eval_caches=eval_caches,
        allow_partial=own["allow_partial"] == "true",
        columns=tuple(own["columns"] or ()),
        mixing=_mixing(own, caches, obj),
        lora=_lora(own),
        **{name: own[name] for name in optional if own[name] is not None},
    )


def parse_caches(words: Sequence[str], obj: Objective, *, option: str = "--cache") -> dict[str, tuple[str, ...]]:
    """`URL` or `ROLE=URL` of each cache as role to URLs; a URL without a role has the first that the objective needs.

    Raises:
        InputError: an unknown role, or two caches of one role other than teacher.
    """
    caches: dict[str, tuple[str, ...]] = {}
    for word in words:
        named = re.fullmatch(r"(\w+)=(.+)", word)
        role, url = (named[1], named[2]) if named else ((*obj.roles, *ROLES)[0], word)
        if role not in ROLES:
            raise InputError(
                f"{option} {word}: unknown role {role!r}; choose from {', '.join(ROLES)}, as in teacher=URL"
            )
        if role in caches and role != "teacher":
            raise InputError(
                f"{option}: two {role} caches, {caches[role][0]} and {url}; only teachers are mixed,"
                " so give each its role, as in teacher=URL"
            )
        caches[role] = (*caches.get(role, ()), url)
    return caches


def _objective(own: Mapping[str, Any], rest: list[str]) -> tuple[Objective, list[str]]:
    """The objective with its parameters, and the words that are left."""
    parameters = {name: own[name] for name in parameter_names() if own[name] is not None}
    extrapolate = own["extrapolate"] == "true"
    if not isinstance(own["objective"], dict):
        return objective(own["objective"], extrapolate=extrapolate, **parameters), rest
    row = objective_from_mapping(own["objective"])
    names = row.parameters.keys() - set(parameter_names())
    if taken := sorted(names & {*own, *(f.name for f in fields(TrainingArguments))}):
        raise InputError(
            f"objective {row.name!r} has a parameter {taken[0]!r}, and --{taken[0]} is an option of 'logitcache train';"
            " give the parameter another name"
        )
    found, rest = read_parameters(names, rest)
    return row.with_parameters(extrapolate=extrapolate, **parameters, **found), rest


def _mixing(own: Mapping[str, Any], caches: Mapping[str, Sequence[str]], obj: Objective) -> Mixing:
    teachers = caches.get("teacher", ())
    for name in ("mix", "mix_weights"):
        if own[name] is not None and len(teachers) < 2:
            raise InputError(
                f"--{name} mixes several teachers, and there {'is' if len(teachers) == 1 else 'are'} {len(teachers)};"
                " add --cache teacher=URL for each"
            )
    mean = own["mix"] or EQUALLY.mean
    if mean == "geometric" and "teacher" in obj.label_roles and len(teachers) > 1:
        raise InputError(
            f"objective {obj.name!r} reads the label's log-prob in the teacher's cache, which a geometric mean of"
            " teachers does not have; use --mix arithmetic"
        )
    if own["mix_weights"] is None:
        return Mixing(mean)
    try:
        weights = check_mixture([float(word) for word in own["mix_weights"].split(",")], mean)
    except ValueError as e:
        raise InputError(f"--mix_weights {own['mix_weights']}: {e}; give numbers, as in 0.7,0.3") from e
    if len(weights) != len(teachers):
        raise InputError(
            f"--mix_weights {own['mix_weights']}: {len(weights)} weights for {len(teachers)} teachers;"
            " give one for each"
        )
    return Mixing(mean, weights)


def _lora(own: Mapping[str, Any]) -> LoraSettings | None:
    given = {name: own[f"lora_{name}"] for name in ("rank", "alpha", "dropout", "targets")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and "rank" not in given:
        raise InputError(f"--lora_{next(iter(given))} needs --lora_rank, which turns adapters on")
    if given.get("targets", ALL_LINEAR) != ALL_LINEAR:
        given["targets"] = tuple(given["targets"].split(","))
    return LoraSettings(**given) if given else None


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
    row = values.pop("objective") if isinstance(values.get("objective"), dict) else None
    words = [word for name, value in values.items() for word in _words(str(name), value)]
    own, rest = parser.parse_known_args(words)
    if own.config is not None:
        raise InputError(f"--config {path}: names another configuration file; give one file only")
    return vars(own) | ({} if row is None else {"objective": row}), rest


def _words(name: str, value: Any) -> list[str]:
    """One entry of a configuration file as it would stand on a command line."""
    if value is None:
        return []
    flag, name = f"--{name}", name.replace("-", "_")
    # `on`, `off` and `no` are booleans to YAML.
    if isinstance(value, bool) and name == "packing":
        value = "on" if value else "off"
    elif value is False and name.endswith("_strategy"):
        value = "no"
    if name in ("cache", "eval_cache"):
        roles = value.items() if isinstance(value, dict) else [("", value)]
        urls = [(role, url) for role, several in roles for url in (several if isinstance(several, list) else [several])]
        return [word for role, url in urls for word in (flag, f"{role}={url}" if role else str(url))]
    if name == "columns":
        return [word for path in (value if isinstance(value, list) else [value]) for word in (flag, str(path))]
    if isinstance(value, list):
        return [flag, ",".join(map(str, value))] if name in COMMA_SEPARATED else [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict | bool) else str(value)]


def _training_arguments(words: Sequence[str], output: str, eval_caches: Mapping[str, Any]) -> TrainingArguments:
    parser = _HfParser("logitcache train", TrainingArguments)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            [*_defaults(words), *(["--eval_strategy", "epoch"] if eval_caches else []), *words, "--output_dir", output],
            look_for_args_file=False,
            return_remaining_strings=True,
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
    check_arguments(arguments)
    if arguments.fsdp:
        _check_fsdp(arguments)
    _check_evaluation(arguments, eval_caches)
    # The Trainer takes every metric for better the greater it is, but for names that end in "loss".
    if arguments.greater_is_better and not any(re.match("--greater[-_]is[-_]better", word) for word in words):
        arguments.greater_is_better = arguments.metric_for_best_model.removeprefix("eval_") not in ("nll", "kl")
    return arguments


def _check_fsdp(arguments: TrainingArguments) -> None:
    if "LOCAL_RANK" not in os.environ:
        raise InputError("--fsdp shards a model over processes: torchrun --nproc_per_node N -m logitcache_train ...")
    if str((arguments.fsdp_config or {}).get("cpu_ram_efficient_loading", False)).lower() == "true":
        raise InputError(
            "--fsdp_config cpu_ram_efficient_loading: only one rank of a node would have the student's weights, and all"
            " of them try the student out before the first step; leave it out"
        )


def _check_evaluation(arguments: TrainingArguments, eval_caches: Mapping[str, Any]) -> None:
    evaluates = arguments.eval_strategy != "no" or arguments.eval_on_start
    if evaluates and not eval_caches:
        raise InputError("to evaluate while training takes held-out data: add --eval_cache URL")
    if eval_caches and not evaluates:
        raise InputError(
            "--eval_cache is never looked at with --eval_strategy no; use epoch, or steps with --eval_steps"
        )
    if evaluates:
        check_metric(arguments.metric_for_best_model, tuple(eval_caches))


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
    near = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("-") else []
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
