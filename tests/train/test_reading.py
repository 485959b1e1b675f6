"""Reading through a disk cache: each object once for all ranks and workers, ahead of time; errors where they count."""

import pickle
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest

from logitcache_storage import cache as cache_module
from logitcache_storage.cache import Cache
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.data import CachedSamples, EpochLoader, GlobalBatchSampler
from logitcache_train.objectives import objective
from logitcache_train.reading import ReadAhead, RowReader

V, K, WINDOW = 50, 4, 3
ROOM = 10**7


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    samples, topks = make_samples(120, K, V, seed=0)
    url = str(tmp_path_factory.mktemp("reading") / "cache")
    write_cache(url, samples, topks, identity=make_identity(vocab_size=V, k=K, shard_rows=40, precision="fp32"))
    return url


@pytest.fixture(scope="module")
def plain(url):
    return Cache.open(url)


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """A function that counts the shards that were decoded so far, in this process and those forked from it."""
    log, original = tmp_path / "decoded.txt", cache_module.read_rows

    def counting(store, identity, record, rows):
        with log.open("a") as f:
            f.write(f"{record.shard}\n")
        return original(store, identity, record, rows)

    monkeypatch.setattr(cache_module, "read_rows", counting)
    return lambda: Counter(map(int, log.read_text().split())) if log.exists() else Counter()


def open_samples(url, folder, *, room=ROOM, window=WINDOW):
    cache = Cache.open(url, disk_cache=DiskCache(folder, room))
    return CachedSamples({"teacher": [cache]}, objective("kd"), window_shards=window)


def make_sampler(samples, *, rank=0, world_size=1, batch_tokens=100):
    return GlobalBatchSampler(
        samples,
        batch_tokens=batch_tokens,
        window_shards=WINDOW,
        seed=7,
        rank=rank,
        world_size=world_size,
        accumulation_steps=1,
    )


def as_keys(micro):
    return [sample.key for sample in micro.samples if len(sample.target_positions)]


def check(micro, plain):
    for sample in micro.samples:
        expected = plain[plain.index_of(sample.key)]
        assert np.array_equal(sample.input_ids, expected.input_ids)
        if len(sample.target_positions):
            assert sample.topks["teacher"][0].equals(expected.topk)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "logitcache-read-ahead"]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_read_ahead_is_what_is_trained_on(url, plain, tmp_path, decoded):
    samples = open_samples(url, tmp_path / "local")
    for epoch in (0, 1):
        sampler = make_sampler(samples)
        sampler.set_epoch(epoch)
        for part in sampler:
            check(samples.__getitems__(part), plain)
    in_epochs = decoded()
    assert set(in_epochs) == set(plain.shards)
    # `plain` decodes a part of a shard for each sample that it is asked for; whole shards are decoded once.
    wait_for(lambda: not threads())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_decode_each_shard_once_between_them(url, tmp_path, decoded, num_workers):
    """Two ranks, in turn here; the workers are processes of their own."""
    loaders = []
    for rank in range(2):
        samples = open_samples(url, tmp_path / "local")
        sampler = make_sampler(samples, rank=rank, world_size=2)
        loaders.append(EpochLoader(samples, batch_sampler=sampler, collate_fn=as_keys, num_workers=num_workers))
    seen = [key for parts in zip(*loaders, strict=True) for keys in parts for key in keys]
    wait_for(lambda: not threads())
    assert len(seen) == len(samples)
    assert decoded() == dict.fromkeys(samples.primary.shards, 1)


def test_the_next_window_is_fetched_while_this_one_is_trained_on(url, tmp_path, decoded):
    samples = open_samples(url, tmp_path / "local")
    parts = list(make_sampler(samples))
    windows = [window for part in parts for window in part.coming]
    shards = [tuple(dict.fromkeys(shards)) for _, shards in dict.fromkeys(windows)]
    assert sorted(s for window in shards for s in window) == sorted(samples.primary.shards)
    samples.__getitems__(parts[0])
    wait_for(lambda: len(decoded()) == 2 * WINDOW)
    assert set(decoded()) == {*shards[0], *shards[1]}
    wait_for(lambda: not threads())
    before = decoded()
    for part in parts[1:]:
        if {s for _, window in part.coming for s in window} <= before.keys():
            samples.__getitems__(part)
    assert decoded() == before


def test_what_is_in_memory_is_let_go(url, tmp_path):
    """Mapped are the current window and the next; of the rest nothing is in use."""
    samples = open_samples(url, tmp_path / "local")
    (reader,) = samples._rows["teacher"]
    num_rows = samples.primary.plan.shard_num_rows
    bound = sum(sorted(num_rows)[-WINDOW - 1 :])
    for part in make_sampler(samples):
        samples.__getitems__(part)
        wait_for(lambda: not threads())
        assert sum(map(len, reader._shards.values())) <= bound
        coming = {shard for _, window in part.coming for shard in window}
        assert reader._ahead.keys() <= coming
        assert len(coming) <= 3 * WINDOW


def test_a_bound_of_one_window_and_a_shard_is_enough(url, plain, tmp_path, decoded, caplog):
    cache = Cache.open(url)
    room = cache.num_local_bytes(WINDOW + 1) + 1000
    samples = open_samples(url, tmp_path / "local", room=room)
    for part in make_sampler(samples):
        for sample in samples.__getitems__(part).samples:
            expected = plain.read_shard(int(plain.index.shard[plain.index_of(sample.key)]))
            assert expected.k == sample.topks["teacher"][0].k
        total = 0
        for path in (tmp_path / "local").iterdir():
            with suppress(FileNotFoundError):  # what is read ahead is renamed meanwhile
                total += path.stat().st_size
        assert total <= room
    assert "no room" not in caplog.text


def test_a_bound_below_a_window_is_refused_with_the_number_needed(url, tmp_path):
    cache = Cache.open(url)
    needed = cache.num_local_bytes(WINDOW + 1)
    with pytest.raises(InputError, match=rf"may have {needed - 1:,} bytes, and a shuffle window of 3 .* {needed:,} "):
        open_samples(url, tmp_path / "local", room=needed - 1)
    open_samples(url, tmp_path / "local", room=needed)


def test_the_room_of_several_caches_adds_up(url, tmp_path):
    disk_cache = DiskCache(tmp_path / "local", Cache.open(url).num_local_bytes(WINDOW + 1) * 2 - 1)
    caches = {role: [Cache.open(url, disk_cache=disk_cache)] for role in ("teacher", "reference")}
    with pytest.raises(InputError, match="a shuffle window of 3 shards"):
        CachedSamples(caches, objective("asft"), window_shards=WINDOW)


def test_damage_ahead_is_an_error_of_the_read_that_needs_it(url, tmp_path):
    copy = f"memory://{tmp_path.name}"
    source, target = Cache.open(url).store, cache_module.open_store(copy)
    for path in source.list(""):
        target.put(path, source.get(path))
    samples = open_samples(copy, tmp_path / "local")
    parts = list(make_sampler(samples))
    bad = parts[-1].coming[-1][1][-1]
    for item in samples.primary.shards[bad].objects:
        target.put(item.path, b"x" * item.size)
    failed = 0
    for part in parts:
        needs = set(samples.shard[part.batch].tolist())
        if bad in needs:
            with pytest.raises(CorruptionError, match=f"shards/{bad:05d}-"):
                samples.__getitems__(part)
            failed += 1
        else:
            samples.__getitems__(part)
    assert failed


def test_resumed_at_any_step_with_another_number_of_ranks(url, tmp_path):
    samples = open_samples(url, tmp_path / "local")
    whole = [sorted(as_keys(samples.__getitems__(part))) for part in make_sampler(samples)]
    for step, world_size in ((0, 3), (4, 2), (len(whole) - 1, 8), (7, 4)):
        ranks = [
            islice(make_sampler(samples, rank=rank, world_size=world_size), step, None) for rank in range(world_size)
        ]
        resumed = [
            sorted(key for part in parts for key in as_keys(samples.__getitems__(part)))
            for parts in zip(*ranks, strict=True)
        ]
        assert resumed == whole[step:]


def test_without_a_disk_cache_nothing_is_read_ahead(plain):
    samples = CachedSamples({"teacher": [plain]}, objective("kd"), window_shards=WINDOW)
    assert all(part.coming == () for part in make_sampler(samples))
    samples.__getitems__(next(iter(make_sampler(samples))))
    assert not threads()


def test_readers_survive_pickle_without_what_they_hold(url, tmp_path):
    samples = open_samples(url, tmp_path / "local")
    part = next(iter(make_sampler(samples)))
    expected = as_keys(samples.__getitems__(part))
    again = pickle.loads(pickle.dumps(samples))
    (reader,) = again._rows["teacher"]
    assert not reader._shards and not reader._ahead
    assert as_keys(again.__getitems__(part)) == expected


def test_threads_end_and_go_on_where_asked():
    """Also when the order jumps: what is no longer wanted is not fetched, and what is held is let go."""
    wait_for(lambda: not threads())  # of other tests
    release = threading.Event()

    class Slow:
        def __init__(self):
            self.held = set()
            self.fetched = []

        def pieces_of(self, samples):
            return samples.tolist()

        def read_ahead(self, piece):
            self.fetched.append(piece)
            release.wait(20)
            if piece == 13:
                raise OSError("no answer")
            self.held.add(piece)

        def keep(self, pieces):
            self.held &= pieces

        def __contains__(self, piece):
            return piece in self.held

    source = Slow()
    ahead = ReadAhead([source])
    ahead.follow([ahead.needs(np.arange(100)), ahead.needs(np.arange(100, 200))])
    ahead.follow([ahead.needs(np.arange(10, 15)), ahead.needs(np.arange(20, 22))])
    assert len(threads()) == 2
    release.set()
    wait_for(lambda: not threads())
    assert set(source.fetched) == {0, 1, 10, 11, 12, 13, 14, 20, 21}
    ahead.follow([ahead.needs(np.arange(14, 22))])
    wait_for(lambda: not threads())
    assert source.held == set(range(14, 22))


def test_rows_are_those_of_the_places(plain):
    places = np.array([5, 0, 119, 60])
    reader = RowReader(plain, places, 2)
    for i, place in enumerate(places):
        assert reader.rows(i).equals(plain[int(place)].topk)
    assert list(reader.pieces_of(np.array([2, 0, 2]))) == [plain.index.shard[119], plain.index.shard[5]]
