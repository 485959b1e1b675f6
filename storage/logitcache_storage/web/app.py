"""The pages as one ASGI application."""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from logitcache_storage.errors import InputError, LogitCacheError, StoreError
from logitcache_storage.visible import printable
from logitcache_storage.web import comparison, doubtful, explorer, overview, samples
from logitcache_storage.web.guard import Access, Guard
from logitcache_storage.web.page import Page, render
from logitcache_storage.web.site import Site

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"


def pages() -> tuple[Page, ...]:
    """All pages, in the order of the navigation."""
    return (overview.PAGE, samples.PAGE, doubtful.PAGE, explorer.PAGE, comparison.PAGE)


def create_app(site: Site, access: Access) -> Guard:
    """The application that a server runs.

    Args:
        site: what is shown.
        access: who may look.
    """
    listed = pages()
    routes = [route for page in listed for route in page.routes]
    app = Starlette(
        routes=[*routes, Mount("/static", StaticFiles(directory=STATIC))],
        exception_handlers={
            HTTPException: _refused,
            LogitCacheError: _failed,
            Exception: _broken,
        },
    )
    app.state.site, app.state.pages = site, listed
    return Guard(app, access)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = "There is no such page" if error.status_code == 404 else "This cannot be shown"
    # A detail of our own says what is wrong; that of the router is the name of the status.
    is_ours = error.detail != HTTPStatus(error.status_code).phrase
    problem = error.detail if is_ours else f"nothing stands at {request.url.path}"
    return render(request, "problem.html", title=title, problem=problem, status=error.status_code)


def _failed(request: Request, error: Exception) -> Response:
    status = 400 if isinstance(error, InputError) else 502 if isinstance(error, StoreError) else 500
    return render(request, "problem.html", title="This cannot be shown", problem=str(error), status=status)


def _broken(request: Request, error: Exception) -> Response:
    log.error("%s", printable(str(request.url)), exc_info=error)
    problem = f"unexpected error: {type(error).__name__}; the terminal of 'logitcache serve' says more"
    return render(request, "problem.html", title="This cannot be shown", problem=problem, status=500)
