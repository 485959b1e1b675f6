"""What all screens of the command line share: the console, numbers in words, tables of facts, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from logitcache_storage.schema import CacheIdentity
from logitcache_storage.visible import printable

Facts = list[tuple[str, str]]
"""Names and values, in the order in which they are shown."""


def open_console(*, stderr: bool = False) -> Console:
    """Standard output as rich sees it, with nothing in the text taken for markup.

    Colours only on a terminal and not under NO_COLOR; 80 columns where there is no terminal to ask.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show(console: Console, *items: RenderableType) -> None:
    """Print one below the other; text is never broken into lines of the terminal's width.

    Where no terminal reads, lines end where their text ends, so that they can be compared and searched.
    """
    if not console.is_terminal:
        with console.capture() as capture:
            _print(console, items)
        console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    else:
        _print(console, items)


def has_colour(console: Console) -> bool:
    """Whether shades reach the reader, or must be said in another way."""
    return console.color_system is not None and not console.no_color


def facts_table(facts: Facts) -> Table:
    """Two columns, names dim; safe for text from a corpus."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(f"  {name}"), Text(printable(value)))
    return table


def identity_facts(identity: CacheIdentity) -> Facts:
    """What the cache is a cache of, in three lines."""
    teacher, corpus = identity.teacher, identity.corpus
    revision = f" at {teacher.revision}" if teacher.revision else ""
    mass = f", up to {identity.kept_mass:g} of the mass" if identity.kept_mass < 1 else ""
    kept = f"k = {identity.k} of {identity.vocab_size:,} tokens{mass}, {identity.precision} in {identity.container}"
    return [
        (identity.role, f"{teacher.id}{revision}, {teacher.dtype}, {teacher.engine}"),
        ("corpus", f"{corpus.num_records:,} records, fingerprint {corpus.fingerprint[:12]}"),
        ("keeps", kept if identity.k else f"k = 0: the label's log-prob alone, in {identity.container}"),
    ]


def print_json(value: Any) -> None:
    """One JSON document on standard output, in ASCII; numbers that JSON lacks become null."""
    json.dump(_finite(value), sys.stdout, indent=2, allow_nan=False, default=str)
    sys.stdout.write("\n")


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KB", in powers of 1,000."""
    return f"{count:.0f} B" if abs(count) < 1000 else _scaled(count, " KB", " MB", " GB", " TB", " PB")


def format_count(count: float) -> str:
    """1234567 -> "1.2M"; in full below 10,000; 0.214 -> "0.21"."""
    if abs(count) < 10 and count != int(count):
        return f"{count:.2g}"
    return f"{count:,.0f}" if abs(count) < 10_000 else _scaled(count, "k", "M", "G", "T")


def counted(count: int, noun: str) -> str:
    """3, "shard" -> "3 shards"; the noun is a regular one."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_duration(seconds: float) -> str:
    """3725 -> "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_probability(probability: float) -> str:
    """At most six characters: "0.9321", "3e-07"."""
    return f"{probability:.4f}" if probability >= 5e-5 or probability <= 0 else f"{probability:.0e}"


def _print(console: Console, items: Iterable[RenderableType]) -> None:
    for item in items:
        console.print(item, soft_wrap=isinstance(item, str))


def _scaled(count: float, *units: str) -> str:
    power = min(len(units), int(math.log10(abs(count)) // 3))
    return f"{count / 1000**power:.1f}{units[power - 1]}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
