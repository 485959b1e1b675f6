"""`logitcache status`: how far a build is, and what could not be scored."""

from __future__ import annotations

import datetime
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument

if TYPE_CHECKING:
    from logitcache_storage.status import BuildStatus
    from logitcache_storage.terminal import Facts

MAX_SHOWN = 20


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache status`."""
    parser.epilog = "Exit status: 0, also while the build is unfinished; 1 when samples or shards are in quarantine."
    add_cache_argument(parser)
    parser.add_argument("--json", action="store_true", help="the same as one JSON document")


def run(args: Namespace) -> int:
    """Print the status; 1 when samples or shards are in quarantine."""
    from logitcache_storage.objects import open_store
    from logitcache_storage.status import build_status, status_data
    from logitcache_storage.terminal import facts_table, identity_facts, open_console, print_json, show
    from logitcache_storage.visible import printable

    status = build_status(open_store(args.url, args.storage_options))
    if args.json:
        print_json(status_data(status))
    else:
        facts = [*identity_facts(status.identity), *_progress(status), *_quarantine(status)]
        show(open_console(), printable(status.url), facts_table(facts))
    return 1 if status.quarantine or status.excluded else 0


COMMAND = Command("show how far a build is, its rate and time left, and what is in quarantine", add_arguments, run)


def _progress(status: BuildStatus) -> Facts:
    from logitcache_storage.terminal import format_bytes, format_duration

    plan = status.plan
    if plan is None:
        return [("build", "has not written its plan yet; let it run, or run it again to continue")]
    facts = [("build", _state(status))]
    for name, done, planned in (
        ("shards", status.num_shards, len(plan.shard_num_rows)),
        ("target rows", status.num_rows, plan.num_rows),
        ("samples", status.num_samples, plan.num_samples),
    ):
        share = f" ({done / planned:.1%})" if done < planned else ""
        facts.append((name, f"{done:,} of {planned:,}{share}"))
    if status.num_rows:
        per_row = status.num_bytes / status.num_rows
        facts.append(("size", f"{format_bytes(status.num_bytes)}, {per_row:.1f} bytes per target token"))
    if (rate := status.rows_per_second) is not None:
        facts.append(("rate", f"{rate:,.0f} target tokens/s while workers were scoring"))
    if status.last_commit is not None:
        ago = (datetime.datetime.now(datetime.UTC) - status.last_commit).total_seconds()
        when = f"{status.last_commit:%Y-%m-%d %H:%M:%S} UTC, {format_duration(max(ago, 0))} ago"
        facts.append(("last commit", when))
    return facts + _plan_report(plan.report)


def _state(status: BuildStatus) -> str:
    from logitcache_storage.excluded import num_excluded
    from logitcache_storage.terminal import counted, format_duration

    if status.is_complete:
        lost = num_excluded(status.excluded)
        return f"complete but for {counted(lost, 'sample')}" if lost else "complete"
    left = status.seconds_left
    return "unfinished" + ("" if left is None else f", {format_duration(left)} left at the rate so far")


def _plan_report(report: dict[str, Any]) -> Facts:
    """What the plan counted and where it has examples; zeros say nothing and are left out."""
    examples = report.get("examples")
    facts = []
    for name, value in report.items():
        if isinstance(value, int | float | str) and value and name not in ("samples", "rows"):
            listed = examples.get(name) if isinstance(examples, dict) else None
            such_as = f" (e.g. {', '.join(map(str, listed))})" if listed else ""
            number = f"{value:,}" if isinstance(value, int | float) else value
            facts.append((name.replace("_", " "), f"{number}{such_as}"))
        elif isinstance(value, dict) and name != "examples":
            facts.append((name.replace("_", " "), ", ".join(f"{key} {item}" for key, item in value.items())))
    return facts


def _quarantine(status: BuildStatus) -> Facts:
    from logitcache_storage.excluded import num_excluded
    from logitcache_storage.terminal import counted

    facts: Facts = []
    if status.quarantine:
        numbers = counted(len(status.quarantine), "shard")
        inside = counted(sum(status.quarantine_num_samples.values()), "sample")
        remedy = "'logitcache build' tries them again"
        facts.append(("quarantine", f"{numbers} with {inside} could not be scored; {remedy}"))
        lines: Facts = []
        for shard, record in sorted(status.quarantine.items()):
            last = record.reasons[-1] if record.reasons else "no reason recorded"
            lines.append((f"  shard {shard}", f"{counted(record.attempts, 'attempt')}, the last: {last}"))
        facts += _first(lines)
    if status.excluded:
        lost = counted(num_excluded(status.excluded), "sample")
        remedy = "'logitcache build --retry-quarantine' tries them again"
        facts.append(("quarantine", f"{lost} of committed shards could not be scored; {remedy}"))
        facts += _first(
            [
                ("  sample", f"{source_id} (key {sample.key}, shard {shard}): {sample.reason}")
                for shard, samples in sorted(status.excluded.items())
                for sample in samples
                for source_id in sample.source_ids
            ]
        )
    return facts


def _first(lines: Facts) -> Facts:
    more = len(lines) - MAX_SHOWN
    return lines[:MAX_SHOWN] + ([("", f"and {more} more (--json lists all)")] if more > 0 else [])
