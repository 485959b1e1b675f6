"""A report, and what a notebook shows, in a real browser: nothing loaded, nothing blocked, light and dark."""

from __future__ import annotations

import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.testing import make_identity, make_samples, write_cache

pytest.importorskip("playwright.sync_api", reason="pip install 'logitcache[dev]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

VOCAB, K = 40, 6
WORDS = ["<script>alert(1)</script>", "</style>", " שלום", "\n", *(f" w{i}" for i in range(VOCAB - 4))]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    samples, topks = make_samples(30, K, VOCAB, max_targets=60)
    folder = str(tmp_path_factory.mktemp("cache"))
    write_cache(folder, samples, topks, identity=make_identity(k=K, vocab_size=VOCAB), vocabulary=WORDS)
    return folder


@pytest.fixture
def open_alone(chromium):
    """A page without a network, and everything that it wrote to its console or asked for."""
    contexts = []

    def open_(**options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        return page, said

    yield open_
    for context in contexts:
        context.close()


def brightness(page, selector, what="backgroundColor"):
    colour = page.eval_on_selector(selector, f"e => getComputedStyle(e).{what}")
    return sum(float(part) for part in colour.strip("rgba()").split(",")[:3]) / 3


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_report_stands_alone(url, tmp_path, open_alone, scheme, width):
    path = tmp_path / "report.html"
    assert main(["report", url, "--output", str(path)]) == 0
    page, said = open_alone(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    assert said == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    if width < 640:  # rows are cards, and what stands before a value is not broken into letters
        widths = "cells => cells.map((cell) => parseFloat(getComputedStyle(cell, '::before').width))"
        assert min(page.locator("table.cards td[data-name]").evaluate_all(widths)) > 24
        heights = page.locator("svg.plot text").evaluate_all("all => all.map((t) => t.getBoundingClientRect().height)")
        assert min(heights) > 9
    is_dark = scheme == "dark"
    assert (brightness(page, "body") < 60) is is_dark and (brightness(page, "body", "color") > 190) is is_dark
    bars = page.locator("svg.plot path[fill='var(--bar)']")
    assert page.locator("svg.plot").count() == 4
    assert bars.first.evaluate("e => getComputedStyle(e).fill") == "rgb(91, 141, 239)"
    assert page.locator(".tok.s9").first.evaluate("e => getComputedStyle(e).textDecorationLine") == "underline"
    page.emulate_media(media="print")
    assert brightness(page, "body", "color") < 60  # paper is white


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_notebook_keeps_its_own_looks_and_lends_its_theme(url, open_alone, theme):
    cache = Cache.open(url)
    shown = cache._repr_html_() + cache[0]._repr_html_()
    page, said = open_alone(color_scheme="light" if theme == "dark" else "dark")
    own = (
        '<body data-jp-theme-light="{}"><p id="own" class="text s9">own</p><table><tr><td id="cell">1</td></tr></table>'
    )
    page.set_content(own.format(str(theme == "light").lower()))
    before = [page.eval_on_selector(f"#{name}", "e => JSON.stringify(getComputedStyle(e))") for name in ("own", "cell")]
    page.eval_on_selector("body", "(body, html) => body.insertAdjacentHTML('beforeend', html)", shown)
    after = [page.eval_on_selector(f"#{name}", "e => JSON.stringify(getComputedStyle(e))") for name in ("own", "cell")]
    assert said == [] and before == after
    assert (brightness(page, ".logitcache-view") < 60) is (theme == "dark")
    strongest = page.locator(".legend .s9").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert strongest == {"light": "rgb(201, 58, 52)", "dark": "rgb(185, 63, 51)"}[theme]
