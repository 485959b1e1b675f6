"""`logitcache report`: one file that loads nothing, true to the cache, whatever its text and its state."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.inspect.report import MAX_TARGETS
from logitcache_storage.sample_statistics import load_statistics
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache
from logitcache_storage.topk import TopKLogProbs

VOCAB, K, LONG = 60, 6, 6
HOSTILE = [
    "<script>alert(1)</script>",
    "</style></body>",
    '" onmouseover="alert(1)',
    "<img src=http://x/y>",
    "\x1b[31m",
]
WORDS = [*HOSTILE, "\n", "日本語", *(f" w{i}" for i in range(VOCAB - len(HOSTILE) - 2))]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def write(folder, num_samples=40, **settings):
    samples, topks = make_samples(num_samples, K, VOCAB, seed=4)
    if settings.pop("with_long", False):
        ids = np.tile(np.arange(VOCAB, dtype=np.int32), 400)
        samples[LONG] = (ids, np.array([[1, len(ids)]], np.int32))
        topks[LONG] = make_topk(len(ids) - 1, K, VOCAB, seed=1, labels=ids[1:])
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=64)
    columns = {"note": ["<script>x</script>"] * num_samples}
    write_cache(str(folder), samples, topks, identity=identity, vocabulary=WORDS, columns=columns, **settings)
    return str(folder)


class Elements(HTMLParser):
    """Tags, attributes, and the text outside style sheets."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self._in_style = [], [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self._in_style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self._in_style else data

    def handle_endtag(self, tag):
        self._in_style = False


def report(url, path, *words, status=0):
    assert main(["report", url, "--output", str(path), *words]) == status
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_it_says_what_the_cache_says(tmp_path, capsys):
    url = write(tmp_path / "cache")
    page = Elements(report(url, tmp_path / "r.html"))
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}: {(tmp_path / 'r.html').stat().st_size / 1000:.1f} KB\n"
    cache, words = Cache.open(url), re.sub(r"\s+", " ", page.text)
    rows = np.concatenate([sample.topk.label_log_prob for sample in cache]).astype(np.float64)
    assert f"{rows.mean():.3f} nats mean label log-prob" in words
    assert f"{len(cache)} samples" in words
    table = load_statistics(cache)
    surprising = int(np.argmin([sample.topk.label_log_prob.min() for sample in cache]))
    ordinary = int(table.order("mean_label_log_prob")[len(cache) // 2])
    for index in {surprising, ordinary}:
        assert f"Sample {index}, test:{index + 1}, key {cache.key(index)}, {len(cache[index].topk)} targets" in words
    uncertain = max(range(len(cache)), key=lambda i: table.column("mean_entropy")[i])
    first = re.search(r"<h2>Most uncertain samples.*?<tbody>\s*<tr>(.*?)</tr>", (tmp_path / "r.html").read_text(), re.S)
    assert f"test:{uncertain + 1}<" in first[1]


def test_it_loads_nothing_and_text_of_the_corpus_is_text(tmp_path):
    page = Elements(report(write(tmp_path / "cache"), tmp_path / "r.html"))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} and not names & {"src", "style", "href"}
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text and r"\x1b[31m" in page.text
    raw = (tmp_path / "r.html").read_text()
    assert not re.search(r"url\((?!#)|@import|https?://", raw.split("<style>")[1].split("</style>")[0])


def test_equal_caches_give_equal_reports(tmp_path):
    url = write(tmp_path / "cache")
    assert report(url, tmp_path / "a.html") == report(url, tmp_path / "b.html")


def test_long_samples_are_cut_and_the_file_stays_small(tmp_path):
    page = report(write(tmp_path / "cache", with_long=True), tmp_path / "r.html")
    assert len(page) < 3_000_000
    assert page.count("data-row") <= 2 * MAX_TARGETS and "more target tokens" in page


def test_plots_are_png_files_and_old_files_are_replaced(tmp_path, capsys):
    (tmp_path / "r.html").write_text("old")
    page = report(write(tmp_path / "cache"), tmp_path / "r.html", "--plots", str(tmp_path / "plots"))
    assert "old" not in page[:100]
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["entropy.png", "kept_mass.png", "label_log_prob.png", "label_rank.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert "entropy.png" in capsys.readouterr().out
    assert not list(tmp_path.glob(".r.html*"))


@pytest.mark.parametrize("state", ["unfinished", "empty"])
def test_an_unfinished_cache_is_reported_as_far_as_it_is(tmp_path, state):
    page = report(write(tmp_path / "cache", commit_shards={"unfinished": 2, "empty": 0}[state]), tmp_path / "r.html")
    text = re.sub(r"\s+", " ", Elements(page).text)
    committed = len(Cache.open(str(tmp_path / "cache")))
    assert f"{committed} of 40 samples are committed" in text
    assert ("Most uncertain samples" in text) is (state == "unfinished")


def test_a_damaged_shard_is_a_message_in_the_report(tmp_path, capsys):
    url = write(tmp_path / "cache")
    for shard in Path(url).glob("shards/*"):
        for data in [path for path in shard.rglob("*") if path.is_file() and path.name != "zarr.json"]:
            data.write_bytes(bytes(len(data.read_bytes())))
    page = Elements(report(url, tmp_path / "r.html", status=1))
    assert "crc32c" in page.text and "Target tokens" in page.text
    assert "logitcache report: " in (said := capsys.readouterr()).err and "crc32c" in said.err and "KB" in said.out


def test_of_labels_alone_nothing_is_made_up(tmp_path, capsys):
    samples, topks = make_samples(20, K, VOCAB)
    labels_alone = [TopKLogProbs.of_labels(topk.label_log_prob) for topk in topks]
    identity = make_identity(k=0, vocab_size=VOCAB, role="reference")
    write_cache(str(tmp_path / "cache"), samples, labels_alone, identity=identity, vocabulary=WORDS)
    text = Elements(report(str(tmp_path / "cache"), tmp_path / "r.html")).text
    assert "nats mean label log-prob" in text and "Not known: the cache keeps no ids" in text
    assert "entropy" not in text and "kept mass" not in text and "Most uncertain" not in text
    assert main(["doubtful", str(tmp_path / "cache")]) == 0
    assert "keeps no ids (k = 0)" in capsys.readouterr().out


def test_damaged_samples_are_a_message_in_the_report(tmp_path):
    url = write(tmp_path / "cache")
    whole = report(url, tmp_path / "r.html")
    for path in Path(url).glob("samples/*.parquet"):
        path.write_bytes(bytes(path.stat().st_size))
    page = Elements(report(url, tmp_path / "r.html", status=1))
    assert "crc32c" in page.text and page.text.count("crc32c") < 10 and "test:" in whole
    assert re.search(r"[\d.]+\s+nats mean label log-prob", page.text)


def test_a_cache_on_s3(tmp_path, s3_server):
    url = s3_server.new_url()
    samples, topks = make_samples(20, K, VOCAB)
    identity = make_identity(k=K, vocab_size=VOCAB)
    write_cache(url, samples, topks, identity=identity, vocabulary=WORDS, storage_options=s3_server.storage_options)
    page = report(url, tmp_path / "r.html", "--storage-options", json.dumps(s3_server.storage_options))
    assert url in page and str(s3_server.port) not in page


def test_plots_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "plots").write_text("a file")
    assert main(["report", "/nowhere", "--output", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots")]) == 2
    assert "plots is a file; give the name of a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"), [("", "is a folder; give the name"), ("none/r.html", "there is no folder")]
)
def test_what_cannot_be_written_is_said_before_anything_is_read(tmp_path, capsys, output, message):
    assert main(["report", "/nowhere", "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err
