"""`logitcache build`: run the teacher over a corpus, once."""

from __future__ import annotations

import argparse
import logging
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_storage_options, storage_options

if TYPE_CHECKING:
    from logitcache_pipeline.settings import BuildSettings

_STORAGE_OPTIONS = ("storage_options", "data_storage_options")


def add_arguments(parser: ArgumentParser) -> None:
    """One option per field of `BuildSettings`; what is not given stays out of the namespace."""
    parser.argument_default = argparse.SUPPRESS
    parser.description = (
        "Run a teacher over an SFT corpus and keep its top-k log-probs, tail mass and label log-probs at every target"
        " token. The same command continues a build that was stopped."
    )
    _add_main(parser)
    _add_corpus(parser)
    _add_encoding(parser)
    _add_run(parser)
    _add_estimate(parser)


def run(args: Namespace) -> int:
    """Build; exit status 1 when more samples are quarantined than allowed."""
    from logitcache_pipeline.settings import BuildSettings
    from logitcache_storage.errors import InputError
    from logitcache_storage.record_json import parse

    config = getattr(args, "config", None)
    known = {*BuildSettings.__dataclass_fields__, *_STORAGE_OPTIONS}
    values = {**_from_file(config), **{name: value for name, value in vars(args).items() if name in known}}
    if missing := [name for name in ("teacher", "data", "cache") if not values.get(name)]:
        raise InputError(f"missing {', '.join(f'--{name}' for name in missing)}; give it here or in a --config file")
    if isinstance(values["data"], str):
        values["data"] = [values["data"]]
    options = {name: values.pop(name, None) for name in _STORAGE_OPTIONS}
    settings = parse(BuildSettings, values, where=config or "arguments")
    if getattr(args, "json", False):
        return _print_estimate(settings, **options)
    return _build(settings, **options)


def _build(settings: BuildSettings, **options: Any) -> int:
    from logitcache_pipeline.build import build
    from logitcache_pipeline.log import JsonFormatter, json_line
    from logitcache_storage.errors import LogitCacheError

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if settings.log_format == "text":
        build(settings, **options, say=say)
        return 0
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    try:
        build(settings, **options, say=say)
    except LogitCacheError as e:
        say(json_line("error", "failed", str(e), {"exit_status": e.exit_status}))
        return e.exit_status
    return 0


def _print_estimate(settings: BuildSettings, **options: Any) -> int:
    from logitcache_pipeline.build import dry_run
    from logitcache_storage.errors import InputError
    from logitcache_storage.terminal import print_json

    if not settings.dry_run:
        raise InputError("--json prints the estimate of --dry-run; for the lines of a build: --log-format json")
    print_json(dry_run(settings, **options))
    return 0


def _from_file(path: str | None) -> dict[str, Any]:
    """Options from a YAML file, under the names of the command line's, with '-' or '_'."""
    from logitcache_storage.errors import InputError

    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise InputError(f"{path}: not a readable YAML file: {e}") from e
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected options such as 'k: 64', found {type(found).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in found.items()}
    for name in _STORAGE_OPTIONS:
        if not isinstance(values.get(name, {}), dict):
            raise InputError(f"{path}: {name}: expected a mapping, found {type(values[name]).__name__}")
    return values


def _add_main(parser: ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="PATH_OR_ID", help="model folder or hub id")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the teacher, here and in every worker: read it first",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE_OR_URL",
        help="JSONL (also .gz, .zst), Parquet, a saved Hugging Face dataset or a dataset name; patterns are welcome",
    )
    parser.add_argument("--cache", metavar="URL", help="where the cache goes: a folder, or any URL that fsspec knows")
    parser.add_argument(
        "--k",
        type=int,
        metavar="N",
        help="log-probs kept per target token (64); 0, with --role reference: the label's alone",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    parser.add_argument(
        "--extend", action="store_true", help="add the data to the cache that is there, behind what it holds"
    )
    parser.add_argument("--log-format", choices=["text", "json"], help="lines for people, or JSON objects (text)")
    parser.add_argument("--engine", metavar="NAME", help="what runs the teacher: transformers (the default) or vllm")
    parser.add_argument(
        "--role", choices=["teacher", "reference"], help="what the cache is for (teacher); reference: also old policies"
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16 (auto: bfloat16 on GPUs, float32 on CPUs)"
    )
    add_storage_options(parser)
    parser.add_argument(
        "--data-storage-options", metavar="JSON", type=storage_options, help="the same for the corpus's URLs"
    )


def _add_corpus(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("corpus")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens per sample (as many as the teacher takes)")
    group.add_argument(
        "--overlong", choices=["truncate", "skip", "refuse"], help="what to do with longer samples (truncate)"
    )
    group.add_argument("--prompt-field", metavar="NAME", help="field of the prompt, with --response-field")
    group.add_argument("--response-field", metavar="NAME", help="field of the response")


def _add_encoding(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--kept-mass",
        type=float,
        metavar="P",
        help="keep the smallest set of ids with this mass, at most k (1.0)",
    )
    group.add_argument("--precision", choices=["u8", "u10", "fp16", "fp32"], help="how log-probs are stored (u8)")
    group.add_argument("--format", choices=["zarr", "arrow"], help="container of a shard (zarr)")
    group.add_argument("--shard-rows", type=int, metavar="N", help="target tokens per shard (4,096 to 131,072)")


def _add_run(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("workers")
    group.add_argument("--workers", type=int, metavar="N", help="Ray actors (one per GPU; one on CPUs)")
    group.add_argument("--gpus-per-worker", type=float, metavar="F", help="may be a fraction (1 where there are GPUs)")
    group.add_argument("--tensor-parallel", type=int, metavar="N", help="GPUs that share one model, with vllm (1)")
    group.add_argument("--nodes-per-worker", type=int, metavar="N", help="nodes that these GPUs are spread over (1)")
    group.add_argument(
        "--engine-options", metavar="JSON", type=storage_options, help="for the engine, e.g. vLLM's max_model_len"
    )
    group.add_argument("--ray-address", metavar="A", help="a running cluster, e.g. auto or HOST:6379 (a local one)")
    group.add_argument(
        "--tokens-per-batch", type=int, metavar="N", help="tokens the teacher sees at once (16,384; 1,024 on CPUs)"
    )
    group.add_argument(
        "--compile", action="store_true", help="put the teacher through torch.compile: takes minutes, pays in long runs"
    )
    group.add_argument(
        "--max-attempts", type=int, metavar="N", help="attempts at a shard before its samples are tried apart (3)"
    )
    group.add_argument(
        "--shard-deadline",
        type=float,
        metavar="SECONDS",
        help="an attempt that takes longer is killed (20x the slowest)",
    )
    group.add_argument(
        "--start-deadline",
        type=float,
        metavar="SECONDS",
        help="a worker that loads the teacher for longer is killed (7,200)",
    )
    group.add_argument(
        "--allow-quarantine", type=int, metavar="N", help="samples that may be lost without exit status 1 (0)"
    )
    group.add_argument(
        "--retry-quarantine",
        action="store_true",
        help="score the shards again from which single samples were left out",
    )


def _add_estimate(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("before the build")
    group.add_argument("--dry-run", action="store_true", help="plan, say what it will take, and write nothing")
    group.add_argument(
        "--sample-rows",
        type=int,
        metavar="N",
        help="target tokens scored here to estimate bytes; 0: none (2,000; none with a teacher above 2 GB)",
    )
    group.add_argument(
        "--calibrate", type=float, metavar="SECONDS", help="score for so long here, for the rate and the hours"
    )
    group.add_argument("--price-per-gpu-hour", type=float, metavar="F", help="for the cost, with --calibrate")
    group.add_argument("--json", action="store_true", help="print the estimate as JSON")


COMMAND = Command("run the teacher over a corpus and keep what it thinks", add_arguments, run)
