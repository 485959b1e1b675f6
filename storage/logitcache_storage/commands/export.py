"""`logitcache export`: a cache as plain Parquet, for other tools."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument
from logitcache_storage.commands.second_store import add_second_options, second_options

if TYPE_CHECKING:
    from logitcache_storage.export import ExportReport
    from logitcache_storage.terminal import Facts

LAYOUT_NAMES = ("parquet", "axolotl")


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache export`."""
    parser.epilog = (
        "parquet: everything, one row per sample, one list entry per target token. axolotl: the columns that Axolotl's"
        " KD plugin reads, one row per sample, k entries per token; the mass outside the kept ids cannot be told to"
        " it. Example: logitcache export ./cache --to axolotl --output ./kd-data"
    )
    add_cache_argument(parser, help="the cache")
    parser.add_argument("--to", choices=LAYOUT_NAMES, required=True, help="the layout of the columns")
    parser.add_argument("--output", metavar="URL", required=True, help="where the files go: an empty folder or prefix")
    add_second_options(parser, "--storage-options-to", of="--output")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier export")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON document")


def run(args: Namespace) -> int:
    """Export, and say what was written and how to use it."""
    from dataclasses import asdict

    from logitcache_storage.cache import Cache
    from logitcache_storage.export import export_cache
    from logitcache_storage.objects import open_store
    from logitcache_storage.terminal import facts_table, open_console, print_json, show

    cache = Cache.open(args.url, args.storage_options)
    options = second_options(args.url, args.storage_options, args.output, args.storage_options_to)
    report = export_cache(cache, open_store(args.output, options), args.to, overwrite=args.overwrite, quiet=False)
    if args.json:
        print_json(asdict(report))
    else:
        show(open_console(), facts_table(_facts(report)), *(_axolotl(report) if args.to == "axolotl" else ()))
    return 0


COMMAND = Command("write a cache as flat Parquet, or in the columns of Axolotl's KD plugin", add_arguments, run)


def _facts(report: ExportReport) -> Facts:
    from logitcache_storage.terminal import format_bytes

    files = f"{report.files[0]}" if len(report.files) == 1 else f"{report.files[0]} to {report.files[-1]}"
    facts = [
        ("from", report.url),
        ("to", report.output),
        ("samples", f"{report.num_samples:,}, {report.num_rows:,} target tokens"),
        ("files", f"{files}, {format_bytes(report.num_bytes)}"),
    ]
    if not report.is_complete:
        facts.append(("unfinished", "the cache is still being built; what is not committed is not exported"))
    return facts


def _axolotl(report: ExportReport) -> list[str]:
    """The lines of a configuration that belong to these files."""
    import json

    full = str(report.kept_in_full).lower()
    return [
        "",
        "In the Axolotl configuration:",
        "",
        "plugins:",
        "  - axolotl.integrations.kd.KDPlugin",
        "kd_trainer: true",
        "kd_temperature: 1.0  # what the log-probs were written at",
        f"kd_normalize_topk: {full}" + ("" if report.kept_in_full else "  # rows keep different numbers of ids"),
        f"sequence_len: {report.longest}  # the longest sample",
        "skip_prepare_dataset: true  # tokens, labels and targets are there",
        "datasets:",
        f"  - path: {json.dumps(report.output)}",
        "    ds_type: parquet",
        "    type:",
    ]
