"""The pages against what the cache holds; and what they do with hostile text, wrong addresses and damage."""

import csv
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Cache  # noqa: E402
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache  # noqa: E402
from logitcache_storage.web import sample as sample_page  # noqa: E402
from logitcache_storage.web.app import create_app  # noqa: E402
from logitcache_storage.web.guard import Access  # noqa: E402
from logitcache_storage.web.site import Site, sample_name  # noqa: E402

HOSTILE = ["<script>alert(1)</script>", "</main></body>", '" onmouseover="alert(1)', "' x='", "&lt;b&gt;", "{{ 7*7 }}"]
HOSTILE += [
    "\x1b[31mred",
    "\u202eevil",
    "\x00",
    "\x9b2J",
    "<!--",
    "]]>",
    "\u2028",
    "javascript:alert(1)",
    "%s{x}",
    "\r\n",
]
VOCAB, K, NUM_SAMPLES = 50, 6, 70
WORDS = [*HOSTILE, *(f" w{i}" for i in range(VOCAB - len(HOSTILE)))]


class Elements(HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Statistics that are computed are kept below this folder, and not the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    samples, topks = make_samples(NUM_SAMPLES, K, VOCAB)
    others = [make_topk(len(labels_of(s)), K, VOCAB, seed=7 + i, labels=labels_of(s)) for i, s in enumerate(samples)]
    columns = {"note": [f"</li><script>alert({i})</script>" for i in range(NUM_SAMPLES)]}
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=100)
    found = []
    # The second cache has another order of samples, and lacks one.
    for name, order, rows in (("a", range(NUM_SAMPLES), topks), ("b", range(NUM_SAMPLES - 2, -1, -1), others)):
        folder = str(tmp_path_factory.mktemp(name))
        kept = {"note": [columns["note"][i] for i in order]}
        write_cache(
            folder,
            [samples[i] for i in order],
            [rows[i] for i in order],
            identity=identity,
            vocabulary=WORDS,
            columns=kept,
        )
        found.append(folder)
    return found


def labels_of(sample):
    ids, ranges = sample
    return np.concatenate([ids[start:stop] for start, stop in ranges])


def client_of(*folders, ready=True):
    site = Site(*(Cache.open(folder) for folder in folders))
    if ready:
        for side in site.sides:
            side.load_table()
    return testclient.TestClient(create_app(site, Access(None)), base_url="http://localhost")


@pytest.fixture(scope="module")
def client(folders, home):
    return client_of(*folders)


@pytest.fixture(scope="module")
def cache(folders):
    return Cache.open(folders[0])


def listed(page):
    """The samples of a list, by index."""
    return [int(found.replace(",", "")) for found in re.findall(r'<a href="/samples/\d+-\w+">([\d,]+)</a>', page)]


def all_listed(client, address):
    found, page = [], 1
    while True:
        answer = client.get(f"{address}&page={page}")
        assert answer.status_code == 200
        found += listed(answer.text)
        if 'rel="next"' not in answer.text:
            return found
        page += 1


def test_the_overview_says_what_the_cache_says(client, cache):
    page = client.get("/").text
    rows = sum(len(sample.labels) for sample in cache)
    mean = np.concatenate([s.topk.label_log_prob for s in cache]).astype(np.float64).mean()
    text = re.sub(r"\s+", " ", Elements(page).text)
    assert f"{len(cache)} samples" in text and f"{rows} target tokens" in text
    assert f"{mean:.3f} nats mean label log-prob" in text
    assert page.count("<svg") == 4
    # Every token stands in one bar of each histogram.
    for name in ("entropy", "kept_mass", "label_rank", "label_log_prob"):
        bars = re.findall(rf'href="/samples\?histogram={name}&amp;bin=\d+"[^>]*>', page)
        counts = [int(re.search(r": ([\d,]+) tokens", bar)[1].replace(",", "")) for bar in bars]
        assert sum(counts) == rows, name


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean_label_log_prob", lambda s: s.topk.label_log_prob.astype(np.float64).mean()),
        ("min_label_log_prob", lambda s: s.topk.label_log_prob.min()),
        ("num_targets", lambda s: len(s.labels)),
        ("top_1_rate", lambda s: (s.topk.ids[:, 0] == s.labels).mean()),
    ],
)
def test_the_list_is_in_the_order_asked_for(client, cache, name, value, order):
    found = all_listed(client, f"/samples?sort={name}&order={order}")
    assert sorted(found) == list(range(len(cache)))
    values = np.array([value(cache[i]) for i in found], dtype=np.float64)
    steps = np.diff(values) if order == "ascending" else -np.diff(values)
    assert (steps >= -1e-6).all()  # the statistics are kept in float32


def test_a_bar_leads_to_the_samples_behind_it(client, cache):
    page = client.get("/").text
    # Rank 2 has a bin of its own: number 1.
    assert "histogram=label_rank&amp;bin=1" in page
    found = all_listed(client, "/samples?histogram=label_rank&bin=1")
    assert found == [i for i, s in enumerate(cache) if (s.topk.ids[:, 1] == s.labels).any()]


def test_a_search_finds_by_key_source_and_text(client, cache):
    assert listed(client.get(f"/samples?q={cache[9].key[:10]}").text) == [9]
    assert listed(client.get("/samples", params={"q": "test:70"}).text) == [69]
    page = client.get("/samples", params={"q": HOSTILE[0]}).text
    having = [i for i, sample in enumerate(cache) if 0 in sample.input_ids]
    assert listed(page) == having[:25] and having
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in page
    # What is left is searched by following the link.
    found = listed(page)
    while further := re.search(r'href="([^"]+)">Go on searching', page):
        page = client.get(html.unescape(further[1])).text
        found += listed(page)
    assert found == having
    nothing = client.get("/samples", params={"q": "no such text anywhere"}).text
    assert "Nothing found" in nothing and "All has been searched" in nothing


def test_a_sample_shows_its_text_and_any_position(client, cache):
    sample = cache[5]
    for row in range(len(sample.labels)):
        page = client.get(f"/samples/5?row={row}").text
        current = re.search(r'data-row="(\d+)"[^>]*aria-current="true"', page)
        assert int(current[1]) == row
        fragment = client.get(f"/samples/{sample_name(5, sample.key)}/positions/{row}").text
        assert f"<b>{sample.topk.label_log_prob[row]:.3f}</b>" in fragment and fragment.strip() in page
    assert page.count('class="tok ') == len(sample.labels) + 10  # and the legend
    assert f'key <span class="key">{sample.key}</span>' in page


def text_of(client, address):
    """The text of a sample, and where its next window is."""
    page = client.get(address).text
    after = re.search(r'href="([^"]+)" data-edge="ArrowRight"', page)
    return Elements(re.search(r'<div class="text">(.*?)</div>', page, re.S)[1]).text, after and html.unescape(after[1])


def test_windows_cut_targets_and_nothing_else():
    parts = [
        {"target": target, "texts": list(texts)}
        for target, texts in ((False, "ab"), (True, "123"), (False, "cd"), (True, "45"), (False, "e"))
    ]
    shown = ["".join("".join(p["texts"]) for p in sample_page.within(parts, i, i + 2)) for i in (0, 2, 4)]
    assert shown == ["ab12", "3cd4", "5e"]


def test_a_long_sample_is_shown_a_window_at_a_time(client, cache, monkeypatch):
    for index in range(8):  # some have text between their targets
        whole, _ = text_of(client, f"/samples/{index}?row=0")
        with monkeypatch.context() as patch:
            patch.setattr(sample_page, "TARGETS_AT_ONCE", 3)
            shown, address = [], f"/samples/{index}?row=0"
            while address:
                text, address = text_of(client, address)
                shown.append(text)
        assert len(shown) == -(-len(cache[index].labels) // 3)
        assert "".join(shown) == whole


def test_a_sample_has_many_names(client, cache):
    key = cache[5].key
    for name in ("5", key, key[:8], key[:8].upper(), f"5-{key[:12]}"):
        page = client.get(f"/samples/{name}?row=0").text
        assert "<h1>Sample 5</h1>" in page and key in page
    # A link of an earlier moment of the build: the key decides.
    assert key in client.get(f"/samples/9-{key[:12]}").text


def test_the_second_cache_stands_beside_the_first(client, cache, folders):
    second = Cache.open(folders[1])
    i = second.index_of(cache[5].key)
    assert i != 5
    page = client.get("/samples/5?row=0&shade=kl").text
    assert f"<b>{second[i].topk.label_log_prob[0]:.3f}</b>" in page and "second cache" in page
    alone = client.get(f"/samples/{NUM_SAMPLES - 1}?row=0&shade=kl")
    assert alone.status_code == 200 and "of-position second" not in alone.text


def test_doubtful_labels_are_those_the_teacher_is_sure_about(client, cache):
    expected = {
        (i, m): float(np.exp(s.topk.log_probs[m, 0]))
        for i, s in enumerate(cache)
        for m in range(len(s.labels))
        if s.labels[m] not in s.topk.ids[m] and s.topk.log_probs[m, 0] >= np.log(0.6)
    }
    assert expected
    answer = client.get("/doubtful.csv?min_probability=0.6")
    assert answer.headers["content-disposition"] == 'attachment; filename="doubtful.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert {(int(row["sample"]), int(row["row"])) for row in rows} == expected.keys()
    page = client.get("/doubtful?min_probability=0.6&limit=1000").text
    links = re.findall(r'<a href="/samples/(\d+)-\w+\?row=(\d+)" title="look at this position">', page)
    probabilities = [expected[int(i), int(m)] for i, m in links]
    assert len(links) == len(expected) and probabilities == sorted(probabilities, reverse=True)


def test_the_weights_for_training_can_be_read(client, cache, tmp_path):
    (tmp_path / "weights.parquet").write_bytes(client.get("/doubtful.parquet?min_probability=0.6").content)
    table = pq.read_table(tmp_path / "weights.parquet")
    doubtful = 0
    for key, weights in zip(table["key"].to_pylist(), table["critical"].to_pylist(), strict=True):
        sample = cache[cache.index_of(key.hex())]
        is_kept = (sample.topk.ids == sample.labels[:, None]).any(1)
        expected = is_kept | (sample.topk.log_probs[:, 0] < np.log(0.6))
        assert weights == expected.astype(int).tolist()
        doubtful += weights.count(0)
    assert table.num_rows == len(cache) and doubtful


def test_a_mistake_of_ours_is_a_page_and_a_traceback_in_the_terminal(folders, home, monkeypatch, caplog):
    app = client_of(folders[0]).app
    client = testclient.TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    monkeypatch.setattr("logitcache_storage.web.overview.overview", lambda *_: 1 / 0)
    answer = client.get("/")
    assert answer.status_code == 500 and "unexpected error: ZeroDivisionError" in answer.text
    assert answer.headers["content-security-policy"] and "Traceback" not in answer.text
    assert "Traceback" in caplog.text and "http://localhost/" in caplog.text


PAGES = ("/", "/samples", "/samples?q=script", "/samples/0", "/samples/0?shade=entropy", "/samples/3/positions/0")
PAGES += ("/doubtful?min_probability=0.1", "/samples?q=<script>alert(9)</script>", "/samples/<script>alert(9)</script>")


@pytest.mark.parametrize("address", PAGES)
def test_text_of_a_corpus_is_text(client, address):
    page = client.get(address).text
    found = Elements(page)
    assert "alert(9)" not in "".join(value or "" for name, value in found.attributes if name.startswith("on"))
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert found.tags.count("script") == len(re.findall(r'<script src="/static/\w+\.js" defer></script>', page))
    assert "style" not in found.tags
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    links = [value for name, value in found.attributes if name in ("href", "src", "action")]
    assert all(re.match(r"[/?#]|data:,$|$", value) and not value.startswith("//") for value in links)


WRONG = {
    "/nowhere": (404, "nothing stands at /nowhere"),
    "/samples/70": (404, "no sample '70'"),
    "/samples/-1": (200, ""),
    "/samples/abc": (404, "no sample 'abc'"),
    "/samples/0-zzzzzz": (404, "zzzzzz"),
    "/samples/ffffffffffff": (404, "no sample has the key"),
    "/samples/0/positions/9999": (404, "target rows, counted from 0"),
    "/samples/0/positions/-1": (404, "no row '-1': the sample has"),
    "/samples/0/positions/" + "9" * 5000: (404, "target rows, counted from 0"),
    "/samples/" + "9" * 5000: (404, "no sample '999"),
    "/samples/0?row=9999": (400, "row is 9,999, expected 0 to"),
    "/samples/0?row=one": (400, "row is 'one', expected a number"),
    "/samples/0?row=٣": (400, "expected a number"),
    "/samples/0?shade=colour": (400, "shade is 'colour'; choose from label"),
    "/samples?sort=price": (400, "sort is 'price'; choose from index"),
    "/samples?order=up": (400, "order is 'up'"),
    "/samples?page=0": (400, "page is 0, expected 1"),
    "/samples?page=99": (400, "page 99 of 3"),
    "/samples?page=" + "9" * 30: (400, "page is"),
    "/samples?histogram=entropy&bin=99": (400, "bin"),
    "/samples?histogram=none&bin=1": (400, "histogram is 'none'"),
    "/samples?q=" + "x" * 501: (400, "q of 501 characters; give at most 500"),
    "/samples?q=w&after=nonsense": (400, "nonsense"),
    "/doubtful?min_probability=2": (400, "min_probability is '2', expected a number from 0.01 to 1"),
    "/doubtful?min_probability=nan": (400, "expected a number from"),
    "/doubtful?limit=5000": (400, "limit is 5,000, expected 1 to 1,000"),
    "/static/../page.py": (404, "nothing stands at"),
    "/static/%2e%2e/page.py": (404, "nothing stands at"),
    "/static/": (404, "nothing stands at"),
}


@pytest.mark.parametrize("address", WRONG)
def test_a_wrong_address_is_told_what_is_wrong(client, address):
    status, reason = WRONG[address]
    answer = client.get(address)
    assert answer.status_code == status
    assert reason in html.unescape(answer.text) and "Traceback" not in answer.text
    assert answer.text.count("<h1>") == 1
