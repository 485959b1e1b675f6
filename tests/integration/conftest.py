"""A real browser, and the server that it looks at: each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

WAIT_MS = 120_000
"""Other tests may have all the cores, and a server that has just started may read its libraries from a cold disk."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium, as Playwright drives it; skips where either is missing.

    Playwright keeps an event loop running in this thread, which other modules may want for themselves.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'logitcache[dev]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright.expect.set_options(timeout=WAIT_MS)
    with playwright.sync_playwright() as p:
        # Its sandbox refuses to run as root.
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a context of its own: `open_page(address, width=390, height=844, color_scheme="dark")`.

    The test fails where a page has written an error to the console, which a breach of the
    Content-Security-Policy does, or asked another machine for anything.
    """
    problems: list[str] = []
    with ExitStack() as contexts:

        def open_(address: str, *, width: int = 1280, height: int = 900, **options: Any) -> Any:
            context = chromium.new_context(viewport={"width": width, "height": height}, **options)
            contexts.callback(context.close)
            context.set_default_timeout(WAIT_MS)
            page = context.new_page()
            origin = address.split("/", 3)[2]
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
            page.on(
                "request",
                lambda asked: (
                    None
                    if asked.url.startswith((f"http://{origin}/", "data:"))
                    else problems.append(f"asked for {asked.url}")
                ),
            )
            page.goto(address)
            return page

        yield open_
    assert problems == []


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs `logitcache serve` with these arguments until the module ends; returns the address that it prints."""
    pytest.importorskip("uvicorn", reason="pip install 'logitcache[web]'")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[str]] = []

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "logitcache_storage.cli", "serve", *args, "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the server said {line!r}"
        return found[0].rstrip("/")

    yield run
    for process in started:
        process.terminate()
        process.wait(10)
