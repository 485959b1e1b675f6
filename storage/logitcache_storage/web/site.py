"""What is shown: one cache or two, the samples that were looked at last, and what is read in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.commit import committed_shards, load_commits
from logitcache_storage.errors import LogitCacheError
from logitcache_storage.inspect.data import find_sample
from logitcache_storage.inspect.search import SampleSearch
from logitcache_storage.plans import load_plan
from logitcache_storage.sample_statistics import SampleTable, load_statistics
from logitcache_storage.status import BuildStatus, build_status
from logitcache_storage.topk import TopKLogProbs

MAX_KEPT_BYTES = 64_000_000
"""Of samples in memory, per cache; the one that was asked for last always stays."""
MAX_PLACES = 10_000
"""Of samples in the second cache that are remembered."""
REFRESH_SECONDS = 10.0
"""Between looks at a build that goes on; more where a look takes long, so that most of the time the store has peace."""
REST = 10
"""How much longer than a look the pause behind it is, at least."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A sample and where it stands in its cache."""

    index: int
    sample: Sample


class Side:
    """One of the caches as of one moment; any thread may ask."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.table: SampleTable | None = None
        """Statistics of its samples, once they are there."""
        self.table_share = 0.0
        """How much of them has been read."""
        self.table_problem = ""
        """Why there are none, where they could not be read."""
        self.search = SampleSearch(cache)
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Read what many pages need: the vocabulary, the statistics, the sources. Pages that need one sooner wait."""
        try:
            log.debug("%s: %d words", self.cache.store.url, len(self.cache.vocabulary))
        except LogitCacheError as e:
            log.warning("%s", e)  # the pages of samples say so, too
        self.load_table()
        try:
            self.search.load_sources()
        except LogitCacheError as e:
            log.warning("%s", e)  # a search says so, too

    def load_table(self) -> None:
        """Read the statistics; takes a while where the cache has none of its own."""
        try:
            self.table = load_statistics(self.cache, progress=self._note_progress)
        except LogitCacheError as e:  # the pages live on without them, and say why
            self.table_problem = str(e)
        except Exception as e:
            self.table_problem = f"unexpected error: {type(e).__name__}; the terminal of 'logitcache serve' says more"
            log.exception("%s: no statistics", self.cache.store.url)

    def place(self, index: int) -> Place:
        """A sample by its index.

        Raises:
            IndexError: there is none.
            CorruptionError: it is damaged.
        """
        with self._lock:
            if index in self._samples:
                self._samples.move_to_end(index)
                return Place(index, self._samples[index])
        sample = _on_its_own(self.cache[index])
        with self._lock:
            self._samples[index] = sample
            while len(self._samples) > 1 and sum(map(_num_bytes, self._samples.values())) > MAX_KEPT_BYTES:
                self._samples.popitem(last=False)
        return Place(index, sample)

    def find(self, which: str) -> int:
        """Index of the sample called by index, by key, or as in our own links by both: `17-3f9c2a61b0d4`.

        Raises:
            InputError: there is none.
        """
        number, _, key = which.partition("-")
        if not (number and key):
            return find_sample(self.cache, which)
        # The key decides: while a build goes on, an index comes to mean another sample.
        is_index = number.isdecimal() and len(number) < 16 and int(number) < len(self.cache)
        if is_index and len(key) >= 6 and self.cache.key(int(number)).startswith(key):
            return int(number)
        return self.cache.index_of(key)

    def _note_progress(self, done: int, total: int) -> None:
        self.table_share = done / max(total, 1)


class Site:
    """Everything that pages draw from."""

    def __init__(self, cache: Cache, second: Cache | None = None) -> None:
        self.first = Side(cache)
        """The cache that is looked at; another object when a build has gone on."""
        self.second = None if second is None else Side(second)
        self.status: BuildStatus | None = None
        """How far the build is, where it is not at its end."""
        self._elsewhere: dict[str, int | None] = {}
        self._stop = threading.Event()

    @property
    def cache(self) -> Cache:
        """The cache that is looked at."""
        return self.first.cache

    @property
    def sides(self) -> tuple[Side, ...]:
        """One cache, or both."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def start(self, *, then: Callable[[], object] = lambda: None) -> None:
        """Read statistics in the background, do what comes `then`, and follow a build that goes on."""
        threading.Thread(target=self._work, args=(then,), name="logitcache-statistics", daemon=True).start()

    def stop(self) -> None:
        """End the work in the background, as soon as it notices."""
        self._stop.set()

    def counterpart(self, place: Place) -> Place | None:
        """The same sample in the second cache; None where there is no second, or the sample is not in it.

        Raises:
            CorruptionError: it is damaged.
        """
        if self.second is None:
            return None
        index = self._index_in(self.second.cache, place)
        return None if index is None else self.second.place(index)

    def _index_in(self, other: Cache, place: Place) -> int | None:
        # Two caches of one corpus mostly have one order; only where they have not are all keys looked at, and once.
        if place.index < len(other) and other.key(place.index) == place.sample.key:
            return place.index
        key = place.sample.key
        known = self._elsewhere  # it only grows, or is replaced by another
        if key in known:
            return known[key]
        found = other.indices_of(key)
        index = found[0][0] if found else None
        if len(known) >= MAX_PLACES:
            known = self._elsewhere = {}
        known[key] = index
        return index

    def _work(self, then: Callable[[], object]) -> None:
        import matplotlib.figure  # noqa: F401 - takes a second or more, for which no page need wait

        self.first.prepare()
        then()
        while not self.first.cache.is_complete:
            start = time.monotonic()
            try:
                self._follow()
            except LogitCacheError as e:
                log.warning("%s", e)  # a store may be out of reach for a while
            if self._stop.wait(max(REFRESH_SECONDS, REST * (time.monotonic() - start))):
                return

    def _follow(self) -> None:
        """See how far the build is; show what it has committed since."""
        cache = self.first.cache
        is_as_before = len(committed_shards(cache.store)) == len(cache.shards)
        if self.status is None or not is_as_before:
            self.status = build_status(cache.store)
        if is_as_before:
            return
        plan = load_plan(cache.store)
        assert plan is not None
        commits = load_commits(cache.store, len(plan.shard_num_rows))
        side = Side(Cache(cache.store, cache.identity, plan, commits, cache.disk_cache))
        side.prepare()
        self.first = side
        if side.cache.is_complete:
            self.status = None


def sample_name(index: int, key: str) -> str:
    """How links call a sample."""
    return f"{index}-{key[:12]}"


def _on_its_own(sample: Sample) -> Sample:
    """The same in arrays of its own: those that are read may be small parts of what was read with them."""
    topk = TopKLogProbs(*(np.array(getattr(sample.topk, f.name)) for f in fields(TopKLogProbs)))
    return replace(
        sample,
        topk=topk,
        input_ids=np.array(sample.input_ids),
        target_positions=np.array(sample.target_positions),
    )


def _num_bytes(sample: Sample) -> int:
    topk = sample.topk
    return int(topk.ids.nbytes + topk.log_probs.nbytes + sample.input_ids.nbytes)
