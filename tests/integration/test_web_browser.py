"""The pages of `logitcache serve` in a real browser: what a user does with them, and that nothing is blocked."""

from __future__ import annotations

import csv
import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.inspect.search import SampleSearch
from logitcache_storage.terminal import format_probability
from logitcache_storage.testing import make_identity, make_topk, write_cache
from logitcache_storage.visible import visible

expect = pytest.importorskip("playwright.sync_api", reason="pip install 'logitcache[dev]'").expect
uvicorn = pytest.importorskip("uvicorn", reason="pip install 'logitcache[web]'")

from logitcache_storage.web.app import create_app  # noqa: E402
from logitcache_storage.web.guard import Access  # noqa: E402
from logitcache_storage.web.server import bind  # noqa: E402
from logitcache_storage.web.site import Site  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WORDS = [" apples", " and", " pears", "\n", "\t", " ", " שלום", "日本語", "\u202eevil", "\x1b[31mred", "<b>", "</main>"]
WORDS += [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"'",
    "&amp;",
    "{{ 7*7 }}",
    "javascript:alert(3)",
]
VOCAB, K, NUM_SAMPLES = len(WORDS), 6, 60
PAGES = ("/", "/samples", "/samples?q=apples", "/samples/3", "/samples/3?shade=kl", "/doubtful", "/nowhere")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Two caches of one corpus, whose text is as hostile as its source names and columns."""
    rng = np.random.default_rng(0)
    samples, topks = [], {"a": [], "b": []}
    for i in range(NUM_SAMPLES):
        ids = rng.integers(VOCAB, size=int(rng.integers(12, 60))).astype(np.int32)
        samples.append((ids, np.array([[6, len(ids)]], np.int32)))
        for seed, name in enumerate(topks):
            topks[name].append(make_topk(len(ids) - 6, K, VOCAB, seed=1000 * seed + i, labels=ids[6:]))
    columns = {"note": [f"<script>alert({i})</script>\x1b[2J" for i in range(NUM_SAMPLES)]}
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=500)
    urls = {}
    for name, rows in topks.items():
        urls[name] = str(tmp_path_factory.mktemp(name))
        write_cache(urls[name], samples, rows, identity=identity, vocabulary=WORDS, columns=columns)
    return urls


@pytest.fixture(scope="module")
def address(caches, serve):
    return serve(caches["a"], caches["b"])


@pytest.fixture(scope="module")
def cache(caches):
    return Cache.open(caches["a"])


def row_of(page):
    return int(parse_qs(urlsplit(page.url).query)["row"][0])


def wait_until_shown(page, row):
    # The pages allow no eval, so nothing can be waited for in the browser itself.
    expect(page.locator("#position h2")).to_contain_text(re.compile(rf"^Target {row}\b"))


def wait_for_row(page, row):
    wait_until_shown(page, row)
    assert row_of(page) == row


def test_a_bar_of_a_histogram_leads_to_the_samples_behind_it(address, cache, open_page):
    page = open_page(address)
    page.wait_for_selector("svg.plot a")
    bar = page.locator('svg.plot a[href*="histogram=label_rank"]').first
    assert "tokens" in bar.get_attribute("aria-label")
    bar.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/samples?histogram=label_rank*")
    # The first bar is rank 1: samples where some label is the first choice.
    expected = sum(bool((sample.topk.ids[:, 0] == sample.labels).any()) for sample in cache)
    assert page.locator("main p b").first.inner_text() == str(expected)


def test_the_list_is_sorted_and_searched(address, cache, open_page):
    page = open_page(f"{address}/samples")
    page.get_by_role("link", name="mean log-prob").click()
    page.wait_for_url("**sort=mean_label_log_prob**")
    means = [float(sample.topk.label_log_prob.astype(np.float64).mean()) for sample in cache]
    expected = np.argsort(means, kind="stable")
    shown = [int(text) for text in page.locator("tbody td:first-child").all_inner_texts()]
    assert shown == expected[: len(shown)].tolist()
    page.get_by_role("link", name="mean log-prob").click()
    page.wait_for_url("**order=descending**")
    assert int(page.locator("tbody td:first-child").first.inner_text()) == expected[-1]
    page.get_by_role("searchbox").fill("</main>")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=**")
    having = [i for i, sample in enumerate(cache) if WORDS.index("</main>") in sample.input_ids]
    shown = [int(text) for text in page.locator("tbody td:first-child").all_inner_texts()]
    assert shown == having[: len(shown)] and shown
    assert page.locator("mark").first.inner_text() == "</main>"


def test_a_long_search_goes_on_by_itself_until_it_is_stopped(tmp_path, monkeypatch, open_page):
    monkeypatch.setattr(SampleSearch, "search", partialmethod(SampleSearch.search, seconds=0))  # 1,024 samples a step
    samples = [(np.array([0, i % VOCAB, i // VOCAB % VOCAB, 1], np.int32), np.array([[3, 4]])) for i in range(2100)]
    topk = make_topk(1, K, VOCAB, labels=np.array([1], np.int32))
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=2100, container="arrow")
    write_cache(str(tmp_path), samples, [topk] * len(samples), identity=identity, vocabulary=WORDS)
    with bind("127.0.0.1", 0) as listener, ThreadPoolExecutor(1) as pool:
        app = create_app(Site(Cache.open(str(tmp_path))), Access(None))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        running = pool.submit(server.run, sockets=[listener])
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            page, steps = open_page(address), []
            page.route("**/samples?*after=*", lambda step: steps.append(step))  # which waits for ever
            page.goto(f"{address}/samples?q=nowhere")
            page.get_by_role("button", name="Stop").click()
            link = page.get_by_role("link", name="Go on searching")
            expect(link).to_be_focused()
            expect(page.locator("#found")).to_contain_text("1,024 of 2,100 samples")
            assert len(steps) == 1
            page.unroute("**/samples?*after=*")
            link.press("Enter")
            expect(page.locator("#found")).to_contain_text("Nothing found here. All has been searched.")
        finally:
            server.should_exit = True
        running.result(30)


def test_a_sample_is_walked_through_with_the_keyboard(address, cache, open_page):
    sample = cache[3]
    page = open_page(f"{address}/samples/3")
    start = int(sample.topk.label_log_prob.argmin())
    assert page.locator("#position h2").inner_text().startswith(f"Target {start} ")
    page.locator("#text a[aria-current]").focus()
    page.keyboard.press("Home")
    wait_for_row(page, 0)
    for row in (1, 2, 3):
        page.keyboard.press("ArrowRight")
        wait_for_row(page, row)
        panel = page.locator("#position").inner_text()
        assert f"log-prob {sample.topk.label_log_prob[row]:.3f}" in re.sub(r"\s+", " ", panel)
        shown = page.locator("#position .of-position .token-text").inner_text()
        assert shown.strip("\u200e") == visible(WORDS[sample.labels[row]]).strip("\u200e")
    page.keyboard.press("ArrowLeft")
    wait_for_row(page, 2)
    assert page.evaluate("document.activeElement.dataset.row") == "2"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("End")
    last = len(sample.labels) - 1
    wait_for_row(page, last)
    page.keyboard.press("ArrowRight")  # there is nothing beyond
    assert row_of(page) == last
    page.reload()
    assert page.locator("#position h2").inner_text().startswith(f"Target {last} ")


def test_hovering_shows_a_position_for_as_long_as_it_lasts(address, cache, open_page):
    page = open_page(f"{address}/samples/3?row=0")
    page.locator('#text a[data-row="4"]').hover()
    wait_until_shown(page, 4)
    assert row_of(page) == 0
    page.locator("h1").hover()
    wait_until_shown(page, 0)
    shown = page.locator("#position table.outcomes").first.inner_text()
    topk = cache[3].topk
    for token, log_prob in zip(topk.ids[0], topk.log_probs[0], strict=True):
        assert visible(WORDS[token]).strip("\u200e") in shown and format_probability(math.exp(log_prob)) in shown


def test_without_scripts_tokens_are_links(address, cache, open_page):
    page = open_page(f"{address}/samples/3?row=0", java_script_enabled=False)
    page.locator('#text a[data-row="2"]').click()
    page.wait_for_url("**row=2")
    panel = re.sub(r"\s+", " ", page.locator("#position").inner_text())
    assert panel.startswith("Target 2 ") and f"log-prob {cache[3].topk.label_log_prob[2]:.3f}" in panel


def test_links_to_a_position_and_between_caches(address, open_page):
    page = open_page(f"{address}/samples/3?row=2&shade=kl")
    assert page.locator('a[data-row="2"]').get_attribute("aria-current") == "true"
    assert "second cache" in page.locator(".choices [aria-current]").inner_text()
    page.locator(".choices").get_by_role("link", name="entropy").click()
    page.wait_for_url("**shade=entropy**")
    assert row_of(page) == 2
    page.get_by_role("link", name="sample 4").press("Enter")
    page.wait_for_url("**/samples/4?**")
    expect(page.get_by_role("link", name="sample 5")).to_be_focused()  # one more Enter away
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**row=*")
    page.locator("h1").click()
    page.evaluate("addEventListener('keydown', (event) => (document.title = event.defaultPrevented))")
    for keys, is_ours in (("ArrowLeft", "true"), ("Alt+ArrowLeft", "false")):  # which goes back in the history
        page.keyboard.press(keys)
        expect(page).to_have_title(is_ours)


def test_the_doubtful_are_downloaded_as_csv(address, cache, open_page, tmp_path):
    page = open_page(f"{address}/doubtful?min_probability=0.5")
    page.wait_for_selector("table.doubtful")
    with page.expect_download() as download:
        page.get_by_role("link", name="All as CSV").click()
    path = tmp_path / "doubtful.csv"
    download.value.save_as(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = {
        (i, m)
        for i, sample in enumerate(cache)
        for m in range(len(sample.labels))
        if sample.labels[m] not in sample.topk.ids[m] and sample.topk.log_probs[m, 0] >= math.log(0.5)
    }
    assert {(int(row["sample"]), int(row["row"])) for row in rows} == expected and expected


@pytest.mark.parametrize("path", PAGES)
def test_pages_fit_a_telephone_and_run_no_text_of_the_corpus(address, path, open_page, chromium):
    context = chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    dialogs, said = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{address}{path}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert page.locator("main h1").count() == 1
    assert dialogs == []
    assert said == [] or path == "/nowhere"
    context.close()


def test_light_and_keyboard_from_the_first_key_on(address, open_page):
    page = open_page(address, color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
