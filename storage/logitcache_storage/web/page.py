"""What a page is: a module with a `PAGE`, listed in `app.PAGES`, and templates that extend `base.html`.

    def show(request: Request) -> Response:
        site, query = site_of(request), Query(request)
        eta = query.number("eta", 0.5, low=0.0, high=1.0)
        return render(request, "explorer.html", title="Target explorer", eta=eta)

    PAGE = Page("explorer", "Target explorer", (Route("/explorer", show),))

Handlers are plain functions: each request runs in a thread of its own. What a page shows follows from its URL alone.
The Content-Security-Policy of `guard` allows no `style` attribute, no `<style>` and no inline script: looks are classes
in `static/`, lengths are attributes of SVG, plots colour themselves through presentation attributes and classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from logitcache_storage.errors import InputError
from logitcache_storage.inspect.data import token_text
from logitcache_storage.terminal import format_bytes, format_count, format_duration, format_probability
from logitcache_storage.visible import printable, visible

if TYPE_CHECKING:
    from logitcache_storage.web.site import Site

MAX_QUERY_TEXT = 500
"""Characters of a parameter that is free text."""


@dataclass(frozen=True)
class Page:
    """One page and everything below it; the first of its routes stands in the navigation."""

    name: str
    title: str
    routes: tuple[Route, ...]
    needs_second: bool = False
    """Whether there is nothing to see with one cache alone."""

    @property
    def path(self) -> str:
        """Where the navigation leads."""
        return self.routes[0].path


class Query:
    """The parameters of a request, each checked when it is asked for.

    Every method raises InputError, which becomes a page with status 400, where a value is not as expected.
    """

    def __init__(self, request: Request) -> None:
        self._values: Mapping[str, str] = request.query_params

    def text(self, name: str) -> str:
        """Free text without white space around it; empty where it is not given."""
        value = self._values.get(name, "").strip()
        if len(value) > MAX_QUERY_TEXT:
            raise InputError(f"{name} of {len(value)} characters; give at most {MAX_QUERY_TEXT}")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of several names."""
        value = self._values.get(name, "") or default
        if value not in choices:
            raise InputError(f"{name} is {value[:50]!r}; choose from {', '.join(choices)}")
        return value

    def integer(self, name: str, default: int, *, low: int = 0, high: int | None = None) -> int:
        """A whole number in [low, high]."""
        value = self._values.get(name, "")
        if not value:
            return default
        if not (value.isascii() and value.isdecimal() and len(value) < 16):
            raise InputError(f"{name} is {value[:50]!r}, expected a number counted from {low}")
        number = int(value)
        if number < low or (high is not None and number > high):
            limit = "" if high is None else f" to {high:,}"
            raise InputError(f"{name} is {number:,}, expected {low:,}{limit}")
        return number

    def optional_integer(self, name: str, *, high: int) -> int | None:
        """A whole number in [0, high], or None where it is not given."""
        return self.integer(name, 0, high=high) if self._values.get(name) else None

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """A number in [low, high]."""
        value = self._values.get(name, "")
        if not value:
            return default
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise InputError(f"{name} is {value[:50]!r}, expected a number from {low:g} to {high:g}")
        return number


def site_of(request: Request) -> Site:
    """What is shown: the caches and what is known of them."""
    site: Site = request.app.state.site
    return site


def link(path: str, **parameters: Any) -> str:
    """A path with parameters; those that are None or empty are left out."""
    given = {name: value for name, value in parameters.items() if value is not None and value != ""}
    return f"{path}?{urlencode(given)}" if given else path


def render(request: Request, template: str, *, title: str, status: int = 200, **values: Any) -> Response:
    """A whole page.

    Args:
        request: what is answered.
        template: its name in `templates/`.
        title: of the page, for the window and the history.
        status: of the answer.
        values: what the template is given besides `site`, `pages` and `current` (the path asked for).
    """
    return HTMLResponse(_rendered(request, template, {"title": title, **values}), status_code=status)


def render_fragment(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """A part of a page, for a script to put in its place."""
    return HTMLResponse(_rendered(request, template, values), status_code=status)


def _rendered(request: Request, template: str, values: dict[str, Any]) -> bytes:
    state = request.app.state
    given = {"site": state.site, "pages": state.pages, "current": request.url.path, **values}
    # Text from a corpus is made printable where it is shown; a lone surrogate that slipped through ends no page.
    return templates().get_template(template).render(given).encode("utf-8", "backslashreplace")


@cache
def templates() -> Environment:
    """All templates, with the filters that make text and numbers legible; everything is escaped."""
    environment = Environment(
        loader=PackageLoader("logitcache_storage.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "token": token_text,
        "visible": visible,
        "printable": printable,
        "count": format_count,
        "grouped": lambda number: f"{number:,}",
        "size": format_bytes,
        "duration": format_duration,
        "probability": format_probability,
        "nats": lambda number: f"{number:.3f}",
        "percent": lambda share: f"{100 * share:.1f} %",
    }
    environment.globals["link"] = link
    return environment
