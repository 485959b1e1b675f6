"""The first page: what the cache is, how far its build is, and what the teacher thought in all."""

from __future__ import annotations

from functools import lru_cache

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logitcache_storage.inspect.figures import Bar, histogram, svg
from logitcache_storage.inspect.overview import Histogram, overview
from logitcache_storage.terminal import identity_facts
from logitcache_storage.web.page import Page, link, render, render_fragment, site_of


def show(request: Request) -> Response:
    """Identity, progress, histograms."""
    site = site_of(request)
    side, table = site.first, site.first.table
    found = overview(side.cache, table)
    return render(
        request,
        "overview.html",
        title="Overview",
        found=found,
        facts=identity_facts(side.cache.identity),
        plots=[plot(item) for item in found.histograms],
        side=side,
        table=table,
    )


def show_progress(request: Request) -> Response:
    """How far the statistics are, for a script to keep up to date."""
    site = site_of(request)
    return render_fragment(request, "progress.html", side=site.first)


def show_build(request: Request) -> Response:
    """How far the build is."""
    return render_fragment(request, "build.html", found=overview(site_of(request).cache))


@lru_cache(maxsize=16)
def plot(found: Histogram) -> Markup:
    """A histogram whose bars lead to the samples behind them."""
    bars = [
        Bar(item.name, count, link("/samples", histogram=found.name, bin=item.number) if count else None)
        for item, count in zip(found.bins, found.counts, strict=True)
    ]
    figure = histogram(found.title, found.unit, bars)
    return svg(figure, found.name, f"{found.title}: {found.num_rows:,} tokens in {len(bars)} bars", bars)


PAGE = Page("overview", "Overview", (Route("/", show), Route("/progress", show_progress), Route("/build", show_build)))
