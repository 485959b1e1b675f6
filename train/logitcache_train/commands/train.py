"""`logitcache train`: a student from a cache."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_storage_options
from logitcache_train.objectives import OBJECTIVES
from logitcache_train.ranks import is_said_by_another, say_errors_once


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache train`; everything else goes to transformers' TrainingArguments.

    Every default is None, so that a configuration file can tell what the command line leaves open.
    """
    parser.usage = (
        "%(prog)s --student PATH --cache [ROLE=]URL --objective NAME --output DIR"
        " [options] [--any_training_argument VALUE]"
    )
    parser.epilog = (
        "Any field of transformers.TrainingArguments is an option, too: --learning_rate 1e-4 --num_train_epochs 2"
        " --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --resume_from_checkpoint true"
        " (or auto: go on if there is one). On several devices: torchrun --nproc_per_node N -m logitcache_train, with"
        " the same arguments."
    )
    parser.add_argument(
        "--student", metavar="PATH_OR_ID", help="the causal language model to train, a folder or a name on the hub"
    )
    parser.add_argument(
        "--cache",
        metavar="[ROLE=]URL",
        action="append",
        help="where a cache is; with several, each with its role: teacher or reference; several teachers are mixed",
    )
    parser.add_argument(
        "--objective",
        metavar="NAME",
        help="what to train for; 'logitcache objectives' lists them all; in FILE.yaml also a row of your own",
    )
    parser.add_argument(
        "--output", "--output_dir", "--output-dir", metavar="DIR", help="where the student and its checkpoints go"
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="these arguments as a YAML mapping; the command line wins"
    )
    _add_caches(parser)
    _add_how(parser)
    _add_lora(parser)
    add_storage_options(parser)
    group = parser.add_argument_group("parameters of objectives (defaults: their papers')")
    for name in parameter_names():
        owners = ", ".join(row.name for row in OBJECTIVES.values() if name in row.parameters)
        _add(group, name, type=float, metavar="F", help=f"of {owners}")
    group.add_argument(
        "--extrapolate",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help="let eta leave [0, 1] (default: false)",
    )


def parameter_names() -> list[str]:
    """Every parameter that some objective has, sorted."""
    return sorted({name for row in OBJECTIVES.values() for name in row.parameters})


def run(args: Namespace) -> int:
    """Train; errors leave as exceptions, but for those that another rank says."""
    from logitcache_storage.errors import LogitCacheError
    from logitcache_train.run import train
    from logitcache_train.settings import parse_settings

    try:
        train(parse_settings(args))
    except LogitCacheError as e:
        if is_said_by_another(str(e)):
            return e.exit_status
        raise
    return 0


def _add_arguments_of_ranks(parser: ArgumentParser) -> None:
    add_arguments(parser)
    say_errors_once(parser)


COMMAND = Command("train a student from a cache", _add_arguments_of_ranks, run, takes_rest=True)


def _add_caches(parser: ArgumentParser) -> None:
    """How several caches go together, and what to evaluate on."""
    _add(parser, "mix", choices=("arithmetic", "geometric"), help="mean of several teachers (default: arithmetic)")
    _add(parser, "mix_weights", metavar="F,F,...", help="weight of each teacher, in order (default: equal)")
    _add(
        parser,
        "missing",
        choices=("error", "drop"),
        help="what to do with samples that one of the caches lacks: refuse (default), or train without them",
    )
    _add(
        parser,
        "allow_partial",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help=(
            "train on the samples that are there of a cache whose build has not ended, or has lost some (default:"
            " false); what comes later is not trained on, also not by a run that is resumed"
        ),
    )
    _add(
        parser,
        "columns",
        metavar="FILE.parquet",
        action="append",
        help=(
            "columns of numbers by sample key, one number for each token or target, besides those of the corpus, as"
            " 'logitcache doubtful --columns' writes them; for critical_tokens and objectives of your own"
        ),
    )
    _add(
        parser,
        "eval_cache",
        metavar="[ROLE=]URL",
        action="append",
        help=(
            "held-out cache, to evaluate on: loss, NLL and, with a teacher cache, KL and top-1 agreement; when, say"
            " --eval_strategy (default with this option: epoch), --eval_steps and --eval_on_start"
        ),
    )


def byte_count(text: str) -> int:
    """`200GB`, `1.5TB` or `5000000` as bytes, in powers of 1,000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|K|M|G|T|P)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ArgumentTypeError(f"expected bytes, as in 200GB; found {text!r}")
    return int(float(found[1]) * 1000 ** ("", "K", "M", "G", "T", "P").index(found[2].upper()))


def _add_lora(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("low-rank adapters (LoRA, by peft)")
    _add(group, "lora_rank", type=int, metavar="N", help="train adapters of this rank, and nothing else")
    _add(group, "lora_alpha", type=float, metavar="F", help="their factor times N (default: 2 N)")
    _add(group, "lora_dropout", type=float, metavar="F", help="on their input (default: 0)")
    _add(
        group, "lora_targets", metavar="NAME,...", help="layers that get one, as in q_proj,v_proj (default: all-linear)"
    )


def _add_how(parser: ArgumentParser) -> None:
    """How samples are batched and the student is loaded."""
    _add(
        parser,
        "batch_tokens",
        type=int,
        metavar="N",
        help=(
            "input tokens of an optimizer step, over all devices and accumulation steps (default: as many as"
            " per_device_train_batch_size * devices * gradient_accumulation_steps mean samples have)"
        ),
    )
    _add(parser, "window_shards", type=int, metavar="N", help="shuffle within windows of so many shards (default: 8)")
    _add(
        parser,
        "packing",
        choices=("auto", "on", "off"),
        help=(
            "put samples behind each other instead of padding them; auto (default): where attention of variable length"
            " keeps them apart"
        ),
    )
    _add(
        parser,
        "dtype",
        choices=("float32", "bfloat16", "float16"),
        help=("of the weights (default: float32; on a GPU the arithmetic is bfloat16 all the same, see --bf16)"),
    )
    _add(
        parser,
        "local_cache",
        metavar="DIR",
        help="folder on a local disk for what is read of remote caches: read ahead, and once for all devices of a node",
    )
    _add(parser, "local_cache_bytes", type=byte_count, metavar="SIZE", help="bound of that folder (default: 100GB)")
    _add(parser, "attn_implementation", metavar="NAME", help="transformers' attention, e.g. sdpa, flash_attention_2")


def _add(parser: object, name: str, **kwargs: object) -> None:
    """An option in both spellings, --with_underscores and --with-hyphens."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*spellings, **kwargs)  # type: ignore[attr-defined]
