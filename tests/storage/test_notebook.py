"""A cache and a sample as a notebook shows them: bounded, escaped, without reading rows, and never an error."""

import pickle
import re
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("markupsafe", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Cache
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache

VOCAB, K = 40, 5
WORDS = ["<script>alert(1)</script>", "</style>", "\x1b[31m", *(f" w{i}" for i in range(VOCAB - 3))]


@pytest.fixture
def folder(tmp_path):
    samples, topks = make_samples(20, K, VOCAB)
    ids = np.arange(6000, dtype=np.int32) % VOCAB
    samples[3] = (ids, np.array([[3000, 6000]], np.int32))
    topks[3] = make_topk(3000, K, VOCAB, labels=ids[3000:])
    columns = {"note": ["<b>bold</b>" * 1000] * 20}
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=64)
    write_cache(str(tmp_path / "cache"), samples, topks, identity=identity, vocabulary=WORDS, columns=columns)
    return tmp_path / "cache"


def without_style(markup):
    return re.sub(r"<style>.*?</style>", "", markup, flags=re.S)


def test_a_cache_is_drawn_from_what_is_in_memory(folder):
    cache = Cache.open(str(folder))
    rows = np.concatenate([sample.topk.label_log_prob for sample in cache]).astype(np.float64)
    cache = Cache.open(str(folder))
    for name in ("shards", "samples", "vocabulary", "commits"):
        shutil.rmtree(folder / name)
    shown = cache._repr_html_()
    assert f"{rows.mean():.4f} nats on average" in shown and "<dd>20</dd>" in shown
    assert len(shown) < 20_000


def test_a_sample_is_drawn_escaped_and_no_longer_than_bearable(folder):
    cache = Cache.open(str(folder))
    for index in (0, 3):
        shown = without_style(cache[index]._repr_html_())
        assert len(shown) < 150_000 and "\x1b" not in shown
        assert set(re.findall(r"<([a-z]+)", shown)) <= {
            *("div", "dl", "dt", "dd", "p", "span", "table", "caption", "thead", "tbody", "tr", "th", "td", "bdi"),
            *("svg", "rect"),
        }
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown and "2,600 more target tokens" in shown


def test_style_sheets_reach_no_further_than_the_view(folder):
    style = re.search(r"<style>(.*?)</style>", Cache.open(str(folder))._repr_html_(), re.S)[1]
    depth, outer = 0, ""
    for char in re.sub(r"/\*.*?\*/", "", style, flags=re.S):
        depth -= char == "}"
        outer += char if depth == 0 and char not in "{}" else ("," if char == "{" and depth == 0 else "")
        depth += char == "{"
    selectors = [selector.strip() for selector in re.split(r"[,\n]", outer) if selector.strip()]
    assert depth == 0 and selectors and all("logitcache-view" in selector for selector in selectors)
    assert ":root" not in style


def test_a_sample_travels_without_its_cache(folder):
    sample = pickle.loads(pickle.dumps(Cache.open(str(folder))[0]))
    assert sample.spelling is None and sample._repr_html_() is None
    assert len(sample.topk) == len(sample.labels)


def test_damage_is_a_message_and_missing_packages_are_plain_text(folder, monkeypatch):
    sample = Cache.open(str(folder))[0]
    for part in (folder / "vocabulary").iterdir():
        part.write_bytes(bytes(part.stat().st_size))
    assert "crc32c" in sample._repr_html_()
    monkeypatch.setitem(sys.modules, "markupsafe", None)
    monkeypatch.delitem(sys.modules, "logitcache_storage.inspect.html", raising=False)
    assert sample._repr_html_() is None and Cache.open(str(folder))._repr_html_() is None
