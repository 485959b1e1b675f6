"""The pages where a cache is not whole: damaged, unfinished, empty, of labels alone, not read yet, far away."""

import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'logitcache[web]'")
uvicorn = pytest.importorskip("uvicorn", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Cache  # noqa: E402
from logitcache_storage.testing import make_identity, make_samples, write_cache  # noqa: E402
from logitcache_storage.topk import TopKLogProbs  # noqa: E402
from logitcache_storage.web.app import create_app  # noqa: E402
from logitcache_storage.web.guard import Access  # noqa: E402
from logitcache_storage.web.server import bind  # noqa: E402
from logitcache_storage.web.site import Site  # noqa: E402

VOCAB, K = 50, 6
IDENTITY = make_identity(k=K, vocab_size=VOCAB, shard_rows=60)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Statistics that are computed are kept below this folder, and not the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def client_of(*folders, ready=True):
    site = Site(*(Cache.open(str(folder)) for folder in folders))
    if ready:
        site.first.load_table()
    return testclient.TestClient(create_app(site, Access(None)), base_url="http://localhost")


def listed(page):
    """The samples of a list, by index."""
    return [int(found) for found in re.findall(r'<a href="/samples/\d+(?:-\w+)?">(\d+)</a>', page)]


def words_of(page):
    return re.sub(r"\s+", " ", re.sub("<[^>]+>", "", page))


def test_a_damaged_shard_is_a_message_and_the_pages_live_on(tmp_path):
    samples, topks = make_samples(30, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY)
    shards = sorted({path.parts[-5] for path in (tmp_path / "shards").rglob("codes/c/0/0")})
    damaged = tmp_path / "shards" / shards[1] / "codes/c/0/0"
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    client, cache = client_of(tmp_path), Cache.open(str(tmp_path))
    inside = [i for i in range(len(cache)) if cache.index.shard[i] == 1]
    answer = client.get(f"/samples/{inside[0]}")
    assert answer.status_code == 200 and f"{shards[1]}/codes/c/0/0" in answer.text and "crc32c" in answer.text
    assert client.get(f"/samples/{inside[0]}/positions/0").status_code == 500
    assert client.get(f"/samples/{inside[0] - 1}").status_code == 200
    assert client.get("/").status_code == client.get("/doubtful?min_probability=0.1").status_code == 200
    assert listed(client.get("/samples").text + client.get("/samples?page=2").text) == list(range(30))


def test_doubtful_labels_of_what_is_left(tmp_path):
    samples, topks = make_samples(30, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY)
    for path in [path for path in (tmp_path / "shards").rglob("*") if path.is_file() and "00001-" in str(path)]:
        path.write_bytes(bytes(path.stat().st_size))
    client = client_of(tmp_path)
    page = client.get("/doubtful?min_probability=0.1").text
    assert page.count("crc32c") == 1 and 'href="/doubtful.csv' in page and 'href="/doubtful.parquet' not in page
    lines = client.get("/doubtful.csv?min_probability=0.1").text.splitlines()
    assert lines[-1].startswith('"NOT READ: ') and "shards/00001-" in lines[-1] and len(lines) > 2
    answer = client.get("/doubtful.parquet?min_probability=0.1")
    assert answer.status_code == 500 and "not every sample is known" in answer.text


def test_pages_wait_for_no_statistics(tmp_path):
    samples, topks = make_samples(30, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY)
    client = client_of(tmp_path, ready=False)
    page = client.get("/").text
    assert "Reading the statistics" in page and "<svg" not in page
    assert listed(client.get("/samples").text) == list(range(25))
    assert client.get("/samples/3").status_code == 200
    for address in ("/samples?sort=doubt", "/samples?histogram=entropy&bin=3"):
        page = client.get(address).text
        assert listed(page) == list(range(25)) and "as soon as the statistics are there" in page
    answer = client.get("/doubtful.csv")
    assert answer.status_code == 400 and "statistics" in answer.text
    assert "Reading the statistics" in client.get("/doubtful").text
    assert "Reading the statistics" in client.get("/progress").text
    assert "data-done" in client_of(tmp_path).get("/progress").text


def test_an_unfinished_build_shows_how_far_it_is(tmp_path):
    samples, topks = make_samples(30, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY, commit_shards=2)
    cache = Cache.open(str(tmp_path))
    text = words_of(client_of(tmp_path).get("/").text)
    planned = len(cache.plan.shard_num_rows)
    assert f"2 of {planned} shards, {len(cache)} of 30 samples" in text
    client = client_of(tmp_path)
    assert "data-done" not in client.get("/build").text
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY)
    assert "data-done" in client_of(tmp_path).get("/build").text


def test_a_cache_with_nothing_in_it_yet(tmp_path):
    samples, topks = make_samples(4, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY, commit_shards=0)
    client = client_of(tmp_path)
    assert "0 of 1 shards" in words_of(client.get("/").text)
    assert "<b>0</b> samples" in client.get("/samples").text
    assert client.get("/samples/0").status_code == 404
    assert client.get("/doubtful").status_code == client.get("/samples?q=w").status_code == 200


def test_a_cache_of_labels_alone(tmp_path):
    samples, topks = make_samples(30, K, VOCAB)
    labels_alone = [TopKLogProbs.of_labels(topk.label_log_prob) for topk in topks]
    identity = make_identity(k=0, vocab_size=VOCAB, role="reference")
    write_cache(str(tmp_path / "0"), samples, labels_alone, identity=identity)
    write_cache(str(tmp_path / "k"), samples, topks, identity=make_identity(k=K, vocab_size=VOCAB))
    for folders in (["0"], ["0", "k"], ["k", "0"]):
        client = client_of(*(str(tmp_path / folder) for folder in folders))
        for address in ("/", "/samples", "/samples?sort=doubt", "/samples/3?row=1", "/doubtful", "/doubtful.csv"):
            assert client.get(address).status_code == 200, address
        page = client.get("/samples/3?row=1").text
        assert f"<b>{topks[3].label_log_prob[1]:.3f}</b>" in page and "shade=kl" not in page
        assert ("shade=entropy" in page) == (folders[0] == "k")
        assert ("entropy" in client.get("/samples").text) == (folders[0] == "k")
        assert client.get("/").text.count("<svg") == (4 if folders[0] == "k" else 1)
        assert ("does not know what the teacher was sure of" in client.get("/doubtful").text) == (folders[0] == "0")
        assert client.get("/samples/3?shade=kl").status_code == 400


class StuckStore:
    """Shards are not read before it is told to go on."""

    def __init__(self, store):
        self._store, self.url = store, store.url
        self.is_asked, self.goes_on = threading.Event(), threading.Event()

    def get(self, path):
        self._wait(path)
        return self._store.get(path)

    def get_range(self, path, start, stop):
        self._wait(path)
        return self._store.get_range(path, start, stop)

    def _wait(self, path):
        if path.startswith("shards/"):
            self.is_asked.set()
            assert self.goes_on.wait(30)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_a_store_that_takes_its_time_holds_up_no_other_page(tmp_path):
    samples, topks = make_samples(30, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY)
    opened = Cache.open(str(tmp_path))
    store = StuckStore(opened.store)
    app = create_app(Site(Cache(store, opened.identity, opened.plan, opened.shards)), Access(None))
    listener = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with listener, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.run, sockets=[listener])
        try:
            slow = pool.submit(lambda: urllib.request.urlopen(f"{address}/samples/3", timeout=30).read().decode())
            assert store.is_asked.wait(30)
            for path in ("/", "/samples", "/samples?q=t1", "/progress"):
                assert urllib.request.urlopen(f"{address}{path}", timeout=30).status == 200
            assert not slow.done()
            store.goes_on.set()
            assert "<h1>Sample 3</h1>" in slow.result(30)
        finally:
            store.goes_on.set()
            server.should_exit = True
        running.result(30)


class CountingStore:
    """Counts the bytes that are read, by object."""

    def __init__(self, store):
        self._store, self.num_bytes = store, {}
        self.url = store.url

    def get_range(self, path, start, stop):
        return self._count(path, self._store.get_range(path, start, stop))

    def get(self, path):
        return self._count(path, self._store.get(path))

    def get_many(self, paths):
        return [self._count(path, data) for path, data in zip(paths, self._store.get_many(paths), strict=True)]

    def _count(self, path, data):
        self.num_bytes[path] = self.num_bytes.get(path, 0) + len(data)
        return data

    def __getattr__(self, name):
        return getattr(self._store, name)


def rows_that_do_not_compress(num_rows, k, vocab_size):
    """Rows whose label is token 0, which none of them keeps."""
    rng = np.random.default_rng(0)
    logits = -np.cumsum(rng.exponential(0.3, (num_rows, k + 1)), axis=1)
    log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    ids = 1 + (rng.integers(vocab_size, size=(num_rows, 1)) + np.cumsum(rng.integers(1, 50, (num_rows, k)), 1)) % (
        vocab_size - 1
    )
    num_kept, tail = np.full(num_rows, k, np.int32), log_probs[:, k]
    return TopKLogProbs(ids.astype(np.int32), log_probs[:, :k], num_kept, tail, tail - 1)


def test_a_sample_in_a_bucket_costs_its_own_chunks(s3_server):
    rows_per_sample, num_samples, k, vocab_size = 128, 256, 64, 5000
    url, labels = s3_server.new_url(), np.zeros(rows_per_sample, np.int32)
    prompts = np.array([[i // 100, i % 100] for i in range(num_samples)], np.int32)
    samples = [(np.concatenate([prompt, labels]), np.array([[2, 2 + rows_per_sample]], np.int32)) for prompt in prompts]
    rows = rows_that_do_not_compress(rows_per_sample * num_samples, k, vocab_size)
    topks = [rows[i * rows_per_sample : (i + 1) * rows_per_sample] for i in range(num_samples)]
    identity = make_identity(k=k, vocab_size=vocab_size, shard_rows=16384, container="arrow")
    write_cache(url, samples, topks, identity=identity, storage_options=s3_server.storage_options)
    opened = Cache.open(url, s3_server.storage_options)
    store = CountingStore(opened.store)
    cache = Cache(store, opened.identity, opened.plan, opened.shards)
    store.num_bytes.clear()
    client = testclient.TestClient(create_app(Site(cache), Access(None)), base_url="http://localhost")
    assert client.get("/samples/200").status_code == 200
    shard_bytes = {path: count for path, count in store.num_bytes.items() if path.startswith("shards/")}
    assert {path.split("/")[1].split("-")[0] for path in shard_bytes} == {"00001"}
    assert 0 < sum(shard_bytes.values()) < 0.6 * cache.shards[1].num_bytes  # a quarter, and whole blocks
    before = dict(store.num_bytes)
    assert client.get("/samples/200/positions/127").status_code == 200
    assert store.num_bytes == before  # the sample is in memory


@pytest.mark.parametrize("path", ["/", "/samples", "/doubtful"])
def test_statistics_that_come_while_a_page_is_made_are_still_waited_for(tmp_path, monkeypatch, path):
    samples, topks = make_samples(30, K, VOCAB)
    write_cache(str(tmp_path), samples, topks, identity=IDENTITY)
    site = Site(Cache.open(str(tmp_path)))
    site.first.load_table()
    client = testclient.TestClient(create_app(site, Access(None)), base_url="http://localhost")
    whole, seen = site.first.table, []

    def late(side):
        seen.append(side)
        return None if len(seen) == 1 else whole

    monkeypatch.setattr(type(site.first), "table", property(late, lambda side, value: None), raising=False)
    assert 'data-poll="/progress"' in client.get(path).text
    assert 'data-poll="/progress"' not in client.get(path).text
