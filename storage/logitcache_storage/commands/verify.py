"""`logitcache verify`: is every byte of a cache what was committed?"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument

if TYPE_CHECKING:
    from logitcache_storage.terminal import Facts
    from logitcache_storage.verify import VerifyReport

MAX_SHOWN = 50
MAX_NAMED = 5


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache verify`."""
    parser.epilog = (
        "Exit status: 1 on damage; 0 when nothing is damaged, also where the build is unfinished or shards"
        " are in quarantine."
    )
    add_cache_argument(parser)
    parser.add_argument(
        "--deep", action="store_true", help="decode everything as well, and check that the rows make sense"
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")


def run(args: Namespace) -> int:
    """Check the cache and print the report; 1 on damage."""
    from logitcache_storage.terminal import facts_table, open_console, print_json, show
    from logitcache_storage.verify import verify_cache
    from logitcache_storage.visible import printable

    report = verify_cache(args.url, deep=args.deep, storage_options=args.storage_options, quiet=False)
    if args.json:
        print_json(_data(report))
    else:
        show(open_console(), printable(report.url), facts_table(_facts(report)), *_damage_lines(report))
    return 0 if report.is_intact else 1


COMMAND = Command("check every object against its checksum; --deep decodes and checks every row", add_arguments, run)


def _data(report: VerifyReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "url": report.url,
        "deep": report.is_deep,
        "intact": report.is_intact,
        "planned_shards": report.num_planned_shards,
        "committed_shards": report.num_shards,
        "rows": report.num_rows,
        "objects": report.num_objects,
        "bytes": report.num_bytes,
        "damage": [asdict(found) for found in report.damage],
        "quarantine": [asdict(record) for record in report.quarantine],
    }


def _facts(report: VerifyReport) -> Facts:
    from logitcache_storage.terminal import format_bytes

    how = "checksums and every row" if report.is_deep else "checksums; --deep checks the rows too"
    facts = [
        ("checked", how),
        ("good", f"{report.num_objects:,} objects, {format_bytes(report.num_bytes)}"),
        (
            "shards",
            f"{report.num_shards:,} of {report.num_planned_shards:,}, {report.num_rows:,} target rows",
        ),
    ]
    for record in report.quarantine[:MAX_SHOWN]:
        last = record.reasons[-1] if record.reasons else "no reason recorded"
        facts.append(("quarantine", f"shard {record.shard} after {record.attempts} attempts: {last}"))
    return [*facts, ("damage", "none" if report.is_intact else f"{len(report.damage):,} objects")]


def _damage_lines(report: VerifyReport) -> list[str]:
    from logitcache_storage.commit import MANIFEST_PATH, commit_path
    from logitcache_storage.visible import printable

    lines = [printable(f"  {found.path}: {found.problem}") for found in report.damage[:MAX_SHOWN]]
    if len(report.damage) > MAX_SHOWN:
        lines.append(f"  and {len(report.damage) - MAX_SHOWN:,} more (--json lists all)")
    shards = sorted({found.shard for found in report.damage if found.shard is not None})
    if shards:
        records = ", ".join(commit_path(shard) for shard in shards[:MAX_NAMED])
        others = f" and {len(shards) - MAX_NAMED:,} others" if len(shards) > MAX_NAMED else ""
        lines.append(
            f"To score {len(shards):,} damaged shard{'s' * (len(shards) > 1)} again, remove {MANIFEST_PATH}"
            f" and {records}{others}, and run the same 'logitcache build' again."
        )
    if any(found.shard is None for found in report.damage):
        lines.append("What belongs to no shard cannot be scored again: restore it from a copy, or build a new cache.")
    return lines
