"""`logitcache verify`: is every byte of a cache what was committed? Set aside what is not; ask the teacher again."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument, storage_options

if TYPE_CHECKING:
    from logitcache_storage.agreement import Difference, RescoreReport
    from logitcache_storage.objects import ObjectStore
    from logitcache_storage.repair import RepairReport
    from logitcache_storage.terminal import Facts
    from logitcache_storage.verify import Damage, VerifyReport

HOOKS = "logitcache.hooks"
MAX_SHOWN = 50
MAX_NAMED = 5


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache verify`."""
    parser.epilog = (
        "Exit status: 1 on damage, or where the teacher's new answers differ; 0 when nothing is damaged, also where the"
        " build is unfinished or shards are in quarantine. With --repair: 1 when damage is left that only a copy of the"
        " cache can mend."
    )
    add_cache_argument(parser)
    parser.add_argument(
        "--deep", action="store_true", help="decode everything as well, and check that the rows make sense"
    )
    parser.add_argument(
        "--repair", action="store_true", help="set damaged shards aside, so that the next build scores just those"
    )
    parser.add_argument(
        "--rescore", type=int, metavar="N", help="run the teacher again on N random samples and compare its answers"
    )
    parser.add_argument(
        "--teacher", metavar="PATH_OR_ID", help="with --rescore: where it is now (as when it was built)"
    )
    parser.add_argument(
        "--engine-options",
        metavar="JSON",
        type=storage_options,
        help="with --rescore: what the engine takes besides, e.g. '{\"tensor_parallel\": 4}' for vllm",
    )
    parser.add_argument("--seed", type=int, default=0, help="with --rescore: which samples (0)")
    parser.add_argument("--json", action="store_true", help="the report as one JSON document")


def run(args: Namespace) -> int:
    """Check the cache and print the report; 1 on damage, or on another answer of the teacher."""
    from logitcache_storage.errors import InputError
    from logitcache_storage.objects import open_store
    from logitcache_storage.repair import repair_cache, restore_commits
    from logitcache_storage.verify import verify_cache

    for name in ("teacher", "engine_options"):
        if getattr(args, name) is not None and args.rescore is None:
            raise InputError(f"--{name.replace('_', '-')} goes with --rescore N")
    if args.rescore is not None and args.rescore < 1:
        raise InputError(f"--rescore: expected a number of samples, 1 or more, found {args.rescore}")
    store = open_store(args.url, args.storage_options)
    restored = restore_commits(store, quiet=False) if args.repair else ()
    report = verify_cache(store, deep=args.deep, quiet=False)
    repaired = repair_cache(store, report, restored=restored) if args.repair else None
    is_good = repaired.is_whole if repaired else report.is_intact
    rescored = _rescore(args) if args.rescore is not None and is_good else None
    command = _build_command(store) if repaired and repaired.set_aside else None
    if args.json:
        _print_json(report, repaired, rescored, command)
    else:
        _print(report, repaired, rescored, command, is_skipped=args.rescore is not None and rescored is None)
    return 0 if is_good and (rescored is None or rescored.agrees) else 1


COMMAND = Command(
    "check every object against its checksum; --deep every row, --repair sets damage aside, --rescore asks again",
    add_arguments,
    run,
)


def _rescore(args: Namespace) -> RescoreReport:
    from logitcache_storage.cache import Cache
    from logitcache_storage.cli import find_entry_points
    from logitcache_storage.errors import LogitCacheError

    remedy = 'verify --rescore runs the teacher; install what that takes: pip install "logitcache[pipeline]"'
    hook = find_entry_points(HOOKS).get("rescore")
    if hook is None:
        raise LogitCacheError(remedy)
    cache = Cache.open(args.url, args.storage_options)
    how = {"teacher": args.teacher, "engine_options": args.engine_options, "seed": args.seed}
    try:
        found: RescoreReport = hook.load()(cache, args.rescore, **how, quiet=False)
    except ModuleNotFoundError as e:
        raise LogitCacheError(f"the package {e.name!r} is not installed: {remedy}") from e
    return found


def _build_command(store: ObjectStore) -> str | None:
    from logitcache_storage.commit import load_identity
    from logitcache_storage.errors import CorruptionError
    from logitcache_storage.repair import build_command

    try:
        return build_command(load_identity(store), store.url)
    except CorruptionError:
        return None


def _print_json(
    report: VerifyReport, repaired: RepairReport | None, rescored: RescoreReport | None, command: str | None
) -> None:
    from dataclasses import asdict

    from logitcache_storage.terminal import print_json

    data: dict[str, Any] = {
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
    if repaired is not None:
        data["repair"] = {"whole": repaired.is_whole, **asdict(repaired), "next_command": command}
    if rescored is not None:
        data["rescore"] = asdict(rescored)
    print_json(data)


def _print(
    report: VerifyReport,
    repaired: RepairReport | None,
    rescored: RescoreReport | None,
    command: str | None,
    *,
    is_skipped: bool,
) -> None:
    from logitcache_storage.terminal import facts_table, open_console, show
    from logitcache_storage.visible import printable

    lines = _damage_lines(report)
    lines += _remedy_lines(report) if repaired is None else _repair_lines(repaired, command)
    if is_skipped:
        lines.append("The teacher was not asked again: first mend what is damaged.")
    show(open_console(), printable(report.url), facts_table(_facts(report)), *map(printable, lines))
    if rescored is not None:
        show(open_console(), printable(_verdict(rescored)), facts_table(_rescore_facts(rescored)))


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
    lines = [f"  {found.path}: {found.problem}" for found in report.damage[:MAX_SHOWN]]
    if len(report.damage) > MAX_SHOWN:
        lines.append(f"  and {len(report.damage) - MAX_SHOWN:,} more (--json lists all)")
    return lines


def _remedy_lines(report: VerifyReport) -> list[str]:
    from logitcache_storage.repair import is_repairable

    if not any(map(is_repairable, report.damage)):
        return _left_lines(report.damage)
    if all(found.path.endswith(".statistics") for found in report.damage):
        return [f"'logitcache verify {report.url} --repair' makes statistics again from the rows of their shards."]
    shards = {found.shard for found in report.damage if found.shard is not None}
    waiting = f", so that the next build scores {_shards(sorted(shards))} again" if shards else ""
    deep = " --deep" if report.is_deep else ""
    line = f"'logitcache verify {report.url}{deep} --repair' sets aside what is damaged{waiting}."
    return [line, *_left_lines([found for found in report.damage if not is_repairable(found)])]


def _repair_lines(repaired: RepairReport, command: str | None) -> list[str]:
    lines = []
    if repaired.restored:
        lines.append(f"The commit records of {_shards(repaired.restored)} were put back from the manifest.")
    if repaired.remade:
        others = f" and {len(repaired.remade) - MAX_NAMED:,} others" if len(repaired.remade) > MAX_NAMED else ""
        lines.append(f"Made again from the rows: {', '.join(repaired.remade[:MAX_NAMED])}{others}.")
    if repaired.removed:
        lines.append(f"Removed, because it only repeats other records: {', '.join(repaired.removed[:MAX_SHOWN])}.")
    if repaired.set_aside:
        lines.append(f"Set aside: {_shards(repaired.set_aside)}; the old commit records are in damaged/.")
        lines.append("Next: the build that made the cache, with the same data and options; it scores just that:")
        lines.append(f"  {command or 'logitcache build ...'}")
    return lines + _left_lines(repaired.left)


def _left_lines(left: tuple[Damage, ...] | list[Damage]) -> list[str]:
    lines = []
    if any(found.is_unreachable for found in left):
        lines.append("The store did not answer for some objects, so nothing is known of them: run this again.")
    if lost := [found.path for found in left if not found.is_unreachable]:
        others = f" and {len(lost) - MAX_NAMED:,} others" if len(lost) > MAX_NAMED else ""
        lines.append(
            f"{', '.join(lost[:MAX_NAMED])}{others}: belongs to no shard and cannot be scored again. Restore it from a"
            " copy, or build a new cache."
        )
    return lines


def _shards(shards: tuple[int, ...] | list[int]) -> str:
    named = ", ".join(map(str, shards[:MAX_NAMED]))
    others = f" and {len(shards) - MAX_NAMED:,} others" if len(shards) > MAX_NAMED else ""
    return f"{len(shards):,} shard{'s' * (len(shards) > 1)} ({named}{others})"


def _verdict(rescored: RescoreReport) -> str:
    asked = f"{rescored.teacher} again on {rescored.num_samples:,} samples, {rescored.num_rows:,} target rows"
    return f"{asked}: {'its answers agree with the cache' if rescored.agrees else 'ITS ANSWERS DIFFER'}"


def _rescore_facts(rescored: RescoreReport) -> Facts:
    def nats(found: Difference) -> str:
        return f"at most {found.largest:.2g} nats, mean {found.mean:.2g}"

    differences = [("kept log-probs", rescored.kept), ("label log-probs", rescored.label), ("tails", rescored.tail)]
    facts = [(f"{name} differ by", nats(found)) for name, found in differences if found is not None]
    if rescored.kl_mean is not None:  # and with it the other two
        facts += [
            ("KL(cached || new)", f"mean {rescored.kl_mean:.2g} nats, at most {rescored.kl_largest:.2g}"),
            ("same first choice", f"{rescored.top_1_agreement:.2%} of the rows"),
        ]
    return [
        *facts,
        (
            "furthest off",
            f"sample {rescored.worst_key[:12]} ({rescored.worst_source_id}) at token {rescored.worst_position}:"
            f" {rescored.worst_severity:.2g} times what is allowed",
        ),
        ("allowed", f"{rescored.allowed:g} nats for arithmetic, and what the encoding takes on kept ids"),
    ]
