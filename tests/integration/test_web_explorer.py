"""The target explorer in a real browser: what it shows is p minus the gradient that autograd finds.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
import re
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

from logitcache_storage.cache import Cache
from logitcache_storage.inspect.data import token_data
from logitcache_storage.inspect.draw import token_text
from logitcache_storage.testing import make_identity, make_topk, write_cache
from logitcache_train import objective, target_loss

expect = pytest.importorskip("playwright.sync_api", reason="pip install 'logitcache[dev]'").expect
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WORDS = ["<script>alert(1)</script>", " שלום", "\u202eevil", "\n", "<b>", *(f" w{i}" for i in range(25))]
VOCAB, K, ROW = len(WORDS), 6, 5
HALF_A_DIGIT = 5.001e-5
"""Probabilities are shown with four digits."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A teacher and a student of one corpus, the student without one of its samples."""
    rng = np.random.default_rng(0)
    samples = [(rng.integers(VOCAB, size=20).astype(np.int32), np.array([[8, 20]], np.int32)) for _ in range(4)]
    identity = make_identity(k=K, vocab_size=VOCAB)
    urls = []
    for name, seed, count in (("teacher", 1, 4), ("student", 2, 3)):
        topks = [make_topk(12, K, VOCAB, seed=seed * 100 + i, labels=ids[8:]) for i, (ids, _) in enumerate(samples)]
        urls.append(str(tmp_path_factory.mktemp(name)))
        write_cache(urls[-1], samples[:count], topks[:count], identity=identity, vocabulary=WORDS)
    return [Cache.open(url) for url in urls]


@pytest.fixture(scope="module")
def address(caches, serve):
    return serve(*(cache.store.url for cache in caches))


def student_of(topk, label, p_label=None):
    """The distribution of a row over the vocabulary, in float64, [V]: the tail evenly where nothing is known."""
    p_V = np.full(VOCAB, np.nan)
    p_V[topk.ids[0]] = np.exp(topk.log_probs[0].astype(np.float64))
    p_V[label] = math.exp(topk.label_log_prob[0])
    p_V[np.isnan(p_V)] = (1 - np.nansum(p_V)) / np.isnan(p_V).sum()
    if p_label is not None:
        p_V *= (1 - p_label) / (1 - p_V[label])
        p_V[label] = p_label
    return p_V


def expected_target(caches, index, name, p_label=None, **parameters):
    """(p, p - g) with g by autograd of the readable loss, [V] each."""
    teacher, student = (cache[index] for cache in caches)
    label = int(teacher.labels[ROW])
    p_V = student_of(student.topk[ROW : ROW + 1], label, p_label)
    z_V = torch.tensor(np.log(p_V), requires_grad=True)
    roles = {"teacher": teacher.topk[ROW : ROW + 1], "reference": student.topk[ROW : ROW + 1]}
    row = objective(name, **parameters)
    cached = {role: roles[role] for role in row.roles}
    target_loss(z_V[None], torch.tensor([label]), row, cached).sum().backward()
    return p_V, p_V - z_V.grad.numpy()


def shown(page, name):
    """{token as it is shown: number} of a column of the table; the last row is all others."""
    rows = page.locator("table.outcomes tbody tr").all()
    return {
        re.sub(r"\s*label$", "", row.locator("th").inner_text()).strip(): float(
            row.locator(f'td[data-name="{name}"] .value').inner_text()
        )
        for row in rows
    }


def check(page, caches, index, name, **values):
    p_V, target_V = expected_target(caches, index, name, **values)
    vocabulary = caches[0].vocabulary
    names = {token_text(token_data(vocabulary, a)): a for a in range(VOCAB)}
    targets, gradients, own = (shown(page, title) for title in ("target Q", "gradient p - Q", "student p"))
    tokens = {names[token]: token for token in targets if token != "all others"}
    assert len(tokens) == 13
    for a, token in tokens.items():
        # The float32 numbers of a cache sum to one within 1e-6.
        assert targets[token] == pytest.approx(target_V[a], abs=HALF_A_DIGIT + 2e-6)
        assert own[token] == pytest.approx(p_V[a], abs=HALF_A_DIGIT + 2e-6)
        assert gradients[token] == pytest.approx(p_V[a] - target_V[a], abs=HALF_A_DIGIT + 4e-6)
    others = 1 - sum(target_V[a] for a in tokens)
    assert targets["all others"] == pytest.approx(others, abs=HALF_A_DIGIT + 2e-5)


def test_moving_eta_and_the_label_moves_the_target_as_the_loss_does(address, caches, open_page):
    page = open_page(f"{address}/explorer?sample=0&row={ROW}&objective=target_sft&eta=0.5")
    check(page, caches, 0, "target_sft", eta=0.5)
    before = page.locator("#target").inner_text()
    for slider, value, given in (("eta", "0.85", {"eta": 0.85}), ("p_label", "0.3", {"eta": 0.85, "p_label": 0.3})):
        page.locator(f"input[type=range][data-for={slider}]").fill(value)
        expect(page).to_have_url(re.compile(rf"[?&]{slider}={value}(&|$)"))
        expect(page.locator(f"#{slider}")).to_have_value(value)
        check(page, caches, 0, "target_sft", **given)
    assert page.locator("#target").inner_text() != before
    again = open_page(page.url)  # the address is all there is to it
    assert again.locator("#target").inner_text() == page.locator("#target").inner_text()
    page.locator("input[type=range][data-for=eta]").press("ArrowLeft")
    expect(page.locator("#eta")).not_to_have_value("0.85")


def test_another_objective_and_another_position(address, caches, open_page):
    page = open_page(f"{address}/explorer?sample=1&row={ROW}&p_label=0.2")
    page.locator("select[name=objective]").select_option("kl_sft")
    expect(page).to_have_url(re.compile("objective=kl_sft"))
    expect(page.locator("select[name=objective]")).to_be_focused()
    page.locator("#weight").fill("0.4")
    expect(page).to_have_url(re.compile(r"weight=0\.4"))
    check(page, caches, 1, "kl_sft", weight=0.4, p_label=0.2)
    page.get_by_role("link", name="next").press("Enter")
    expect(page).to_have_url(re.compile(f"row={ROW + 1}"))
    expect(page.get_by_role("link", name="next")).to_be_focused()
    assert parse_qs(urlsplit(page.url).query)["weight"] == ["0.4"]


def test_what_is_refused_is_said_in_its_place(address, open_page):
    page = open_page(f"{address}/explorer?sample=0&row=1&objective=kl_sft&weight=-1")
    expect(page.get_by_role("alert")).to_contain_text("weight of objective 'kl_sft' must be")
    page.locator("#weight").fill("0.2")
    expect(page.locator("#target caption")).to_contain_text("Q =")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_without_a_script_it_is_a_form(address, caches, open_page):
    page = open_page(f"{address}/explorer?sample=0&row={ROW}", java_script_enabled=False)
    page.locator("#eta").fill("0.25")
    page.get_by_role("button", name="Show").click()
    check(page, caches, 0, "target_sft", eta=0.25)


@pytest.mark.parametrize("path", ["/explorer?sample=0&row=5", "/explorer?sample=3&objective=gem", "/comparison"])
def test_it_fits_a_telephone(address, open_page, path):
    page = open_page(f"{address}{path}", width=390, height=844, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    expect(page.locator("h1")).to_be_visible()


def test_two_caches_are_compared_while_one_looks(address, caches, open_page):
    page = open_page(f"{address}/comparison")
    expect(page.get_by_role("status")).to_contain_text("All 3 samples that both caches hold were compared")
    page.locator("table.cards a").first.click()
    expect(page).to_have_url(re.compile(r"/samples/\d-[0-9a-f]+\?shade=kl"))
