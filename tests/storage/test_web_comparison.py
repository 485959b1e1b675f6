"""Two caches side by side: bounded work at every request, right at the end, alive with damage."""

import re
import threading
import time

import pytest

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Cache  # noqa: E402
from logitcache_storage.compare import Comparing, compare_caches  # noqa: E402
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache  # noqa: E402
from logitcache_storage.web import comparison  # noqa: E402
from logitcache_storage.web.app import create_app  # noqa: E402
from logitcache_storage.web.guard import Access  # noqa: E402
from logitcache_storage.web.site import Site  # noqa: E402

VOCAB, K, NUM_SAMPLES = 50, 6, 40


def write(folder, seed=None, **settings):
    samples, topks = make_samples(NUM_SAMPLES, K, VOCAB)
    if seed is not None:
        labels = [ids[[p for a, b in ranges for p in range(a, b)]] for ids, ranges in samples]
        topks = [make_topk(len(t), K, VOCAB, seed=seed + i, labels=labels[i]) for i, t in enumerate(topks)]
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=50, container="arrow", **settings)
    write_cache(str(folder), samples, topks, identity=identity)
    return str(folder)


def client_of(*folders):
    site = Site(*(Cache.open(folder) for folder in folders))
    return testclient.TestClient(create_app(site, Access(None)), base_url="http://localhost")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [write(tmp_path_factory.mktemp("a")), write(tmp_path_factory.mktemp("b"), seed=500)]


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_at_the_end_it_says_what_compare_says(folders):
    client = client_of(*folders)
    client.get("/comparison/further")
    page = client.get("/comparison")
    found = compare_caches(*map(Cache.open, folders), top=comparison.SAMPLES_NAMED)
    assert page.status_code == 200
    assert f"All {NUM_SAMPLES} samples that both caches hold were compared" in words(page.text)
    assert f"KL(A || B) {found.kl_ab:.4g} nats" in words(page.text)
    listed = re.findall(r'href="/samples/(\d+)-[0-9a-f]+\?shade=kl"', page.text)
    assert [int(index) for index in listed] == [sample.index_a for sample in found.most_different]
    for index in listed[:2]:
        assert client.get(f"/samples/{index}?shade=kl").status_code == 200


def test_every_request_goes_a_bounded_way_further(folders, monkeypatch):
    monkeypatch.setattr(comparison, "ROWS_AT_ONCE", 25)
    monkeypatch.setattr(comparison, "SECONDS_AT_FIRST", 0.0)
    monkeypatch.setattr(comparison, "SECONDS_AT_ONCE", 0.0)
    client = client_of(*folders)
    assert "comparison.js" in client.get("/comparison").text
    answers = [client.get("/comparison/further").json()]
    while not answers[-1]["is_done"]:
        answers.append(client.get("/comparison/further").json())
        assert len(answers) < 200
    shares = [
        float(share)
        for answer in answers
        for share in re.findall(r'<progress max="1" value="([\d.]+)"', answer["html"])
    ]
    assert len(shares) > 3 and shares == sorted(shares) and shares[0] < 0.3
    assert "<progress" not in answers[-1]["html"]
    start = time.monotonic()
    client.get("/comparison/further")
    assert time.monotonic() - start < 5  # and nothing is compared twice


def test_no_request_waits_for_millions_of_samples_to_be_joined(folders, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(comparison, "SECONDS_TO_JOIN", 0.01)
    monkeypatch.setattr(comparison, "Comparing", lambda *args, **kw: goes_on.wait(30) and Comparing(*args, **kw))
    client = client_of(*folders)
    page = client.get("/comparison")
    assert page.status_code == 200 and "comparison.js" in page.text
    assert "Finding out which samples of the two belong together" in words(page.text)
    assert not client.get("/comparison/further").json()["is_done"]
    goes_on.set()
    deadline = time.monotonic() + 30
    while not client.get("/comparison/further").json()["is_done"]:
        assert time.monotonic() < deadline
    assert f"All {NUM_SAMPLES} samples" in words(client.get("/comparison").text)


def test_damage_is_a_message_and_the_rest_is_compared(tmp_path, folders):
    damaged = write(tmp_path / "a")
    path = min((tmp_path / "a/shards").glob("*.arrow"))
    path.write_bytes(bytes(path.stat().st_size))
    client = client_of(damaged, folders[1])
    while not client.get("/comparison/further").json()["is_done"]:
        pass
    page = client.get("/comparison")
    assert page.status_code == 200 and path.name in page.text and "crc32c" in page.text
    assert "Samples that moved most" in page.text and "the rest cannot be read" in page.text


def test_one_cache_alone_has_no_such_page(folders):
    client = client_of(folders[0])
    assert client.get("/comparison").status_code == 404
    assert "/comparison" not in client.get("/").text


def test_caches_without_a_common_sample_are_refused_by_name(tmp_path, folders):
    samples, topks = make_samples(5, K, VOCAB, seed=99)
    write_cache(str(tmp_path / "c"), samples, topks, identity=make_identity(k=K, vocab_size=VOCAB))
    page = client_of(folders[0], str(tmp_path / "c")).get("/comparison")
    assert page.status_code == 400 and "no sample in common" in page.text
