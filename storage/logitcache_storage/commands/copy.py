"""`logitcache copy`: a cache to another place, checked on the way."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument
from logitcache_storage.commands.second_store import add_second_options, second_options

if TYPE_CHECKING:
    from logitcache_storage.copying import CopyReport
    from logitcache_storage.terminal import Facts

MAX_SHOWN = 20


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache copy`."""
    parser.epilog = (
        "Every block is checked against its checksum before it is written. Only what is committed travels. After an"
        " interruption, run the same again; until the copy is done, its URL holds no cache that could be opened."
        " Example: logitcache copy ./cache s3://bucket/cache"
    )
    add_cache_argument(parser, help="the cache")
    parser.add_argument("target", metavar="TARGET", help="where the copy goes: nothing, or an earlier copy of it")
    add_second_options(parser, "--storage-options-to", of="TARGET")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read what is at the target already, and copy again what is damaged; without, the right size is enough",
    )
    parser.add_argument(
        "--skip-damaged",
        action="store_true",
        help="leave out shards that are damaged at the source, instead of stopping; 'logitcache build' on the copy"
        " scores them again",
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")


def run(args: Namespace) -> int:
    """Copy and say what was copied; 1 where shards were left out."""
    from dataclasses import asdict

    from logitcache_storage.copying import copy_cache
    from logitcache_storage.objects import open_store
    from logitcache_storage.terminal import facts_table, open_console, print_json, show

    options = second_options(args.url, args.storage_options, args.target, args.storage_options_to)
    report = copy_cache(
        open_store(args.url, args.storage_options),
        open_store(args.target, options),
        check=args.check,
        skip_damaged=args.skip_damaged,
        quiet=False,
    )
    if args.json:
        print_json(asdict(report))
    else:
        show(open_console(), facts_table(_facts(report)))
    return 1 if report.damaged else 0


COMMAND = Command("copy a cache to another place, checked on the way; continues where it stopped", add_arguments, run)


def _facts(report: CopyReport) -> Facts:
    from logitcache_storage.terminal import format_bytes

    unfinished = "" if report.is_complete else ", not all that are planned"
    facts = [
        ("from", report.source),
        ("to", report.target),
        ("shards", f"{report.num_shards:,}{unfinished}"),
        ("copied", f"{report.num_objects:,} objects, {format_bytes(report.num_bytes)}"),
    ]
    if report.num_objects_there:
        facts.append(("there", f"{report.num_objects_there:,} objects, {format_bytes(report.num_bytes_there)}"))
    for shard, problem in list(report.damaged.items())[:MAX_SHOWN]:
        facts.append(("left out", f"shard {shard}: {problem}"))
    if len(report.damaged) > MAX_SHOWN:
        facts.append(("", f"and {len(report.damaged) - MAX_SHOWN:,} more (--json lists all)"))
    return facts
