"""`logitcache stats`: what a cache holds, in numbers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument, count_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from logitcache_storage.cache import Cache
    from logitcache_storage.stats import Distributions, Totals
    from logitcache_storage.terminal import Facts

BAR_WIDTH = 30


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache stats`."""
    add_cache_argument(parser)
    parser.add_argument("--by-shard", action="store_true", help="a line for each shard as well")
    parser.add_argument(
        "--sample-shards",
        metavar="N",
        type=count_of("shards"),
        help="read N shards, evenly spaced, for quantiles and ranks; 0 reads none"
        " (default: all, or as many as hold a million rows)",
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON document")


def run(args: Namespace) -> int:
    """Print the numbers."""
    from logitcache_storage.cache import Cache
    from logitcache_storage.stats import choose_shards, distributions, total
    from logitcache_storage.terminal import print_json

    cache = Cache.open(args.url, args.storage_options)
    totals = total(cache.shards)
    by_shard = {n: total([cache.shards[n]]) for n in sorted(cache.shards)} if args.by_shard else {}
    found = distributions(cache, choose_shards(cache.shards, args.sample_shards), quiet=False)
    if args.json:
        print_json(_data(cache, totals, by_shard, found))
    else:
        _show(cache, totals, by_shard, found)
    return 0


COMMAND = Command("count tokens and bytes; entropy, kept mass, label rank and hit rate", add_arguments, run)


def _num_tokens(cache: Cache) -> int:
    return int(cache.index.num_tokens.sum(dtype="int64"))


def _data(cache: Cache, totals: Totals, by_shard: dict[int, Totals], found: Distributions) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "url": cache.store.url,
        "complete": cache.is_complete,
        "num_samples": len(cache),
        "num_tokens": _num_tokens(cache),
        "total": asdict(totals),
        "shards": [{"shard": shard, **asdict(numbers)} for shard, numbers in by_shard.items()],
        "distributions": asdict(found),
    }


def _show(cache: Cache, totals: Totals, by_shard: dict[int, Totals], found: Distributions) -> None:
    from logitcache_storage.terminal import facts_table, identity_facts, open_console, show
    from logitcache_storage.visible import printable

    facts = [*identity_facts(cache.identity), *_totals_facts(cache, totals)]
    items: list[RenderableType] = [printable(cache.store.url), facts_table(facts)]
    if found.num_rows:
        items += ["", _quantile_table(found, totals)]
        if found.label_rank:
            items += ["", _rank_table(found)]
    if by_shard:
        items += ["", _shard_table(by_shard)]
    show(open_console(), *items)


def _totals_facts(cache: Cache, totals: Totals) -> Facts:
    from logitcache_storage.terminal import format_bytes, format_duration

    planned = len(cache.plan.shard_num_rows)
    unfinished = "" if cache.is_complete else f" of {planned:,} planned; the build is unfinished"
    facts = [
        ("samples", f"{len(cache):,}, {_num_tokens(cache):,} tokens"),
        ("target rows", f"{totals.num_rows:,}"),
        ("shards", f"{totals.num_shards:,}{unfinished}"),
    ]
    if totals.bytes_per_row is None or totals.label_log_prob is None or totals.perplexity is None:
        return facts
    facts += [
        ("size", f"{format_bytes(totals.num_bytes)}, {totals.bytes_per_row:.1f} bytes per target token"),
        ("scoring took", f"{format_duration(totals.seconds)}, summed over workers"),
        ("label log-prob", f"{totals.label_log_prob:.4f} nats, perplexity {totals.perplexity:,.3f}"),
    ]
    if not totals.num_kept:
        return facts
    return [
        *facts,
        ("entropy", f"{totals.entropy:.4f} nats"),
        ("kept mass", f"{totals.kept_mass:.6f} in {totals.num_kept:.1f} ids"),
        ("label is first", f"{totals.top_1_rate:.2%}"),
        ("label is kept", f"{totals.top_k_rate:.2%}"),
    ]


def _quantile_table(found: Distributions, totals: Totals) -> Table:
    from rich.table import Table

    share = "" if found.num_rows == totals.num_rows else f" of {len(found.shards):,} of {totals.num_shards:,} shards"
    table = Table(box=None, title=f"quantiles over {found.num_rows:,} rows{share}", title_justify="left")
    names = list(next(iter(found.quantiles.values())))
    for name in ("", *(f"{int(name[1:])}%" for name in names)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, values in found.quantiles.items():
        table.add_row(name.replace("_", " "), *(f"{value:.3f}" for value in values.values()))
    return table


def _rank_table(found: Distributions) -> Table:
    from rich.table import Table

    from logitcache_storage.inspect.draw import bar

    table = Table(box=None, title="rank of the label among the teacher's choices", title_justify="left")
    for name in ("rank", "rows", "share", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for name, count in found.label_rank.items():
        share = count / found.num_rows
        table.add_row(name, f"{count:,}", f"{share:.2%}", bar(share, BAR_WIDTH))
    return table


def _shard_table(by_shard: dict[int, Totals]) -> Table:
    from rich.table import Table

    table = Table(box=None, title="by shard", title_justify="left")
    for name in ("shard", "rows", "B/row", "entropy", "kept mass", "label lp", "first", "kept", "s"):
        table.add_column(name, justify="right")
    for shard, numbers in by_shard.items():
        means = (numbers.entropy, numbers.kept_mass, numbers.label_log_prob)
        rates = (numbers.top_1_rate, numbers.top_k_rate)
        table.add_row(
            f"{shard}",
            f"{numbers.num_rows:,}",
            _number(numbers.bytes_per_row, ".1f"),
            *(_number(value, ".4f") for value in means),
            *(_number(value, ".1%") for value in rates),
            f"{numbers.seconds:.1f}",
        )
    return table


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
