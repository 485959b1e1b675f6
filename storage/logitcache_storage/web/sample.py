"""One sample: its text with the target tokens shaded, and the distribution at one of its positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logitcache_storage.divergence import compare_sample
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.inspect.data import positions, segments
from logitcache_storage.inspect.html import MEASURES, Series, distribution, legend, outcomes, tokens
from logitcache_storage.web.page import Query, link, render, render_fragment, site_of
from logitcache_storage.web.site import Place, Side, Site, sample_name

SHORT = {"label": "label", "entropy": "entropy", "tail": "tail", "kl": "second cache"}
"""What the measures are called where there is little room."""
MAX_PROMPT = 3000
"""Characters of a text between targets that are shown: its beginning and its end."""
TARGETS_AT_ONCE = 2000
"""Target tokens on one page."""
CHOICES_SHOWN = 12
"""Choices of the teacher that are shown unfolded."""


def show(request: Request) -> Response:
    """The sample, with the position that the URL names, or the most surprising one."""
    site, query = site_of(request), Query(request)
    index = find(site.first, request)
    asked = query.choice("shade", measures_of(site), "label")
    place, problem = _read(site.first, index)
    if place is None:
        return render(request, "sample_damaged.html", title=f"Sample {index}", index=index, problem=problem)
    other, second_problem = _counterpart(site, place)
    measures = [name for name in measures_of(site) if name != "kl" or other]
    shade = asked if asked in measures else "label"
    log_probs = place.sample.topk.label_log_prob.astype(np.float64)
    row = query.optional_integer("row", high=len(log_probs) - 1)
    if row is None:
        row = int(log_probs.argmin())
    path = request.url.path
    return render(
        request,
        "sample.html",
        title=f"Sample {index}",
        place=place,
        mean=log_probs.mean(),
        perplexity=math.exp(min(-log_probs.mean(), 700.0)),
        second_problem=second_problem,
        shade=shade,
        choices=[(name, SHORT[name], MEASURES[name].title, link(path, shade=name, row=row)) for name in measures],
        legend=legend(shade),
        window=Window.around(row, len(log_probs)),
        at=lambda row: link(path, shade=shade, row=row),
        text=text(site, place, other, shade, row),
        **position_values(site, place, other, row),
    )


def show_position(request: Request) -> Response:
    """The distribution at one position, for a script to put into the page of the sample."""
    site = site_of(request)
    place = site.first.place(find(site.first, request))
    asked, count = request.path_params["row"], len(place.sample.target_positions)
    row = int(asked) if asked.isdecimal() and len(asked) < 16 else count
    if row >= count:
        raise HTTPException(404, f"no row {asked[:50]!r}: the sample has {count} target rows, counted from 0")
    other, _ = _counterpart(site, place)
    return render_fragment(request, "position.html", **position_values(site, place, other, row))


def find(side: Side, request: Request) -> int:
    """Index of the sample that the path names; 404 where there is none."""
    try:
        return side.find(request.path_params["which"])
    except InputError as e:
        raise HTTPException(404, str(e)) from e


def measures_of(site: Site) -> list[str]:
    """What tokens can be shaded by: without ids (k = 0) nothing is known but the label."""
    smallest = min(side.cache.identity.k for side in site.sides)
    return [
        name
        for name in MEASURES
        if name == "label" or (smallest > 0 and site.second if name == "kl" else site.cache.identity.k > 0)
    ]


@dataclass(frozen=True)
class Window:
    """The target rows [start, stop) of a sample of `count`: as many as one page shows."""

    start: int
    stop: int
    count: int

    @classmethod
    def around(cls, row: int, count: int) -> Window:
        """Windows do not overlap: the one that a row stands in."""
        start = row // TARGETS_AT_ONCE * TARGETS_AT_ONCE
        return cls(start, min(start + TARGETS_AT_ONCE, count), count)


def text(site: Site, place: Place, other: Place | None, shade: str, row: int) -> Markup:
    """The text around a target row, its targets shaded, each a link; `data-row` counts from the window's start."""
    sample, vocabulary = place.sample, site.cache.vocabulary
    window = Window.around(row, len(sample.target_positions))
    start, stop = window.start, window.stop
    shown = within(segments(sample, vocabulary), start, stop)
    values = None
    if shade == "kl" and other is not None:
        values = compare_sample(sample, other.sample).kl_ab[start:stop].tolist()
    return tokens(
        shown,
        positions(sample, vocabulary, slice(start, stop), top=1),
        shade,
        values=values,
        link=lambda i: link("", shade=shade, row=start + i),
        selected=row - start,
        max_prompt=MAX_PROMPT,
    )


def within(parts: Sequence[dict[str, Any]], start: int, stop: int) -> list[dict[str, Any]]:
    """The segments with the target rows [start, stop), and what stands before each; behind the last row, the rest."""
    targets = [len(part["texts"]) if part["target"] else 0 for part in parts]
    edges = [0, *itertools.accumulate(targets)]
    kept = []
    for part, (first, last) in zip(parts, itertools.pairwise(edges), strict=True):
        if part["target"] and first < stop and last > start:
            kept.append({**part, "texts": part["texts"][max(0, start - first) : stop - first]})
        elif not part["target"] and (start <= first < stop or first == stop == edges[-1]):
            kept.append(part)
    return kept


def position_values(site: Site, place: Place, other: Place | None, row: int) -> dict[str, Any]:
    """What `position.html` draws."""
    sides = {"first": (site.first, place), **({"second": (site.second, other)} if other else {})}
    rows = {}
    for key, (side, there) in sides.items():
        assert side is not None and there is not None
        cache = side.cache
        (rows[key],) = positions(there.sample, cache.vocabulary, slice(row, row + 1), cache.identity.k)
    series = [Series("first", site.cache.identity.role, "first")]
    if other and site.second:
        series.append(Series("second", "second cache", "second"))
    num_folded = max(len(found["top"]) for found in rows.values()) - CHOICES_SHOWN
    return {
        "rows": rows,
        "row": row,
        "name": sample_name(place.index, place.sample.key),
        "bars": distribution(outcomes(rows, CHOICES_SHOWN), series, ""),
        "all_bars": distribution(outcomes(rows), series, "") if num_folded > 0 else "",
    }


def _read(side: Side, index: int) -> tuple[Place | None, str]:
    """A sample, or why it cannot be read: the rest of the cache is still there to look at."""
    try:
        return side.place(index), ""
    except LogitCacheError as e:
        return None, str(e)


def _counterpart(site: Site, place: Place) -> tuple[Place | None, str]:
    try:
        return site.counterpart(place), ""
    except LogitCacheError as e:
        return None, str(e)


ROUTES = (
    Route("/samples/{which}", show),
    Route("/samples/{which}/positions/{row}", show_position),
)
