"""`logitcache compare`: how far apart two caches of one corpus are."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument, count_of
from logitcache_storage.commands.second_store import add_second_options, second_options

if TYPE_CHECKING:
    from rich.table import Table

    from logitcache_storage.compare import Bin, Comparison, SampleComparison, Unmatched
    from logitcache_storage.terminal import Facts

BAR_WIDTH = 30
DEFAULT_TOP = 10


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache compare`."""
    parser.epilog = (
        "Samples are joined by key, so order, shards, precision and k may differ. Divergences are in nats per target"
        " token, over the ids that both caches keep and everything else as one outcome: never more than over the whole"
        " vocabulary. Example: logitcache compare ./cache-u8 ./cache-fp32"
    )
    add_cache_argument(parser, help="the first cache, A")
    parser.add_argument("url_b", metavar="URL_B", help="the second, B, of the same corpus")
    add_second_options(parser, "--storage-options-b", of="URL_B")
    parser.add_argument(
        "--top",
        metavar="N",
        type=count_of("samples"),
        default=DEFAULT_TOP,
        help=f"name the N samples that differ most (default {DEFAULT_TOP})",
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON document")


def run(args: Namespace) -> int:
    """Print the comparison."""
    from logitcache_storage.cache import Cache
    from logitcache_storage.compare import compare_caches
    from logitcache_storage.terminal import print_json

    a = Cache.open(args.url, args.storage_options)
    b = Cache.open(args.url_b, second_options(args.url, args.storage_options, args.url_b, args.storage_options_b))
    found = compare_caches(a, b, top=args.top, quiet=False)
    if args.json:
        print_json(_data(found))
    else:
        _show(found)
    return 0


COMMAND = Command("compare two caches of one corpus: KL, JS, top-1 agreement, label log-probs", add_arguments, run)


def _data(found: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found)


def _show(found: Comparison) -> None:
    from logitcache_storage.terminal import facts_table, open_console, show

    items: list[Any] = [facts_table(_facts(found))]
    if found.histogram:
        items += ["", _histogram(found.histogram, found.num_rows)]
    if found.most_different:
        items += ["", _samples(found.most_different), "", "Look at one with 'logitcache inspect URL --sample KEY'."]
    show(open_console(), *items)


def _facts(found: Comparison) -> Facts:
    return [
        ("A", found.url_a),
        ("B", found.url_b),
        ("in both", f"{found.num_samples:,} samples, {found.num_rows:,} target rows"),
        ("only in A", _unmatched(found.only_a)),
        ("only in B", _unmatched(found.only_b)),
        *(("differs", setting) for setting in found.settings),
        *_distribution_facts(found),
        ("label log-prob", f"B - A {found.label_difference:+.3g} nats, |B - A| {_nats(found.label_distance)}"),
        ("not resolved", f"{found.rest_mass_a:.2%} of A and {found.rest_mass_b:.2%} of B, on ids not kept by both"),
    ]


def _distribution_facts(found: Comparison) -> Facts:
    if found.kl_ab is None:
        return [("distributions", "not compared: one of the caches keeps no ids (k = 0)")]
    return [
        ("KL(A || B)", f"{_nats(found.kl_ab)} nats per token"),
        ("KL(B || A)", f"{_nats(found.kl_ba)} nats per token"),
        ("JS", f"{_nats(found.js)} nats per token"),
        ("same first choice", f"{found.top_1_agreement:.2%}"),
        ("kept by both", f"{found.top_k_overlap:.2%} of the ids"),
    ]


def _unmatched(found: Unmatched) -> str:
    if not found.num_samples:
        return "none"
    more = ", ..." if found.num_samples > len(found.examples) else ""
    return f"{found.num_samples:,} samples ({', '.join(found.examples)}{more})"


def _histogram(bins: tuple[Bin, ...], num_rows: int) -> Table:
    from rich.table import Table

    from logitcache_storage.inspect.draw import bar

    table = Table(box=None, title="KL(A || B) by token", title_justify="left")
    for name in ("nats", "rows", "share", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for found in bins:
        edges = f"from {_edge(found.low)}" if found.high is None else f"{_edge(found.low)} to {_edge(found.high)}"
        share = found.num_rows / num_rows
        table.add_row(edges, f"{found.num_rows:,}", f"{share:.2%}", bar(share, BAR_WIDTH))
    return table


def _samples(samples: tuple[SampleComparison, ...]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from logitcache_storage.visible import printable

    table = Table(box=None, title="samples that differ most (means, nats)", title_justify="left", pad_edge=False)
    has_ids = samples[0].kl_ab is not None
    for name in ("key", "rows", *(("KL(A||B)", "KL(B||A)", "same 1st") if has_ids else ("|B-A|",)), "label B-A"):
        table.add_column(name, justify="left" if name == "key" else "right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for found in samples:
        table.add_row(
            found.key[:12],
            f"{found.num_rows:,}",
            *(
                (_nats(found.kl_ab), _nats(found.kl_ba), f"{found.top_1_agreement:.0%}")
                if has_ids
                else (_nats(found.label_distance),)
            ),
            f"{found.label_difference:+.3g}",
            Text(printable(found.source_id)),
        )
    return table


def _edge(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
