"""`logitcache doubtful`: labels that are probably wrong, on the terminal, as CSV, as weights for training."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument, count_of

if TYPE_CHECKING:
    from rich.table import Table

    from logitcache_storage.cache import Cache
    from logitcache_storage.inspect.doubtful_reading import DoubtfulPositions, Positions
    from logitcache_storage.sample_statistics import SampleTable

MIN_PROBABILITY = 0.9
POSITIONS_SHOWN = 20


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache doubtful`."""
    parser.epilog = (
        "A label is doubtful where the teacher's first choice has at least the probability P, and the label is not"
        " among the ids that the cache keeps. To train on all labels but these: logitcache doubtful ./cache --columns"
        " doubts.parquet; then logitcache train --student ./base --cache ./cache --columns doubts.parquet --objective"
        " critical_tokens --output ./student. An objective of your own reads the weights as column('critical')."
    )
    add_cache_argument(parser)
    parser.add_argument(
        "--min-probability",
        metavar="P",
        type=_probability,
        default=MIN_PROBABILITY,
        help=f"of the teacher's first choice, above 0 and up to 1 (default {MIN_PROBABILITY})",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=count_of("positions"),
        help=f"name the N surest (default: {POSITIONS_SHOWN}; all with --csv and --json)",
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write them as CSV instead; replaces the file")
    parser.add_argument(
        "--columns",
        metavar="FILE.parquet",
        type=Path,
        help="write a weight for every target token instead, 0 where the label is doubtful and 1 elsewhere, for"
        " 'logitcache train --columns'; replaces the file",
    )
    parser.add_argument(
        "--column-name", metavar="NAME", default="critical", help="of the weights in that file (default critical)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(args: Namespace) -> int:
    """Print or write what is doubtful; status 1 where a shard could not be read."""
    from logitcache_storage.cache import Cache
    from logitcache_storage.commands.outputs import check_file, read_statistics

    for option, path in (("--csv", args.csv), ("--columns", args.columns)):
        if path is not None:
            check_file(path, option)
    cache = Cache.open(args.url, args.storage_options)
    table = read_statistics(cache)
    if args.columns is not None:
        _write_columns(cache, table, args)
    if args.columns is not None and args.csv is None and not args.json:
        return 0
    return _list(cache, table, args)


COMMAND = Command("list labels that are probably wrong: the teacher is sure, and of something else", add_arguments, run)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"expected a probability above 0 and up to 1, found {text!r}")
    return value


def _list(cache: Cache, table: SampleTable, args: Namespace) -> int:
    from logitcache_storage.inspect.doubtful import doubtful_positions
    from logitcache_storage.progress import progress
    from logitcache_storage.terminal import print_json

    takes_all = args.csv is not None or args.json
    limit = POSITIONS_SHOWN if args.limit is None and not takes_all else args.limit
    with progress("reading samples", unit="samples") as meter:
        found = doubtful_positions(cache, table, min_probability=args.min_probability, limit=limit, meter=meter)
    if args.csv is not None:
        _write_csv(found, args.csv)
        if not args.json:
            print(f"{args.csv}: {len(found.positions):,} positions in {found.num_samples:,} samples")
    if args.json:
        print_json(_data(cache, found, args.min_probability))
    elif args.csv is None:
        _show(cache, found, args.min_probability)
    _warn(found)
    return 1 if found.problems else 0


def _write_columns(cache: Cache, table: SampleTable, args: Namespace) -> None:
    from logitcache_storage.commands.outputs import replaced
    from logitcache_storage.inspect.doubtful import write_columns
    from logitcache_storage.progress import progress

    with replaced(args.columns) as path, progress("reading samples", unit="samples") as meter:
        count = write_columns(
            cache, table, path, min_probability=args.min_probability, name=args.column_name, meter=meter
        )
    if not args.json:
        print(f"{args.columns}: {len(cache):,} samples, {count:,} target tokens with the weight 0")
        print("train on all others with 'logitcache train --objective critical_tokens --columns FILE ...'")


def _write_csv(found: DoubtfulPositions, path: Path) -> None:
    from logitcache_storage.commands.outputs import replaced
    from logitcache_storage.inspect.doubtful import write_csv

    with replaced(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        write_csv(found.positions, file)


def _data(cache: Cache, found: DoubtfulPositions, min_probability: float) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "url": cache.store.url,
        "min_probability": min_probability,
        "positions": list(map(asdict, found.positions)),
        "num_samples": found.num_samples,
        "is_complete": found.is_complete,
        "problems": found.problems,
    }


def _show(cache: Cache, found: DoubtfulPositions, min_probability: float) -> None:
    from logitcache_storage.terminal import open_console, show
    from logitcache_storage.visible import printable

    samples = f"{found.num_samples:,} of {len(cache):,} samples have a label that is not kept,"
    items: list[Any] = [printable(cache.store.url), samples, f"where another token has {min_probability:g} or more."]
    if not cache.identity.k:
        items.append("The cache keeps no ids (k = 0), so it does not know what the teacher was sure of.")
    if found.positions:
        items += ["", _table(found.positions), ""]
        if not found.is_complete:
            items.append("These are the surest; see more with --limit N, or all with --csv FILE.")
        items.append("Look at one with 'logitcache inspect URL --sample SAMPLE --rows ROW'.")
    show(open_console(), *items)


def _table(positions: Positions) -> Table:
    import math

    from rich.table import Table
    from rich.text import Text

    from logitcache_storage.inspect.data import token_text
    from logitcache_storage.terminal import format_probability
    from logitcache_storage.visible import printable

    table = Table(box=None, pad_edge=False)
    for name in ("sample", "row", "label", "prob", "first choice", "prob"):
        is_text = name in ("label", "first choice")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True, max_width=14 if is_text else None)
    table.add_column("source", no_wrap=True)
    for found in positions:
        table.add_row(
            str(found.index),
            str(found.row),
            Text(token_text(found.label), overflow="ellipsis"),
            format_probability(math.exp(found.label_log_prob)),
            Text(token_text(found.choice), overflow="ellipsis"),
            format_probability(found.choice_probability),
            Text(printable(found.source_id), overflow="ellipsis"),
        )
    return table


def _warn(found: DoubtfulPositions) -> None:
    for problem in found.problems:
        print(f"logitcache doubtful: {problem}", file=sys.stderr)
