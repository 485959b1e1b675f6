"""Two caches side by side: how far apart they are, and the samples that differ most.

Comparing reads both caches, so it goes on only while somebody looks: every request takes it further for a bounded time,
beginning all over the cache, and the page says how much of it that was.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future
from typing import Any

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from logitcache_storage.cache import Cache
from logitcache_storage.compare import Bin, Comparing, Comparison
from logitcache_storage.errors import CorruptionError
from logitcache_storage.inspect.figures import Bar, histogram, svg
from logitcache_storage.web.page import Page, render, render_fragment, site_of
from logitcache_storage.web.site import sample_name

SECONDS_TO_JOIN = 1.0
"""How long a request waits until it is known which samples belong together; with millions of them that takes longer."""
SECONDS_AT_FIRST = 0.2
"""How long the page itself compares."""
SECONDS_AT_ONCE = 0.7
"""How long each further request does."""
ROWS_AT_ONCE = 4096
SAMPLES_NAMED = 25
MAX_PROBLEMS = 5

_creation = threading.Lock()


class Progress:
    """A comparison, as far as it was asked for; any thread may ask."""

    def __init__(self, a: Cache, b: Cache) -> None:
        self.caches = (a, b)
        self._lock = threading.Lock()
        self._joined: Future[Comparing] = Future()
        self._problems: list[str] = []
        threading.Thread(target=self._join, name="logitcache-comparison", daemon=True).start()

    @property
    def has_failed(self) -> bool:
        """Whether it could not begin; another one may."""
        return self._joined.done() and self._joined.exception() is not None

    def advance(self, seconds: float) -> dict[str, Any]:
        """Compare for about so long, as soon as the samples are joined.

        Returns:
            `is_joined`, and then `found` (None where nothing could be compared), `num_samples` and `num_rows` in all,
            the `share` of these rows that was compared, `is_done` and `problems`.

        Raises:
            InputError: the two cannot be compared.
        """
        try:
            comparing = self._joined.result(SECONDS_TO_JOIN)
        except TimeoutError:
            return {"is_joined": False, "is_done": False, "found": None, "problems": []}
        with self._lock:
            end = time.monotonic() + seconds
            while not comparing.is_done:
                try:
                    comparing.advance()
                except CorruptionError as e:
                    self._problems.append(str(e))
                if time.monotonic() >= end:
                    break
            return self._state(comparing)

    def _join(self) -> None:
        try:
            found = Comparing(*self.caches, top=SAMPLES_NAMED, rows_at_once=ROWS_AT_ONCE, spread=True)
        except Exception as e:
            self._joined.set_exception(e)
        else:
            self._joined.set_result(found)

    def _state(self, comparing: Comparing) -> dict[str, Any]:
        return {
            "is_joined": True,
            "found": comparing.result() if comparing.num_compared else None,
            "num_samples": comparing.num_samples,
            "num_rows": comparing.num_rows,
            "share": comparing.num_compared / comparing.num_rows,
            "is_done": comparing.is_done,
            "problems": list(dict.fromkeys(self._problems)),
        }


def show(request: Request) -> Response:
    """The page, with what is known so far."""
    return render(request, "comparison.html", title="Two caches side by side", **_values(request, SECONDS_AT_FIRST))


def show_further(request: Request) -> Response:
    """What is known after some more of it, for a script to put in its place."""
    values = _values(request, SECONDS_AT_ONCE)
    body = bytes(render_fragment(request, "comparison_found.html", **values).body).decode()
    return JSONResponse({"html": body, "is_done": values["is_done"]})


def plot(found: Comparison) -> Markup:
    """How many tokens have which divergence."""
    bars = [Bar(_bin_name(item), item.num_rows) for item in found.histogram]
    figure = histogram("KL(A || B) by token", "nats", bars)
    return svg(figure, "kl", f"KL(A || B) of {found.num_rows:,} tokens, in {len(bars)} bars", bars)


def _values(request: Request, seconds: float) -> dict[str, Any]:
    site = site_of(request)
    if site.second is None:
        raise HTTPException(404, "there is one cache alone; start 'logitcache serve URL URL_B' with two of one corpus")
    values = _progress(request, site.cache, site.second.cache).advance(seconds)
    found = values["found"]
    rows = [] if found is None else [{"name": sample_name(s.index_a, s.key), **vars(s)} for s in found.most_different]
    values["max_problems"] = MAX_PROBLEMS
    return {**values, "rows": rows, "plot": plot(found) if found is not None and found.histogram else ""}


def _progress(request: Request, a: Cache, b: Cache) -> Progress:
    with _creation:
        found: Progress | None = getattr(request.app.state, "comparison", None)
        if found is None or found.caches != (a, b) or found.has_failed:
            found = request.app.state.comparison = Progress(a, b)
        return found


def _bin_name(found: Bin) -> str:
    if found.high is None:
        return f"{found.low:g} or more"
    return f"{_power(found.low)} to {_power(found.high)}"


def _power(value: float) -> str:
    return f"1e{round(math.log10(value))}" if 0 < value < 0.01 else f"{value:g}"


PAGE = Page(
    "comparison",
    "Two caches",
    (Route("/comparison", show), Route("/comparison/further", show_further)),
    needs_second=True,
)
