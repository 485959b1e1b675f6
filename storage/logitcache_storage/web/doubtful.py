"""Labels that are probably wrong: listed, as CSV, and as a column to train with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.inspect.doubtful import DEFAULT_MIN_PROBABILITY, csv_parts, doubtful_positions, parquet_parts
from logitcache_storage.inspect.doubtful_reading import DoubtfulPosition, Reading
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.web.page import Page, Query, link, render, site_of
from logitcache_storage.web.site import Side, sample_name

log = logging.getLogger(__name__)

STEP = 50
"""Positions on a page, and how many more are shown at a time."""
MOST_SHOWN = 1000
TOKENS_BEFORE, CHARACTERS_BEFORE = 16, 48
"""Of the text before a label."""


def show(request: Request) -> Response:
    """The surest doubts."""
    side, query = site_of(request).first, Query(request)
    table = side.table
    threshold, limit = _threshold(query), query.integer("limit", STEP, low=1, high=MOST_SHOWN)
    about: dict[str, Any] = {"title": "Doubtful labels", "side": side, "table": table, "threshold": threshold}
    if table is None:
        return render(request, "doubtful.html", found=None, **about)
    found = doubtful_positions(side.cache, table, min_probability=threshold, limit=limit)
    more = min(limit + STEP, MOST_SHOWN)
    return render(
        request,
        "doubtful.html",
        found=found,
        problems=[problem for problem in found.problems if problem not in table.problems.values()],
        name_of=lambda item: sample_name(item.index, item.key),
        before=lambda item: _before(side.cache, item),
        more=link("/doubtful", min_probability=threshold, limit=more) if more > limit and not found.is_complete else "",
        most_shown=MOST_SHOWN,
        csv=link("/doubtful.csv", min_probability=threshold),
        parquet=link("/doubtful.parquet", min_probability=threshold),
        **about,
    )


def download_csv(request: Request) -> Response:
    """All of them, a line each."""
    parts = csv_parts(_reading(request))
    return _download((part.encode("utf-8", "backslashreplace") for part in parts), "doubtful.csv", "text/csv")


def download_column(request: Request) -> Response:
    """A weight for every target token, 0 where its label is doubtful."""
    return _download(parquet_parts(_reading(request)), "doubtful.parquet", "application/vnd.apache.parquet")


def _reading(request: Request) -> Reading:
    side = site_of(request).first
    return Reading(side.cache, _table(side), _threshold(Query(request)))


def _download(parts: Iterator[bytes], name: str, media_type: str) -> Response:
    """A file that is sent while it is made; one that cannot be ended is cut off, which a browser tells its user."""
    first = next(parts)  # what is known to be wrong by now becomes a page

    def sent() -> Iterator[bytes]:
        yield first
        try:
            yield from parts
        except LogitCacheError as e:
            log.error("%s: %s", name, e)
            raise

    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(sent(), media_type=media_type, headers=headers)


def _before(cache: Cache, item: DoubtfulPosition) -> str:
    """What stands before the label, on one line."""
    ((ids, _),) = cache.read_tokens([item.index])
    text = cache.vocabulary.decode(ids[max(0, item.position - TOKENS_BEFORE) : item.position].tolist())
    return " ".join(text[-CHARACTERS_BEFORE:].split()) + (" " if text.endswith((" ", "\n")) else "")


def _threshold(query: Query) -> float:
    return query.number("min_probability", DEFAULT_MIN_PROBABILITY, low=0.01, high=1.0)


def _table(side: Side) -> SampleTable:
    if side.table is None:
        raise InputError("the statistics of the samples are being read; try again in a while")
    return side.table


PAGE = Page(
    "doubtful",
    "Doubtful labels",
    (
        Route("/doubtful", show),
        Route("/doubtful.csv", download_csv),
        Route("/doubtful.parquet", download_column),
    ),
)
