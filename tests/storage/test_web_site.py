"""What the pages draw from: samples by any name, the same sample in a second cache, a build that goes on."""

import threading
import time

import pytest

pytest.importorskip("starlette", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.web import site as site_module
from logitcache_storage.web.site import Side, Site, sample_name

K, VOCAB = 6, 50
IDENTITY = make_identity(k=K, vocab_size=VOCAB, shard_rows=40)
SAMPLES, TOPKS = make_samples(30, K, VOCAB)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def url(tmp_path):
    write_cache(str(tmp_path / "cache"), SAMPLES, TOPKS, identity=IDENTITY)
    return str(tmp_path / "cache")


def test_samples_stay_in_memory_up_to_a_bound(url, monkeypatch):
    side = Side(Cache.open(url))
    first = side.place(3).sample
    assert side.place(3).sample is first
    arrays = (first.input_ids, first.topk.ids, first.topk.log_probs)
    assert all(array.base is None for array in arrays)  # nothing that was read with them stays, too
    monkeypatch.setattr(site_module, "MAX_KEPT_BYTES", 0)
    assert side.place(4).sample.key == side.cache[4].key
    assert side.place(4).sample is side.place(4).sample  # the last one always stays
    assert side.place(3).sample is not first


def test_a_sample_is_found_by_index_key_and_both(url):
    side = Side(Cache.open(url))
    key = side.cache.key(7)
    for name in ("7", key, key[:6], sample_name(7, key), f"999-{key[:12]}", f"0-{key[:12]}"):
        assert side.find(name) == 7
    for name in ("30", "x", f"7-{'0' * 12}", "7-", "-", f"7-{key[:5]}", "9" * 40, ""):
        with pytest.raises(InputError):
            side.find(name)


def test_the_same_sample_is_found_wherever_it_stands(url, tmp_path):
    write_cache(str(tmp_path / "turned"), SAMPLES[:0:-1], TOPKS[:0:-1], identity=IDENTITY)
    site = Site(Cache.open(url), Cache.open(str(tmp_path / "turned")))
    place = site.first.place(5)
    other = site.counterpart(place)
    assert other.index == 29 - 5 and other.sample.key == place.sample.key
    assert site.counterpart(site.first.place(0)) is None  # it is not there
    assert Site(Cache.open(url)).counterpart(place) is None
    damaged = next((tmp_path / "turned" / "shards").rglob("codes/c/0/0"))
    for path in (tmp_path / "turned" / "shards").rglob("codes/c/0/0"):
        path.write_bytes(b"")
    again = Site(Cache.open(url), Cache.open(str(tmp_path / "turned")))
    with pytest.raises(CorruptionError, match=damaged.parent.parent.parent.name.split("-")[0]):
        again.counterpart(again.first.place(29))


def test_a_build_is_followed_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(site_module, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(site_module, "REST", 0)
    url = str(tmp_path / "growing")
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY, commit_shards=1)
    site = Site(Cache.open(url))
    before = len(site.cache)
    site.start()
    wait_for(lambda: site.status is not None)
    assert site.status.num_shards == 1 and site.first.table is not None
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY, commit_shards=3)
    wait_for(lambda: len(site.cache) > before)
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY)
    wait_for(lambda: site.cache.is_complete)
    assert len(site.cache) == len(SAMPLES) and len(site.first.table) == len(SAMPLES)
    wait_for(lambda: not background())
    assert site.status is None


def test_a_store_out_of_reach_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(site_module, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(site_module, "REST", 0)
    url = str(tmp_path / "growing")
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY, commit_shards=1)
    site = Site(Cache.open(url))
    (tmp_path / "growing").rename(tmp_path / "away")
    site.start()
    wait_for(lambda: site.first.table is not None or site.first.table_problem)
    time.sleep(0.2)
    (tmp_path / "away").rename(tmp_path / "growing")
    write_cache(url, SAMPLES, TOPKS, identity=IDENTITY)
    wait_for(lambda: site.cache.is_complete)


def background():
    return [thread for thread in threading.enumerate() if thread.name == "logitcache-statistics"]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
