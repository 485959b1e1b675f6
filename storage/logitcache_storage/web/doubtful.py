"""Labels that are probably wrong: listed, as CSV, and as a column to train with."""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import islice

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_storage.inspect.doubtful import (
    DEFAULT_MIN_PROBABILITY,
    DoubtfulPosition,
    csv_lines,
    doubtful_positions,
    write_columns,
)
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.web.page import Page, Query, link, render, site_of
from logitcache_storage.web.site import Side, sample_name

STEP = 50
"""Positions on a page, and how many more are shown at a time."""
MOST_SHOWN = 1000
PART_BYTES, PART_LINES = 1 << 18, 1000
"""Of a download, sent at a time."""
TOKENS_BEFORE, CHARACTERS_BEFORE = 16, 48
"""Of the text before a label."""


def show(request: Request) -> Response:
    """The surest doubts."""
    side, query = site_of(request).first, Query(request)
    threshold, limit = _threshold(query), query.integer("limit", STEP, low=1, high=MOST_SHOWN)
    if side.table is None:
        return render(request, "doubtful.html", title="Doubtful labels", side=side, found=None, threshold=threshold)
    found = doubtful_positions(side.cache, side.table, min_probability=threshold, limit=limit)
    more = min(limit + STEP, MOST_SHOWN)
    return render(
        request,
        "doubtful.html",
        title="Doubtful labels",
        side=side,
        found=found,
        threshold=threshold,
        name_of=lambda item: sample_name(item.index, item.key),
        before=lambda item: _before(side.cache, item),
        more=link("/doubtful", min_probability=threshold, limit=more) if more > limit and not found.is_complete else "",
        most_shown=MOST_SHOWN,
        csv=link("/doubtful.csv", min_probability=threshold),
        parquet=link("/doubtful.parquet", min_probability=threshold),
    )


def download_csv(request: Request) -> Response:
    """All of them, a line each."""
    side = site_of(request).first
    table, threshold = _table(side), _threshold(Query(request))
    found = doubtful_positions(side.cache, table, min_probability=threshold, limit=None)
    headers = {"content-disposition": 'attachment; filename="doubtful.csv"'}
    lines = csv_lines(found.positions)
    parts = iter(lambda: "".join(islice(lines, PART_LINES)), "")
    return StreamingResponse(parts, media_type="text/csv", headers=headers)


def download_column(request: Request) -> Response:
    """A weight for every target token, 0 where its label is doubtful."""
    side = site_of(request).first
    table, threshold = _table(side), _threshold(Query(request))
    # It has no name, so nothing stays behind, however the download ends.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    write_columns(side.cache, table, file, min_probability=threshold)
    size = file.tell()
    file.seek(0)
    headers = {"content-disposition": 'attachment; filename="doubtful.parquet"', "content-length": str(size)}
    parts = iter(partial(file.read, PART_BYTES), b"")
    return StreamingResponse(parts, media_type="application/vnd.apache.parquet", headers=headers)


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
