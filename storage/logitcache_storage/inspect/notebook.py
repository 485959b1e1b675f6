"""A cache and a sample as they show themselves in a notebook.

A notebook shows what it is given at the end of a cell, wanted or not: so a cache is drawn from what is in memory, a
sample from its beginning, and what cannot be drawn is shown as plain text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from logitcache_storage.errors import LogitCacheError
from logitcache_storage.terminal import format_bytes, identity_facts
from logitcache_storage.visible import printable

if TYPE_CHECKING:
    from markupsafe import Markup

    from logitcache_storage.cache import Cache, Sample

log = logging.getLogger(__name__)

MAX_TARGETS = 400
"""Target tokens of a sample that are shown."""
MAX_PROMPT = 800
NUM_POSITIONS = 2
TOP = 8

SCOPE = "logitcache-view"
"""A class around all of it, so that its style sheets touch nothing else of the notebook."""

THEMES = f"""
.{SCOPE} {{ background: var(--paper); color: var(--ink); padding: 0.6rem; }}
[data-jp-theme-light="true"] .{SCOPE}, .vscode-light .{SCOPE} {{ color-scheme: light; }}
[data-jp-theme-light="false"] .{SCOPE}, .vscode-dark .{SCOPE} {{ color-scheme: dark; }}
"""
"""Notebooks choose light or dark themselves; elsewhere it is as the browser has it."""


def cache_html(cache: Cache) -> str | None:
    """What a cache is and what its commit records say of it; None where the packages to draw it are not there."""
    return _shown(lambda: _cache(cache))


def sample_html(sample: Sample) -> str | None:
    """The shaded beginning of a sample and its most surprising positions; None where it cannot be drawn."""
    return None if sample.spelling is None else _shown(lambda: _sample(sample))


def _shown(draw: Callable[[], Markup]) -> str | None:
    try:
        return _framed(draw())
    except LogitCacheError as e:
        from markupsafe import Markup

        return _framed(Markup('<p class="problem">{}</p>').format(printable(str(e))))
    except Exception:  # a cell that has done its work does not fail for its picture; `repr` is shown
        log.debug("cannot be drawn", exc_info=True)
        return None


def _framed(body: Markup) -> str:
    from markupsafe import Markup

    from logitcache_storage.inspect.html import style

    sheets = style("colours.css", "fragments.css").replace(":root", Markup("&"))
    frame = Markup('<div class="{0}"><style>.{0} {{ {1} }}\n{2}</style>{3}</div>')
    return frame.format(SCOPE, sheets, Markup(THEMES), body).encode("utf-8", "backslashreplace").decode()


def _cache(cache: Cache) -> Markup:
    from logitcache_storage.inspect.html import facts_list
    from logitcache_storage.inspect.overview import overview

    found = overview(cache)
    totals = found.totals
    built = "" if found.is_complete else f", {found.num_samples / found.planned_samples:.0%} of those planned"
    facts = [
        ("cache", found.url),
        *identity_facts(found.identity),
        ("samples", f"{found.num_samples:,}{built}"),
        ("target tokens", f"{totals.num_rows:,} of {found.num_tokens:,} tokens"),
    ]
    if totals.bytes_per_row is not None:
        facts += [
            ("size", f"{format_bytes(totals.num_bytes)}, {totals.bytes_per_row:.1f} bytes per target token"),
            ("label log-prob", f"{totals.label_log_prob:.4f} nats on average"),
        ]
    if totals.entropy is not None:
        facts += [
            ("entropy", f"{totals.entropy:.4f} nats on average"),
            ("label", f"the first choice in {totals.top_1_rate:.1%}, kept in {totals.top_k_rate:.1%}"),
        ]
    return facts_list(facts)


def _sample(sample: Sample) -> Markup:
    from markupsafe import Markup

    from logitcache_storage.inspect.data import positions, segments
    from logitcache_storage.inspect.html import facts_list, legend, position_bars, tokens

    assert sample.spelling is not None
    vocabulary, count = sample.spelling(), len(sample.topk)
    rows = positions(sample, vocabulary, slice(0, min(MAX_TARGETS, count)), TOP)
    mean = float(sample.topk.label_log_prob.astype("float64").mean())
    facts = [
        ("sample", f"{sample.source_id}, key {sample.key}"),
        ("tokens", f"{len(sample.input_ids):,}, {count:,} of them targets"),
        ("mean label log-prob", f"{mean:.4f} nats"),
        *((name, str(value)[:MAX_PROMPT]) for name, value in sample.columns.items()),
    ]
    surprising = sorted(range(len(rows)), key=lambda row: rows[row]["label_log_prob"])[:NUM_POSITIONS]
    parts = [
        facts_list(facts),
        legend("label"),
        tokens(segments(sample, vocabulary), rows, "label", max_prompt=MAX_PROMPT),
        *(position_bars(rows[row]) for row in sorted(surprising)),
    ]
    return Markup("").join(parts)
