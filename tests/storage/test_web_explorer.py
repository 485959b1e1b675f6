"""The target explorer without a browser: wrong addresses, hostile text, damage, and a machine without the losses."""

import re
from html.parser import HTMLParser
from importlib.metadata import EntryPoint

import pytest

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'logitcache[web]'")
pytest.importorskip("torch", reason="pip install 'logitcache[train]'")

from logitcache_storage.cache import Cache  # noqa: E402
from logitcache_storage.testing import make_identity, make_samples, write_cache  # noqa: E402
from logitcache_storage.web import explorer  # noqa: E402
from logitcache_storage.web.app import create_app  # noqa: E402
from logitcache_storage.web.guard import Access  # noqa: E402
from logitcache_storage.web.site import Site  # noqa: E402

VOCAB, K = 40, 6
HOSTILE = [
    "<script>alert(1)</script>",
    "</main></body>",
    '" onmouseover="alert(1)',
    "\x1b[31mred",
    "\u202eevil",
    "\x00",
]
WORDS = [*HOSTILE, *(f" w{i}" for i in range(VOCAB - len(HOSTILE)))]


def write(folder, k=K, **settings):
    samples, topks = make_samples(20, k, VOCAB)
    identity = make_identity(k=k, vocab_size=VOCAB, shard_rows=50, container="arrow")
    write_cache(str(folder), samples, topks, identity=identity, vocabulary=WORDS, **settings)
    return str(folder)


def client_of(*folders):
    site = Site(*(Cache.open(folder) for folder in folders))
    return testclient.TestClient(create_app(site, Access(None)), base_url="http://localhost")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [write(tmp_path_factory.mktemp("a")), write(tmp_path_factory.mktemp("b"), k=4)]


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def test_every_objective_can_be_looked_at(folders):
    client = client_of(*folders)
    names = re.findall(r"<option(?: selected)?>(\w+)</option>", client.get("/explorer").text)
    assert len(names) == 15
    for name in names:
        page = client.get(f"/explorer?sample=2&row=0&objective={name}")
        assert page.status_code == 200 and '<table class="outcomes wide">' in page.text, name
        assert 'role="alert"' not in page.text, name


def test_text_of_a_corpus_is_text(folders):
    client = client_of(*folders)
    for index in range(20):
        page = client.get(f"/explorer?sample={index}").text
        found = Elements(page)
        assert found.tags.count("script") == 2 and found.tags.count("main") == 1
        assert not {name for name, _ in found.attributes} & {"style", "onmouseover", "onclick"}
        assert not re.search("[\x00\x1b\u202e]", page)


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("sample=999", 404, "no sample &#39;999&#39;"),
        ("row=500", 400, "row is 500"),
        ("objective=%3Cb%3E", 400, "objective is &#39;&lt;b&gt;&#39;"),
        ("teacher=third", 400, "teacher is &#39;third&#39;"),
        ("eta=x", 400, "eta is &#39;x&#39;"),
        ("objective=kl_sft&weight=-1", 200, "weight of objective &#39;kl_sft&#39; must be a number"),
        ("p_label=0", 200, "between 0 and 1, got 0"),
    ],
)
def test_a_wrong_value_is_told_what_is_wrong(folders, query, status, message):
    client = client_of(*folders)
    page = client.get(f"/explorer?{query}")
    assert page.status_code == status and message in page.text
    answer = client.get(f"/explorer/target?{query}")
    assert answer.status_code == (status if status != 200 else 400) and answer.json()["problem"]


def test_a_student_by_hand_needs_no_second_cache(folders):
    answer = client_of(folders[0]).get("/explorer/target?sample=3&row=0&p_label=0.125&eta=0").json()
    for outcome in answer["outcomes"]:
        assert outcome["target"] == pytest.approx(outcome["is_label"] * 0.125 + 0.875 * outcome["student"])
    assert answer["p_label"] == pytest.approx(0.125)


def test_eta_goes_beyond_its_range_and_says_so(folders):
    address = "/explorer/target?sample=3&row=0&eta="
    within, beyond = (client_of(*folders).get(f"{address}{eta}").json() for eta in (1, 1.5))
    assert "--extrapolate" in beyond["table"] and "--extrapolate" not in within["table"]
    known = [o for o in beyond["outcomes"] if not (o["is_label"] or o["assumed"] or o["token"] is None)]
    shares = [o["residual"] / (o["student"] ** -0.5 * o["teacher"] ** 1.5) for o in known]
    assert len(shares) > 1 and shares == pytest.approx([shares[0]] * len(shares), rel=1e-5)


def test_damage_of_the_second_cache_leaves_the_first(tmp_path, folders):
    damaged = write(tmp_path / "b")
    for path in (tmp_path / "b/shards").glob("*.arrow"):
        path.write_bytes(bytes(path.stat().st_size))
    page = client_of(folders[0], damaged).get("/explorer")
    assert page.status_code == 200 and "crc32c" in page.text and '<table class="outcomes wide">' in page.text


def test_from_a_damaged_sample_one_gets_to_another(tmp_path):
    folder = write(tmp_path / "a")
    cache = Cache.open(folder)
    for path in (tmp_path / "a/shards").glob("00000-*"):
        path.write_bytes(bytes(path.stat().st_size))
    client = client_of(folder)
    page = client.get("/explorer")
    assert page.status_code == 200 and "crc32c" in page.text and 'name="sample"' in page.text
    other = next(i for i in range(len(cache)) if cache.index.shard[i] == 1)
    assert '<table class="outcomes wide">' in client.get(f"/explorer?sample={other}").text
    assert client.get("/explorer/target").status_code == 500


def test_a_cache_with_nothing_in_it_yet(tmp_path):
    page = client_of(write(tmp_path / "empty", commit_shards=0)).get("/explorer")
    assert page.status_code == 404 and "no committed sample yet" in page.text


@pytest.mark.parametrize(
    "hooks", [{}, {"explore": EntryPoint("explore", "no_such_package.explorer", "logitcache.hooks")}]
)
def test_where_the_losses_are_not_installed_it_says_how_to_get_them(folders, monkeypatch, hooks):
    monkeypatch.setattr(explorer, "find_entry_points", lambda group: hooks)
    client = client_of(*folders)
    page = client.get("/explorer")
    assert page.status_code == 200 and "pip install &#34;logitcache[train]&#34;" in page.text
    assert client.get("/explorer/target").status_code == 500
