"""Samples by key, by where they stood in the corpus, and by text.

Text has no index: the samples table is read for a bounded time, the result says how far that went, and the next call
goes on from there. So it is with sources, until they have been loaded into memory.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_storage.vocabulary import Vocabulary

CONTEXT_BYTES = 60
"""Of the text before and behind a match."""
MAX_QUERY = 1000
"""Characters."""
TEXT_BYTES = 1 << 26
"""Of text in memory at a time, if every token were as long as the longest; of one sample at least."""

Where = Literal["key", "source", "text"]


@dataclass(frozen=True)
class Found:
    """A sample that a search has found."""

    index: int
    """In the cache."""
    where: Where
    """What of it matches; of several the first of these."""
    excerpt: str
    """The key, the source, or the text around the match; bytes that are no UTF-8 become U+FFFD."""
    start: int
    """The match is `excerpt[start:stop]`."""
    stop: int


@dataclass(frozen=True)
class SearchResult:
    """What one call has found."""

    query: str
    found: tuple[Found, ...]
    """Samples by key, then those by source, then those by text, each in order of index."""
    num_searched: int
    """Texts of so many samples, from the first on, were searched by this call and those before it."""
    num_samples: int
    """Of the cache."""
    next: str | None
    """Where a further call goes on; None where all has been searched."""


class SampleSearch:
    """Searches of one cache; several threads may use it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._sources: pa.ChunkedArray | None = None
        self._lock = threading.Lock()

    def load_sources(self) -> None:
        """Read where all samples stood in the corpus, once; from then on searches look at all of these first.

        Raises:
            CorruptionError: a part of the samples table is damaged.
        """
        with self._lock:
            if self._sources is None:
                chunks = [table.column("source_id").combine_chunks() for _, table in self._cache.scan(["source_id"])]
                self._sources = pa.chunked_array(chunks, pa.string())

    def search(self, query: str, *, after: str = "", limit: int = 100, seconds: float = 0.5) -> SearchResult:
        """Samples whose key begins with the query (6 hex digits or more), or whose source or text contains it.

        Case does not matter in ASCII letters. A sample is found once, be it for several reasons.

        Args:
            query: what to look for, at most 1,000 characters.
            after: "", or `SearchResult.next` of the same search.
            limit: how many samples to find before it stops, >= 1.
            seconds: how long to read texts before it stops; of about 1,024 samples at least.

        Raises:
            InputError: an empty or very long query, or an `after` that no search gave.
            CorruptionError: a part of the samples table is damaged.
        """
        if not query or len(query) > MAX_QUERY:
            raise InputError(f"a search for {len(query)} characters; give 1 to {MAX_QUERY}")
        deadline, (phase, index) = time.monotonic() + seconds, _parse(after)
        found: list[Found] = []
        if phase in ("source", "text"):
            self.load_sources()  # the search began when they were there; this may be another process
        if phase == "":
            found = self._by_key(query)[:limit]
            phase = "all" if self._sources is None else "source"
        if phase == "source":
            assert self._sources is not None
            places = _containing(self._sources, query)
            wanted = places[np.searchsorted(places, index) :]
            wanted = wanted[~np.isin(wanted, [f.index for f in found])][: limit - len(found)]
            found += [_in_source(int(i), self._sources[int(i)].as_py(), query) for i in wanted]
            if len(wanted) and len(found) >= limit:
                return self._result(query, found, 0, f"source:{wanted[-1] + 1}")
            phase, index = "text", 0
        reached = index
        known = self._found_at_once(query, sources=phase == "text")
        for hit, reached in self._in_texts(query, index, sources=phase == "all"):  # noqa: B007
            if hit is not None and hit.index not in known:
                found.append(hit)
            if len(found) >= limit or (hit is None and time.monotonic() >= deadline):
                break
        is_done = reached >= len(self._cache)
        return self._result(query, found, reached, None if is_done else f"{phase}:{reached}")

    def _result(self, query: str, found: list[Found], num_searched: int, following: str | None) -> SearchResult:
        return SearchResult(query, tuple(found), num_searched, len(self._cache), following)

    def _by_key(self, query: str) -> list[Found]:
        return [Found(i, "key", key.hex(), 0, len(query)) for i, key in self._cache.indices_of(query)]

    def _found_at_once(self, query: str, *, sources: bool) -> set[int]:
        """What was found before any text was looked at."""
        found = {f.index for f in self._by_key(query)}
        if sources:
            assert self._sources is not None
            found.update(_containing(self._sources, query).tolist())
        return found

    def _in_texts(self, query: str, first: int, *, sources: bool) -> Iterator[tuple[Found | None, int]]:
        """(a match, the sample behind it) of each sample from `first` on, and (None, the sample behind) of each run."""
        names = ["input_ids", "source_id"] if sources else ["input_ids"]
        for start, table in self._cache.scan(names, first):
            skipped = max(0, first - start)
            hits = dict(self._in_run(table.column("input_ids").combine_chunks()[skipped:], query, start + skipped))
            if sources:
                column = table.column("source_id")[skipped:]
                at = _containing(column, query)
                hits |= {
                    start + skipped + int(i): _in_source(start + skipped + int(i), column[int(i)].as_py(), query)
                    for i in at
                }
            for index in sorted(hits):
                yield hits[index], index + 1
            yield None, start + len(table)

    def _in_run(self, ids: pa.ListArray, query: str, first: int) -> Iterator[tuple[int, Found]]:
        """Samples of a run whose text contains the query."""
        wanted = query.encode("utf-8", "replace").lower()
        edges = ids.offsets.to_numpy()
        tokens = np.minimum(ids.values.to_numpy().view(np.uint32), len(self._words) - 1)
        for start, stop in _pieces(edges, TEXT_BYTES // self._longest):
            taken = self._words.take(pa.array(tokens[edges[start] : edges[stop]]))
            bounds = np.frombuffer(taken.buffers()[1], np.int64)[edges[start : stop + 1] - edges[start]]
            text = taken.buffers()[2].to_pybytes()
            for sample, at in _matches(text, wanted, bounds):
                whole = self._text(tokens[edges[start + sample] : edges[start + sample + 1]])
                index = first + start + sample
                yield index, _excerpt(index, whole, at - int(bounds[sample]), len(wanted))

    @cached_property
    def _words(self) -> pa.LargeBinaryArray:
        """The text of every token in lower case, and one without text for ids that no token has."""
        vocabulary = self._cache.vocabulary
        return pa.array([*(vocabulary.text(i).lower() for i in range(len(vocabulary))), b""], pa.large_binary())

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(1, int(pc.max(pc.binary_length(self._words)).as_py()))

    def _text(self, tokens: npt.NDArray[np.uint32]) -> bytes:
        vocabulary: Vocabulary = self._cache.vocabulary
        return b"".join(vocabulary.text(i) if i < len(vocabulary) else b"" for i in tokens.tolist())


def _parse(after: str) -> tuple[str, int]:
    found = re.fullmatch(r"(source|text|all):(\d{1,18})|", after)
    if found is None:
        raise InputError(f"a search cannot go on after {after!r}; give what the search before said")
    return found[1] or "", int(found[2] or 0)


def _containing(sources: pa.ChunkedArray, query: str) -> npt.NDArray[np.int64]:
    """Which sources contain the query."""
    mask = pc.match_substring(sources, query.encode("utf-8", "replace").decode(), ignore_case=True)
    return np.flatnonzero(np.asarray(mask))


def _in_source(index: int, source: str, query: str) -> Found:
    start = max(0, source.lower().find(query.lower()))
    return Found(index, "source", source, start, min(len(source), start + len(query)))


def _pieces(edges: npt.NDArray[np.integer], most: int) -> Iterator[tuple[int, int]]:
    """Runs of samples of at most so many tokens together, one sample at least; `edges` are [n + 1]."""
    start = 0
    while start < len(edges) - 1:
        stop = int(np.searchsorted(edges, edges[start] + most, side="right")) - 1
        stop = max(stop, start + 1)
        yield start, stop
        start = stop


def _matches(text: bytes, wanted: bytes, bounds: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(sample, where) of the first match of each sample; sample s has `text[bounds[s]:bounds[s + 1]]`."""
    at = text.find(wanted)
    while at >= 0:
        sample = int(np.searchsorted(bounds, at, side="right")) - 1
        end = int(bounds[sample + 1])
        if at + len(wanted) <= end:
            yield sample, at
            at = text.find(wanted, end)
        else:  # it begins in one sample and ends in another
            at = text.find(wanted, at + 1)


def _excerpt(index: int, text: bytes, start: int, length: int) -> Found:
    before, behind = text[max(0, start - CONTEXT_BYTES) : start], text[start + length :][:CONTEXT_BYTES]
    parts = [part.decode("utf-8", "replace") for part in (before, text[start : start + length], behind)]
    return Found(index, "text", "".join(parts), len(parts[0]), len(parts[0]) + len(parts[1]))
