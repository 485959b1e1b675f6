"""A cache in one self-contained HTML file: for an issue, an experiment log, or whoever has no access to the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.errors import CorruptionError, LogitCacheError
from logitcache_storage.inspect.data import positions, segments
from logitcache_storage.inspect.doubtful import DEFAULT_MIN_PROBABILITY, doubtful_positions
from logitcache_storage.inspect.figures import Bar, histogram, png, svg
from logitcache_storage.inspect.html import legend, position_bars, style, tokens
from logitcache_storage.inspect.overview import Histogram, Overview, overview
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.terminal import identity_facts
from logitcache_storage.visible import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE_SHEETS = ("colours.css", "fragments.css", "style.css", "report.css")

NUM_DOUBTFUL = 20
NUM_UNCERTAIN = 15
MAX_TARGETS = 1200
"""Target tokens of an example that are shown; a file of two is below a megabyte."""
MAX_PROMPT = 2000
NUM_POSITIONS = 3
"""Distributions of each example: at its most surprising positions."""
TOP = 10
CONTEXT_TOKENS = 16
MAX_TEXT = 160
"""Characters of a token, a source or an excerpt in a table."""


@dataclass(frozen=True)
class Example:
    """One sample in full."""

    title: str
    index: int
    sample: Sample | None
    """None where it cannot be read."""
    text: Markup
    bars: tuple[Markup, ...]
    problem: str


@dataclass(frozen=True)
class Report:
    """A cache in one HTML document; nothing in it loads anything, and equal caches give equal bytes."""

    html: str
    problems: tuple[str, ...]
    """What could not be read, and why; the document says it, too."""


def report(cache: Cache, table: SampleTable) -> Report:
    """Draw it.

    Args:
        cache: what it is about.
        table: of `load_statistics`.
    """
    # The templates belong to the web view, which needs more than a report does.
    from logitcache_storage.web.page import templates

    found = overview(cache, table)
    doubtful = doubtful_positions(cache, table, limit=NUM_DOUBTFUL)
    uncertain, problems = _uncertain(cache, table)
    examples = [_example(cache, title, index) for title, index in _choose(table).items()]
    known = list(dict.fromkeys([*table.problems.values(), *doubtful.problems, *problems]))
    page = templates().get_template("report.html")
    html = page.render(
        style=style(*STYLE_SHEETS),
        found=found,
        facts=identity_facts(cache.identity),
        last_commit=max((record.created for record in cache.shards.values()), default="")[:10],
        plots=[svg(figure(item), item.name, _in_words(item)) for item in found.histograms if item.num_rows],
        doubtful=doubtful,
        contexts=[_context(cache, item.index, item.position) for item in doubtful.positions],
        min_probability=DEFAULT_MIN_PROBABILITY,
        uncertain=uncertain,
        examples=examples,
        legend=legend("label"),
        problems=known,
        max_text=MAX_TEXT,
    )
    of_examples = [example.problem for example in examples if example.problem]
    return Report(html, tuple(dict.fromkeys([*known, *of_examples])))


def plots(found: Overview) -> dict[str, bytes]:
    """The histograms of the report as PNG files, by name."""
    return {f"{item.name}.png": png(figure(item)) for item in found.histograms if item.num_rows}


def figure(found: Histogram) -> Figure:
    """A histogram of an overview."""
    bars = [Bar(item.name, count) for item, count in zip(found.bins, found.counts, strict=True)]
    return histogram(found.title, found.unit, bars)


def _choose(table: SampleTable) -> dict[str, int]:
    """Two samples: one like most, one that surprised the teacher most."""
    by_mean = table.order("mean_label_log_prob")
    if not len(by_mean):
        return {}
    chosen = {
        "An ordinary sample: the median of the mean label log-prob": int(by_mean[len(by_mean) // 2]),
        "The sample with the most surprising label": int(table.order("min_label_log_prob")[0]),
    }
    return chosen if len(set(chosen.values())) == 2 else dict(list(chosen.items())[:1])


def _example(cache: Cache, title: str, index: int) -> Example:
    try:
        sample = cache[index]
    except LogitCacheError as e:
        return Example(title, index, None, Markup(), (), str(e))
    rows = positions(sample, cache.vocabulary, slice(0, min(MAX_TARGETS, len(sample.topk))), TOP)
    text = tokens(segments(sample, cache.vocabulary), rows, "label", max_prompt=MAX_PROMPT)
    surprising = np.argsort(sample.topk.label_log_prob[: len(rows)], kind="stable")[:NUM_POSITIONS]
    return Example(
        title, index, sample, text, tuple(position_bars(rows[row]) for row in sorted(surprising.tolist())), ""
    )


def _uncertain(cache: Cache, table: SampleTable) -> tuple[list[dict[str, Any]], list[str]]:
    """The samples with the largest mean entropy, with the beginning of what was to be learnt; and what is damaged."""
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    count = NUM_UNCERTAIN if cache.identity.k else 0  # without ids no entropy is known
    for index in table.order("mean_entropy", descending=True)[:count].tolist():
        try:
            (about,), ((ids, targets),) = cache.describe([index]), cache.read_tokens([index])
        except CorruptionError as e:
            problems.append(str(e))
            continue
        text = _on_one_line(cache.vocabulary.decode(ids[targets[: 2 * CONTEXT_TOKENS]].tolist()))
        is_cut = len(targets) > 2 * CONTEXT_TOKENS or len(text) > MAX_TEXT
        excerpt = text[:MAX_TEXT] + ("…" if is_cut else "")
        found.append({"source_id": about["source_id"], "excerpt": excerpt, **table.facts(index)})
    return found, problems


def _context(cache: Cache, index: int, position: int) -> str:
    """The text before a position."""
    ids, _ = cache.read_tokens([index])[0]
    return _on_one_line(cache.vocabulary.decode(ids[max(0, position - CONTEXT_TOKENS) : position].tolist()))[-MAX_TEXT:]


def _on_one_line(text: str) -> str:
    return printable(text).replace("\n", "↵")


def _in_words(found: Histogram) -> str:
    return f"{found.title}: {found.num_rows:,} tokens in {len(found.bins)} bars"
