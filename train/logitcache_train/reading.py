"""Rows of samples, read shard by shard, and what the coming samples need, fetched while others are trained on.

Each chunk is decoded once: without a disk cache by each process that reads, since the samples of a shard go to all of
them, and what is decoded stays in memory for one shuffle window. With a disk cache once for all processes of a node:
they share what one of them fetched and decoded, in memory, too.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_storage.topk import TopKLogProbs

NUM_THREADS = 2
"""That read ahead in each process: one waits for the store while the other decodes."""

Indices = npt.NDArray[np.int64]
Needs = tuple[tuple[Hashable, ...], ...]
"""What some samples are read from: for each source its pieces, in the order in which they are first needed."""

log = logging.getLogger(__name__)


class Source(Protocol):
    """Something that is fetched in pieces, ahead of the samples that need them."""

    def pieces_of(self, samples: Indices) -> Iterable[Hashable]:
        """What these samples need, in the order in which they need it."""

    def read_ahead(self, piece: Any) -> None:
        """Have a piece at hand, if that takes no waiting for other processes and there is room."""

    def keep(self, pieces: set[Hashable]) -> None:
        """Let go of all that was read ahead but these."""

    def __contains__(self, piece: object) -> bool:
        """Whether a piece is at hand."""


class RowReader:
    """Rows of samples in one cache; the least recently used shards are forgotten.

    `places` says which of the cache's samples each of ours is, [S]; from then on a sample is its index in `places`.
    """

    def __init__(self, cache: Cache, places: Indices, window_shards: int) -> None:
        self.cache, self._places, self._max_rows = cache, places, _rows_of_window(cache, window_shards)
        self._shards: OrderedDict[int, TopKLogProbs] = OrderedDict()
        self._ahead: dict[int, TopKLogProbs] = {}

    def rows(self, index: int) -> TopKLogProbs:
        """The rows of a sample."""
        place, places = self._places[index], self.cache.index
        first = int(places.first_row[place])
        return self._decoded(int(places.shard[place]))[first : first + int(places.num_targets[place])]

    def reading_order(self, index: int) -> tuple[bool, int]:
        """Sorts samples by shard, those of decoded shards first."""
        shard = int(self.cache.index.shard[self._places[index]])
        return shard not in self, shard

    def pieces_of(self, samples: Indices) -> Iterable[int]:
        """Shards."""
        return dict.fromkeys(self.cache.index.shard[self._places[samples]].tolist())

    def read_ahead(self, piece: int) -> None:
        """See `Source`."""
        found = self.cache.read_shard_ahead(piece)
        if found is not None:
            self._ahead[piece] = found

    def keep(self, pieces: set[Hashable]) -> None:
        """See `Source`."""
        for held in (self._shards, self._ahead):
            for shard in held.keys() - pieces:
                held.pop(shard, None)

    def __contains__(self, piece: object) -> bool:
        return piece in self._shards or piece in self._ahead

    def __getstate__(self) -> dict[str, Any]:
        # What is in memory can be read again; a worker process need not be sent it.
        return {**self.__dict__, "_shards": OrderedDict(), "_ahead": {}}

    def _decoded(self, shard: int) -> TopKLogProbs:
        if shard in self._shards:
            self._shards.move_to_end(shard)
        else:
            found = self._ahead.pop(shard, None)
            self._shards[shard] = self.cache.read_shard(shard) if found is None else found
            while sum(map(len, self._shards.values())) > self._max_rows and len(self._shards) > 1:
                self._shards.popitem(last=False)
        return self._shards[shard]


class TokenSource:
    """The tokens of a cache's samples, in the disk cache; `places` as for `RowReader`."""

    def __init__(self, cache: Cache, places: Indices) -> None:
        self._cache, self._places = cache, places
        self._ahead: dict[Hashable, memoryview] = {}

    def pieces_of(self, samples: Indices) -> Iterable[tuple[int, int]]:
        """Groups of samples."""
        return self._cache.token_groups(self._places[samples])

    def read_ahead(self, piece: tuple[int, int]) -> None:
        """See `Source`."""
        found = self._cache.read_tokens_ahead(*piece)
        if found is not None:
            self._ahead[piece] = found

    def keep(self, pieces: set[Hashable]) -> None:
        """See `Source`."""
        for piece in self._ahead.keys() - pieces:
            self._ahead.pop(piece, None)

    def __contains__(self, piece: object) -> bool:
        return piece in self._ahead

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": {}}


class ReadAhead:
    """Reads ahead along a known order, in threads that end when nothing is left to fetch.

    What goes wrong there is not reported: the read that needs the piece asks for it again, and its error counts.
    """

    _wanted: deque[tuple[Source, Hashable]]

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._start()

    def needs(self, samples: Indices) -> Needs:
        """What these samples are read from."""
        return tuple(tuple(source.pieces_of(samples)) for source in self._sources)

    def follow(self, windows: Sequence[Needs]) -> None:
        """Go on with the first of what these windows need and is not at hand, and let go of all else."""
        if not windows:
            return
        if self._pid != os.getpid():
            self._start()  # threads do not survive a fork, and locks may be held in it for ever
        wanted: list[tuple[Source, Hashable]] = []
        for source, pieces in zip(self._sources, zip(*windows, strict=True), strict=True):
            source.keep({piece for several in pieces for piece in several})
        for window in windows:
            for source, pieces in zip(self._sources, window, strict=True):
                wanted += [(source, piece) for piece in pieces if piece not in source]
        with self._lock:
            self._wanted = deque(wanted)
            missing = min(NUM_THREADS, len(wanted)) - self._num_threads
            self._num_threads += max(missing, 0)
        for _ in range(missing):
            threading.Thread(target=self._read, name="logitcache-read-ahead", daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        return {"_sources": self._sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_sources"])  # type: ignore[misc]

    def _start(self) -> None:
        self._pid, self._lock, self._num_threads = os.getpid(), threading.Lock(), 0
        self._wanted = deque()

    def _read(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._num_threads -= 1
                    return
                source, piece = self._wanted.popleft()
            try:
                source.read_ahead(piece)
            except Exception as e:
                log.debug("reading %s ahead: %s", piece, e)


def check_room(caches: Iterable[Cache], window_shards: int) -> None:
    """Refuse a disk cache that is too small for the shuffle windows of the caches that use it.

    Raises:
        InputError: names the bytes that it must have at least.
    """
    needed: dict[str, int] = {}
    for cache in caches:
        if cache.disk_cache is None:
            continue
        folder, bound = str(cache.disk_cache.folder), cache.disk_cache.max_bytes
        needed[folder] = needed.get(folder, 0) + cache.num_local_bytes(window_shards + 1)
        if needed[folder] > bound:
            raise InputError(
                f"the local cache {folder} may have {bound:,} bytes, and a shuffle window of {window_shards} shards,"
                f" with the shard where the next one begins, takes {needed[folder]:,} ({cache.store.url} has up to"
                f" {cache.num_local_bytes(1):,} bytes a shard, decoded); allow it more, three windows to read well"
                " ahead, or make the window smaller"
            )


def _rows_of_window(cache: Cache, window_shards: int) -> int:
    """Target rows of the largest `window_shards + 1` shards: a window, and where the next one begins."""
    return int(np.sort(np.asarray(cache.plan.shard_num_rows))[::-1][: window_shards + 1].sum())
