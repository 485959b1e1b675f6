"""`logitcache gc`: what stands below a cache and belongs to nothing."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument

if TYPE_CHECKING:
    from logitcache_storage.garbage import Garbage, GarbageReport
    from logitcache_storage.terminal import Facts

MAX_SHOWN = 20
DEFAULT_HOURS = 24.0

_KINDS = {
    "attempt": "objects that no record lists",
    "superseded": "records of shards that were scored since",
    "temporary": "unfinished local files",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache gc`."""
    parser.epilog = (
        "Without --yes nothing is deleted. What a record lists, and what is not named like an object of a cache, is"
        " never deleted. Example: logitcache gc s3://bucket/cache --yes"
    )
    add_cache_argument(parser)
    parser.add_argument("--yes", action="store_true", help="delete what was found")
    parser.add_argument(
        "--older-than",
        metavar="HOURS",
        type=_hours,
        default=DEFAULT_HOURS,
        help="leave alone what was written later, a running build may need it (default 24); 0 where no build runs",
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")


def run(args: Namespace) -> int:
    """Print what was found; delete it with --yes."""
    from logitcache_storage.garbage import delete_garbage, find_garbage
    from logitcache_storage.terminal import facts_table, open_console, print_json, show
    from logitcache_storage.visible import printable

    report = find_garbage(args.url, args.storage_options, older_than_hours=args.older_than, quiet=False)
    if args.yes:
        delete_garbage(report, args.storage_options, quiet=False)
    if args.json:
        print_json(_data(report, args.yes))
    else:
        show(open_console(), printable(report.url), facts_table(_facts(report)), *_lines(report, args.yes))
    return 0


COMMAND = Command("list what belongs to no plan and no shard, and delete it with --yes", add_arguments, run)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not (math.isfinite(hours) and hours >= 0):
        raise ArgumentTypeError(f"expected a number of hours, 0 or more, found {text!r}")
    return hours


def _data(report: GarbageReport, deleted: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(report), "deleted": deleted, "bytes": sum(item.size for item in report.garbage)}


def _facts(report: GarbageReport) -> Facts:
    from logitcache_storage.terminal import format_bytes

    def amount(items: tuple[Garbage, ...] | list[Garbage]) -> str:
        return f"{len(items):,}, {format_bytes(sum(item.size for item in items))}"

    facts = [("kept", f"{report.num_kept:,} objects of the cache")]
    for kind, name in _KINDS.items():
        if found := [item for item in report.garbage if item.kind == kind]:
            facts.append(("garbage", f"{amount(found)}: {name}"))
    if not report.garbage:
        facts.append(("garbage", "none"))
    if report.recent:
        age = f"younger than {report.older_than_hours:g} h, or of unknown age; --older-than 0 where no build runs"
        facts.append(("left alone", f"{amount(report.recent)}: {age}"))
    if report.foreign:
        facts.append(("not ours", f"{len(report.foreign):,}, left alone: {_some(report.foreign)}"))
    return facts


def _lines(report: GarbageReport, deleted: bool) -> list[str]:
    from logitcache_storage.visible import printable

    if not report.garbage:
        return []
    lines = ["", *(printable(f"  {item.path}") for item in report.garbage[:MAX_SHOWN])]
    if len(report.garbage) > MAX_SHOWN:
        lines.append(f"  and {len(report.garbage) - MAX_SHOWN:,} more (--json lists all)")
    done = "All of it is deleted." if deleted else "Nothing is deleted yet: run the same with --yes."
    return [*lines, "", done]


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
