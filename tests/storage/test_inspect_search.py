"""Search by key, source and text against a scan of every sample in Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from logitcache_storage import samples
from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_storage.inspect import search as module
from logitcache_storage.inspect.search import Found, SampleSearch
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache

WORDS = ["The", " cat", " CAT", " sat", "na", "ïve", "\n", "<script>", "日", "本", ".*", "é"]
SAMPLES, TOPKS = make_samples(300, 3, len(WORDS), seed=5)
IDENTITY = make_identity(k=3, vocab_size=len(WORDS), shard_rows=900, container="arrow")


@pytest.fixture(scope="module", params=[None, 2], ids=["complete", "unfinished"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    url = str(tmp_path_factory.mktemp("search"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "ROWS_PER_GROUP", 64)  # as many groups as a large cache has
        patch.setattr("logitcache_storage.plans.ROWS_PER_GROUP", 64)
        write_cache(
            url,
            SAMPLES,
            TOPKS,
            identity=IDENTITY,
            vocabulary=WORDS,
            commit_shards=request.param,
            excluded={} if request.param is None else {3: "killed its worker"},
        )
    return Cache.open(url)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ROWS_PER_GROUP", 64)
    monkeypatch.setattr(module, "TEXT_BYTES", 4000)


def text_of(cache: Cache, index: int) -> str:
    return "".join(WORDS[token] for token in cache.read_tokens([index])[0][0])


def contains(text: str, query: str) -> bool:
    def lower(t: str) -> str:
        return re.sub("[A-Z]", lambda letter: letter[0].lower(), t)

    return lower(query) in lower(text)


def search_all(search: SampleSearch, query: str, *, limit: int, seconds: float = 60.0) -> list[Found]:
    """All that is found, in as many calls as it takes."""
    found, after, calls = [], "", 0
    while True:
        result = search.search(query, after=after, limit=limit, seconds=seconds)
        found += result.found
        assert len(result.found) <= limit
        assert result.num_samples == search._cache.plan.num_samples or result.num_samples == len(search._cache)
        calls += 1
        if result.next is None:
            assert result.num_searched == result.num_samples
            return found
        assert calls < 1000 and result.next != after
        after = result.next


@pytest.mark.parametrize("query", ["cat sat", "naïve", "<SCRIPT>\n", "日本", ".*", "zzz", "The", "本The cat"])
@pytest.mark.parametrize("has_sources", [False, True])
def test_texts(cache: Cache, query: str, has_sources: bool) -> None:
    search = SampleSearch(cache)
    if has_sources:
        search.load_sources()
    expected = [i for i in range(len(cache)) if contains(text_of(cache, i), query)]
    for limit, seconds in ((1000, 60.0), (7, 60.0), (1000, 0.0)):
        found = search_all(search, query, limit=limit, seconds=seconds)
        assert [hit.index for hit in found] == expected
        for hit in found:
            assert hit.where == "text" and contains(hit.excerpt[hit.start : hit.stop], query)
            assert hit.excerpt in text_of(cache, hit.index)


@pytest.mark.parametrize("has_sources", [False, True])
@pytest.mark.parametrize("limit", [1000, 4])
def test_sources(cache: Cache, has_sources: bool, limit: int) -> None:
    search = SampleSearch(cache)
    if has_sources:
        search.load_sources()
    expected = [i for i in range(len(cache)) if "TEST:1" in cache.describe([i])[0]["source_id"].upper()]
    found = search_all(search, "Test:1", limit=limit)
    assert [hit.index for hit in found] == expected
    assert all(hit.where == "source" and hit.excerpt[hit.start : hit.stop] == "test:1" for hit in found)
    if has_sources:  # before any text is read
        assert search.search("test:1", limit=4).num_searched == 0


def test_keys(cache: Cache) -> None:
    search = SampleSearch(cache)
    key = cache.key(5)
    for query in (key, key[:8], key[:7].upper()):
        assert search.search(query).found[0] == Found(5, "key", key, 0, len(query))
    assert not search.search(key[:5]).found
    assert not search.search(f"{key}0").found


def test_a_sample_is_found_once(tmp_path: Path) -> None:
    """Its source and its text contain the query."""
    words = ["test:1", "x"]
    ids, ranges = np.array([1, 0, 1], np.int32), np.array([[1, 3]], np.int32)
    topks = [make_topk(2, 1, 2, labels=ids[1:])]
    write_cache(str(tmp_path), [(ids, ranges)], topks, identity=make_identity(k=1, vocab_size=2), vocabulary=words)
    for has_sources in (False, True):
        search = SampleSearch(Cache.open(str(tmp_path)))
        if has_sources:
            search.load_sources()
        assert [(hit.index, hit.where) for hit in search_all(search, "test:1", limit=10)] == [(0, "source")]


def test_a_match_does_not_span_samples(cache: Cache) -> None:
    text = text_of(cache, 0)[-3:] + text_of(cache, 1)[:3]
    expected = [i for i in range(len(cache)) if contains(text_of(cache, i), text)]
    assert [hit.index for hit in search_all(SampleSearch(cache), text, limit=1000)] == expected


def test_what_is_no_search(cache: Cache) -> None:
    search = SampleSearch(cache)
    for query in ("", "x" * 1001):
        with pytest.raises(InputError, match=f"a search for {len(query)} characters"):
            search.search(query)
    for after in ("text", "text:-1", "keys:3", "text:1x", "text:" + "9" * 19):
        with pytest.raises(InputError, match="cannot go on after"):
            search.search("a", after=after)
    assert search.search("The", after="text:99999999").next is None


def test_nothing_committed(tmp_path: Path) -> None:
    write_cache(str(tmp_path), SAMPLES[:3], TOPKS[:3], identity=IDENTITY, commit_shards=0)
    search = SampleSearch(Cache.open(str(tmp_path)))
    search.load_sources()
    assert search.search("The").found == () and search.search("The").next is None
