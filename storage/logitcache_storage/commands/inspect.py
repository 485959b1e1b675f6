"""`logitcache inspect`: samples and what the teacher thought of them, on a terminal."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument, count_of, row_range

if TYPE_CHECKING:
    from logitcache_storage.cache import Cache

SAMPLES_SHOWN = 20
POSITIONS_SHOWN = 40
DEFAULT_TOP = 3


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache inspect`."""
    add_cache_argument(parser)
    parser.add_argument(
        "--sample", metavar="I_OR_KEY", help="one sample: its index, or at least 6 hex digits of its key"
    )
    parser.add_argument(
        "--rows",
        metavar="A:B",
        type=row_range,
        help="which rows, counted from 0: samples of the list, or target positions of the sample"
        f" (default: the first {SAMPLES_SHOWN} and {POSITIONS_SHOWN}; with --json all positions)",
    )
    parser.add_argument(
        "--top",
        metavar="N",
        type=count_of("choices"),
        default=DEFAULT_TOP,
        help="choices of the teacher at each position (default 3)",
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON document")


def run(args: Namespace) -> int:
    """Print the list of samples, or one sample."""
    from logitcache_storage.cache import Cache

    cache = Cache.open(args.url, args.storage_options)
    if args.sample is None:
        _list_samples(cache, args)
    else:
        _show_sample(cache, args)
    return 0


COMMAND = Command("look at samples: the text, and what the teacher thought of each target token", add_arguments, run)


def _list_samples(cache: Cache, args: Namespace) -> None:
    from logitcache_storage.inspect.data import listing_data, rows_within
    from logitcache_storage.inspect.draw import draw_listing
    from logitcache_storage.terminal import facts_table, identity_facts, open_console, print_json, show
    from logitcache_storage.visible import printable

    rows, samples = slice(0, 0), []
    if args.rows is not None or len(cache):
        rows = rows_within(args.rows or slice(0, SAMPLES_SHOWN), len(cache), of=f"{cache.store.url} (samples)")
        samples = listing_data(cache, rows)
    if args.json:
        print_json({"url": cache.store.url, "num_samples": len(cache), "samples": samples})
        return
    planned = "" if cache.is_complete else f" committed of {cache.plan.num_samples:,}"
    facts = facts_table([*identity_facts(cache.identity), ("samples", f"{len(cache):,}{planned}")])
    more = _more("samples", rows, len(cache)) + "Look at one with --sample INDEX."
    listing = ("", draw_listing(samples), "", more) if samples else ()
    show(open_console(), printable(cache.store.url), facts, *listing)


def _show_sample(cache: Cache, args: Namespace) -> None:
    from logitcache_storage.inspect.data import find_sample, rows_within, sample_data
    from logitcache_storage.inspect.draw import draw_sample
    from logitcache_storage.terminal import open_console, print_json, show

    index = find_sample(cache, args.sample)
    count = int(cache.index.num_targets[index])
    wanted = args.rows or slice(0, None if args.json else POSITIONS_SHOWN)
    rows = rows_within(wanted, count, of=f"sample {index}")
    sample = cache[index]
    data = sample_data(sample, index, cache.vocabulary, rows=rows, top=args.top)
    if args.json:
        print_json({"url": cache.store.url, **data, "segments": [_joined(s) for s in data["segments"]]})
        return
    console = open_console()
    more = _more("target rows", rows, count)
    drawn = draw_sample(data, sample.topk.label_log_prob.tolist(), console)
    show(console, *drawn, *(["", more] if more else []))


def _more(what: str, rows: slice, count: int) -> str:
    """How to see the rest, where there is one."""
    shown = rows.stop - rows.start
    if shown == count:
        return ""
    after = f"{rows.stop}:{min(rows.stop + shown, count)}" if rows.stop < count else f"0:{rows.start}"
    return f"{what.capitalize()} {rows.start} to {rows.stop - 1} of {count:,}; see others with --rows {after}. "


def _joined(segment: dict[str, Any]) -> dict[str, Any]:
    """For JSON, whose strings hold no invalid bytes: those become U+FFFD."""
    text = "".join(segment["texts"]).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return {"target": segment["target"], "start": segment["start"], "stop": segment["stop"], "text": text}
