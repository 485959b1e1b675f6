"""Samples and distributions as HTML, from the values of `data`: for the web view, the report and notebooks.

Fragments hold no script and no `style` attribute; their looks are in `web/static/fragments.css`. Every text is escaped,
and nothing is told by colour alone: a shaded token says its numbers when it is pointed at, and the strongest shades are
underlined.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from logitcache_storage.inspect.data import token_text
from logitcache_storage.terminal import format_probability
from logitcache_storage.visible import printable

OTHERS = "all others"

MAX_PROMPT = 2000
"""Characters of a prompt that are shown where its length is bounded: its beginning and its end."""


@dataclass(frozen=True)
class Measure:
    """What tokens are shaded by, from level 0 (nothing to see) to 9."""

    title: str
    edges: tuple[float, ...]
    """Where a level ends and the next begins, ascending, nine of them."""
    shown: Callable[[float], str]
    """A value in words."""
    of_row: Callable[[Mapping[str, Any]], float] | None = None
    """The value of a row of `data.positions`, where it is there."""

    def level(self, value: float) -> int:
        """The shade of a value."""
        return bisect.bisect_right(self.edges, value)


def _nats(value: float) -> str:
    return f"{value:.3g}"


def _as_probability(value: float) -> str:
    return f"{math.exp(-value):.2g}"


MEASURES = {
    "label": Measure(
        "probability of the label",
        tuple(-math.log(p) for p in (0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)),
        _as_probability,
        lambda row: -row["label_log_prob"],
    ),
    "entropy": Measure(
        "entropy, nats", (0.05, 0.15, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0), _nats, lambda row: row["entropy"]
    ),
    "tail": Measure(
        "mass outside the kept ids", (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.4), _nats, lambda row: row["tail"]
    ),
    "kl": Measure("KL to the second cache, nats", (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0), _nats),
}
"""By name; `kl` needs two caches, and its values are given."""


@dataclass(frozen=True)
class Series:
    """One number of every outcome, drawn as a bar."""

    key: str
    """Of the outcome."""
    title: str
    look: str
    """A class of `fragments.css`: `first`, `second`, `label`, `target`, `residual` or `gradient`."""
    is_signed: bool = False
    """Whether the bar grows to both sides of a middle."""


def tokens(
    segments: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    *,
    values: Sequence[float] | None = None,
    link: Callable[[int], str] | None = None,
    selected: int | None = None,
    max_prompt: int | None = None,
) -> Markup:
    """The text of a sample, each target token shaded; `data-row` counts the targets from 0.

    Args:
        segments: of `data.segments`.
        rows: of `data.positions`, with one choice or more, from the first target on; where they end, the text ends.
        measure: of `MEASURES`.
        values: of the measure, one for each row, where it is not in the rows.
        link: where the token of a row leads; None: nowhere.
        selected: the row that is looked at.
        max_prompt: characters of each stretch that is no target; None: all.
    """
    scale = MEASURES[measure]
    if values is None:
        values = [scale.of_row(row) if scale.of_row else 0.0 for row in rows]
    parts: list[Markup] = []
    first = 0
    for segment in segments:
        if not segment["target"]:
            parts.append(_prompt("".join(segment["texts"]), max_prompt))
            continue
        for number, text in enumerate(segment["texts"], first):
            if number == len(rows):
                left = sum(len(s["texts"]) for s in segments if s["target"]) - number
                parts.append(Markup('<span class="cut"> … {} more target tokens</span>').format(f"{left:,}"))
                return _text(parts)
            words = describe(rows[number])
            if scale.of_row is None:
                words += f"; {scale.title}: {scale.shown(values[number])}"
            parts.append(_token(text, number, scale.level(values[number]), words, link, selected))
        first += len(segment["texts"])
    return _text(parts)


def legend(measure: str) -> Markup:
    """What the shades mean."""
    scale = MEASURES[measure]
    swatches = [Markup('<span class="tok s0">{}</span>').format("more" if measure == "label" else "less")]
    swatches += [
        Markup('<span class="tok s{}">{}</span>').format(level, scale.shown(edge))
        for level, edge in enumerate(scale.edges, 1)
    ]
    return Markup('<p class="legend">{}: {}</p>').format(scale.title, Markup(" ").join(swatches))


def outcomes(rows: Mapping[str, Mapping[str, Any]], limit: int | None = None) -> list[dict[str, Any]]:
    """One position as several caches have it: a list of tokens, the likeliest first, and all others.

    Args:
        rows: series key to a row of `data.positions`, all of the same target.
        limit: how many choices of each row, besides the label, are outcomes of their own; None: all.

    Returns:
        For each outcome `token` (of `token_data`, None for all others), `is_label`, and the probability in each series,
        None where the token is not among the choices of the row.
    """
    found: dict[int, dict[str, Any]] = {}
    for row in rows.values():
        for choice in (*row["top"][:limit], row["label"]):
            is_label = choice["id"] == row["label"]["id"]
            token = {name: choice[name] for name in ("id", "text", "bytes")}
            found.setdefault(choice["id"], {"token": token, "is_label": is_label, **dict.fromkeys(rows)})
    for key, row in rows.items():
        for choice in (*row["top"], {**row["label"], "log_prob": row["label_log_prob"]}):
            if choice["id"] in found:
                found[choice["id"]][key] = math.exp(choice["log_prob"])
    listed = sorted(found.values(), key=lambda about: -max(about[key] or 0.0 for key in rows))
    others = {key: _others(row, [about[key] or 0.0 for about in listed]) for key, row in rows.items()}
    return [*listed, {"token": None, "is_label": False, **others}]


def distribution(outcomes: Sequence[Mapping[str, Any]], series: Sequence[Series], caption: str) -> Markup:
    """A table of outcomes with bars; legible without colour, and as cards where it is narrow.

    Args:
        outcomes: `token` (of `token_data`, or None for all others), `is_label`, a number or None for each series, and
            where there are such `assumed`, the series whose number is no cache's but an assumption.
        series: the columns.
        caption: what the table is, above it.
    """
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(column.title) for column in series)
    spans = _spans(series, outcomes)
    body = Markup("").join(_outcome(outcome, series, spans) for outcome in outcomes)
    width = "wide" if len(series) > 2 else "narrow"
    return Markup(
        '<table class="outcomes {}"><caption>{}</caption><thead><tr><th scope="col">token</th>{}</tr></thead>'
        "<tbody>{}</tbody></table>"
    ).format(width, caption, head, body)


def position_bars(row: Mapping[str, Any]) -> Markup:
    """The distribution of a row of `data.positions` on its own."""
    caption = f"target {row['row']}, token {row['position']}"
    if row["num_kept"]:
        caption += f": entropy {row['entropy']:.3f} nats"
    return distribution(outcomes({"teacher": row}), [Series("teacher", "probability", "first")], caption)


def facts_list(facts: Sequence[tuple[str, str]]) -> Markup:
    """Names and values."""
    items = [Markup("<dt>{}</dt><dd>{}</dd>").format(name, printable(value)) for name, value in facts]
    return Markup('<dl class="facts">{}</dl>').format(Markup("").join(items))


def style(*sheets: str) -> Markup:
    """Style sheets of `web/static/`, to stand within a page."""
    folder = files("logitcache_storage.web") / "static"
    return Markup("\n".join((folder / name).read_text(encoding="utf-8") for name in sheets))


def describe(row: Mapping[str, Any]) -> str:
    """A position in words: label, its probability and rank, entropy, tail, the teacher's first choice."""
    rank = f"rank {row['label_rank']}" if row["label_rank"] else f"not among {row['num_kept']} kept"
    probability = format_probability(math.exp(row["label_log_prob"]))
    label = f"target {row['row']}: “{token_text(row['label'])}” has {probability}"
    if not row["num_kept"]:
        return label
    parts = [
        f"{label} ({rank})",
        f"entropy {row['entropy']:.3f} nats",
        f"tail {format_probability(row['tail'])}",
    ]
    if row["top"] and row["label_rank"] != 1:
        first = row["top"][0]
        parts.append(f"first choice “{token_text(first)}” {format_probability(math.exp(first['log_prob']))}")
    return "; ".join(parts)


def _others(row: Mapping[str, Any], shown: Sequence[float]) -> float:
    """What is left of one, and no less than the tail: a cache rounds what it keeps, not what it leaves out."""
    tail = float(row["tail"]) - (0.0 if row["label_rank"] else math.exp(row["label_log_prob"]))
    return max(0.0, tail, 1 - math.fsum(shown))


def _text(parts: Sequence[Markup]) -> Markup:
    return Markup('<div class="text">{}</div>').format(Markup("").join(parts))


def _prompt(text: str, length: int | None) -> Markup:
    if length is not None and len(text) > length:
        half = length // 2
        text = f"{text[:half]} [… {len(text) - 2 * half:,} characters …] {text[-half:]}"
    return Markup('<span class="prompt">{}</span>').format(_flowing(text))


def _token(
    text: str, number: int, level: int, words: str, link: Callable[[int], str] | None, selected: int | None
) -> Markup:
    look = f"tok s{level}" + (" selected" if number == selected else "")
    # A token that only begins a character has no text of its own, and is there all the same.
    shown = _flowing(text) if text else Markup('<span class="part">▫</span>')
    if link is None:
        return Markup('<span class="{}" data-row="{}" title="{}">{}</span>').format(look, number, words, shown)
    return Markup('<a class="{}" data-row="{}" title="{}" href="{}" tabindex="{}"{}>{}</a>').format(
        look,
        number,
        words,
        link(number),
        0 if number == (selected or 0) else -1,
        Markup(' aria-current="true"') if number == selected else "",
        shown,
    )


def _outcome(outcome: Mapping[str, Any], series: Sequence[Series], spans: Sequence[tuple[float, float]]) -> Markup:
    token = outcome["token"]
    if token is None:
        name = Markup('<span class="dim">{}</span>').format(OTHERS)
    else:
        name = Markup('<bdi class="token-text">{}</bdi>').format(token_text(token))
    if outcome["is_label"]:
        name += Markup(' <span class="badge">label</span>')
    cells = [_cell(outcome, column, span) for column, span in zip(series, spans, strict=True)]
    look = Markup(' class="is-label"') if outcome["is_label"] else ""
    return Markup('<tr{}><th scope="row">{}</th>{}</tr>').format(look, name, Markup("").join(cells))


def _cell(outcome: Mapping[str, Any], column: Series, span: tuple[float, float]) -> Markup:
    value, hint = outcome[column.key], Markup()
    if value is None:
        return Markup('<td data-name="{}"><span class="value dim" title="not known">?</span></td>').format(column.title)
    if column.key in outcome.get("assumed", ()):
        hint = Markup(' title="not kept by its cache: a share of the mass outside"')
    shown = _signed(value) if column.is_signed else _share(value)
    look = "value assumed" if hint else "value"
    return Markup('<td data-name="{}"><span class="{}"{}>{}</span>{}</td>').format(
        column.title, look, hint, shown, _bar(value, column, span)
    )


def _bar(value: float, column: Series, span: tuple[float, float]) -> Markup:
    low, high = span
    zero, end = -low / (high - low), (min(max(value, low), high) - low) / (high - low)
    middle = ""
    if low < 0:
        middle = Markup('<line x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(100 * zero)
    return Markup(
        '<svg class="bar {}" aria-hidden="true"><rect x="{:.2f}%" width="{:.2f}%" height="100%"/>{}</svg>'
    ).format(column.look, 100 * min(zero, end), 100 * abs(end - zero), middle)


def _spans(series: Sequence[Series], outcomes: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The least and the largest value of each bar: one scale for all probabilities, one for what is signed."""
    values = {column.key: [o[column.key] for o in outcomes if o[column.key] is not None] for column in series}
    shares = [
        value for column in series if not column.is_signed and column.look != "label" for value in values[column.key]
    ]
    share, signed = _scale(shares), _scale([v for c in series if c.is_signed for v in values[c.key]])
    # A target that is negative by less than a bar could show takes no half of the width.
    low = -share if any(value < -0.02 * share for value in shares) else 0.0
    spans = {False: (low, share), True: (-signed, signed)}
    return [(0.0, 1.0) if column.look == "label" else spans[column.is_signed] for column in series]


def _scale(values: Sequence[float]) -> float:
    """The end of a scale that holds them; few different ones, so that bars can be compared while numbers move."""
    largest = max([0.0, *map(abs, values)])
    return next((end for end in (0.1, 0.2, 0.5, 1.0) if largest <= end + 1e-9), largest)


def _share(value: float) -> str:
    return "0" if value == 0 else format_probability(value) if value > -5e-5 else f"{value:.4f}"


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.4f}" if abs(value) >= 5e-5 else f"{value:+.0e}"


def _flowing(text: str) -> str:
    """Running text; line breaks are broken, and shown: they are tokens too."""
    return printable(text).replace("\n", "↵\n")
