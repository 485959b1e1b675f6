"""What users import: samples by index and by key, tokens, shards, caches that are still being built."""

from __future__ import annotations

import pickle
import uuid
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from logitcache_storage import Cache, Sample
from logitcache_storage.commit import commit_shard, create_or_continue
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.invariants import check_rows
from logitcache_storage.local_rows import from_buffer, to_buffers
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import commit_plan, write_parquet, write_samples
from logitcache_storage.samples import SAMPLES_SCHEMA, target_positions
from logitcache_storage.schema import PlanRecord
from logitcache_storage.testing import FlakyStore, make_identity, make_samples, make_topk, write_cache
from logitcache_storage.topk import TopKLogProbs

SAMPLES, TOPKS = make_samples(40, k=3, vocab_size=50, seed=9)
EXACT = {"k": 3, "precision": "fp32", "shard_rows": 50}


def new_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def check_sample(sample: Sample, i: int) -> None:
    ids, ranges = SAMPLES[i]
    positions = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    assert np.array_equal(sample.input_ids, ids)
    assert np.array_equal(sample.target_positions, positions)
    assert np.array_equal(sample.labels, ids[positions])
    assert sample.topk.equals(TOPKS[i])
    assert sample.key == sample_key(ids, ranges)
    assert sample.source_id == f"test:{i + 1}"


@pytest.fixture(scope="module", params=["zarr", "arrow"])
def cache(request) -> Cache:
    url = new_url()
    columns = {"weight": [i / 7 for i in range(40)], "tags": [["a"] * (i % 3) for i in range(40)]}
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(container=request.param, **EXACT), columns=columns)
    return Cache.open(url)


def test_every_sample(cache: Cache) -> None:
    assert len(cache) == 40 and cache.is_complete
    for i, sample in enumerate(cache):
        check_sample(sample, i)
        assert sample.columns == {"weight": i / 7, "tags": ["a"] * (i % 3)}
    check_sample(cache[17], 17)
    check_sample(cache[-1], 39)


def test_in_the_order_asked(cache: Cache) -> None:
    wanted = np.random.default_rng(0).integers(-40, 40, size=60).tolist()
    found = cache.read(wanted)
    assert len(found) == 60
    for i, sample in zip(wanted, found, strict=True):
        check_sample(sample, i % 40)
    assert cache.read([]) == []
    assert cache.read(np.arange(3))[2].key == cache[2].key


@pytest.mark.parametrize("index", [40, -41, 10**9])
def test_indices_outside(cache: Cache, index: int) -> None:
    for read in (cache.__getitem__, lambda i: cache.read([0, i]), lambda i: cache.read_tokens([i])):
        with pytest.raises(IndexError, match=f"sample {index} of a cache with 40 committed samples"):
            read(index)


def test_tokens_without_rows(cache: Cache) -> None:
    for i, (ids, positions) in zip([5, 5, 39, 0], cache.read_tokens([5, 5, 39, 0]), strict=True):
        assert np.array_equal(ids, SAMPLES[i][0])
        assert np.array_equal(positions, target_positions(SAMPLES[i][1].ravel()))


def test_whole_shards(cache: Cache) -> None:
    joined = TopKLogProbs.concatenate([cache.read_shard(shard) for shard in sorted(cache.shards)])
    assert joined.equals(TopKLogProbs.concatenate(TOPKS))
    for shard, first_row, count, topk in zip(
        *(cache.samples.column(name).to_pylist() for name in ("shard", "first_row", "num_targets")), TOPKS, strict=True
    ):
        assert cache.read_shard(shard)[first_row : first_row + count].equals(topk)
    with pytest.raises(KeyError):
        cache.read_shard(99)


def test_by_key(cache: Cache) -> None:
    keys = [sample_key(ids, ranges) for ids, ranges in SAMPLES]
    for i in (0, 17, 39):
        assert cache.index_of(keys[i]) == cache.index_of(keys[i][:6]) == cache.index_of(keys[i].upper()) == i
    assert [key.hex() for key in cache.keys().tolist()] == keys
    assert [cache.key(i) for i in (0, -1)] == [keys[0], keys[39]]
    for key in ("", "123", keys[0][:5], "0" * 32, "not a key", keys[0] + "0"):
        with pytest.raises(InputError, match=r"no sample has the key .*6 to 32 hex digits"):
            cache.index_of(key)


def test_caches_of_one_corpus_join_by_key() -> None:
    """Another teacher, other shards, another order: the same keys."""
    first, second = new_url(), new_url()
    write_cache(first, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    order = np.random.default_rng(0).permutation(40)
    labels = [ids[target_positions(ranges.ravel())] for ids, ranges in SAMPLES]
    others = [make_topk(len(labels[i]), 5, 50, seed=i, labels=labels[i]) for i in range(40)]
    write_cache(
        second,
        [SAMPLES[i] for i in order],
        [others[i] for i in order],
        identity=make_identity(k=5, container="arrow", shard_rows=17),
    )
    a, b = Cache.open(first), Cache.open(second)
    for sample in a:
        twin = b[b.index_of(sample.key)]
        assert np.array_equal(sample.input_ids, twin.input_ids)
        assert np.array_equal(sample.target_positions, twin.target_positions)
        assert len(sample.topk) == len(twin.topk)


def test_equal_samples_have_one_key() -> None:
    url = new_url()
    write_cache(url, [SAMPLES[0], SAMPLES[1], SAMPLES[0]], [TOPKS[0], TOPKS[1], TOPKS[0]], identity=make_identity(k=3))
    cache = Cache.open(url)
    assert cache.index_of(cache[2].key) == 0


def test_samples_that_share_rows() -> None:
    """A duplicate has no rows of its own: the plan points it at those of the first."""
    ids, ranges = SAMPLES[0]
    num_targets = len(TOPKS[0])
    identity, store = make_identity(**EXACT), open_store(new_url())
    row = {
        "key": bytes.fromhex(sample_key(ids, ranges)),
        "shard": 0,
        "first_row": 0,
        "num_tokens": len(ids),
        "num_targets": num_targets,
        "input_ids": ids,
        "target_ranges": ranges.ravel(),
    }
    table = pa.Table.from_pylist([{**row, "source_id": f"test:{n}"} for n in (1, 2)], schema=SAMPLES_SCHEMA)
    create_or_continue(store, identity)
    vocabulary = write_parquet(store, "vocabulary/x.parquet", pa.table({"text": []}))
    parts = write_samples(store, "x", [table])
    commit_plan(store, PlanRecord(2, 2 * len(ids), num_targets, (num_targets,), {}, parts, vocabulary))
    labels = ids[target_positions(ranges.ravel())]
    commit_shard(store, identity, 0, TOPKS[0], labels, seconds=0.0, worker="test")
    samples = Cache.open(store.url).read([1, 0, 1])
    assert [sample.source_id for sample in samples] == ["test:2", "test:1", "test:2"]
    assert all(sample.topk.equals(TOPKS[0]) for sample in samples)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_caches_that_are_still_being_built(num_shards: int) -> None:
    url = new_url()
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(**EXACT), commit_shards=num_shards)
    cache = Cache.open(url)
    assert not cache.is_complete
    assert sorted(cache.shards) == list(range(num_shards))
    assert len(cache) == sum(shard < num_shards for shard in _shards_of_the_plan(cache))
    for i, sample in enumerate(cache):
        check_sample(sample, i)
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    assert len(cache) < 40, "a cache shows what was committed when it was opened"
    assert len(Cache.open(url)) == 40


def test_a_later_shard_may_be_committed_first() -> None:
    url = new_url()
    identity = make_identity(**EXACT)
    write_cache(url, SAMPLES, TOPKS, identity=identity, commit_shards=0)
    store = open_store(url)
    full = new_url()
    write_cache(full, SAMPLES, TOPKS, identity=identity)
    reference = Cache.open(full)
    labels = np.concatenate(
        [s.labels for s, shard in zip(reference, _shards_of_the_plan(reference), strict=True) if shard == 2]
    )
    commit_shard(store, identity, 2, reference.read_shard(2), labels, seconds=0.0, worker="test")
    cache = Cache.open(url)
    inside = [i for i, shard in enumerate(_shards_of_the_plan(reference)) if shard == 2]
    assert len(cache) == len(inside)
    for i, sample in zip(inside, cache, strict=True):
        check_sample(sample, i)
    assert cache.index_of(reference[inside[1]].key) == 1
    assert [cache.key(i) for i in range(len(cache))] == [reference.key(i) for i in inside]
    assert cache.keys().tobytes() == reference.keys()[inside].tobytes()
    assert cache.samples.to_pylist() == cache.describe(range(len(cache)))
    with pytest.raises(InputError, match="no sample has the key"):
        cache.index_of(reference.key(inside[0] - 1))


def test_caches_survive_pickle(store_location) -> None:
    """As a data loader's workers get them, on every kind of store."""
    identity = make_identity(container="arrow", **EXACT)
    options = store_location.storage_options
    write_cache(store_location.url, SAMPLES[:9], TOPKS[:9], identity=identity, storage_options=options)
    cache = Cache.open(store_location.url, options)
    check_sample(cache[3], 3)
    again = pickle.loads(pickle.dumps(cache))
    check_sample(again[3], 3)
    assert len(pickle.dumps(cache)) < 50_000


class CountingStore(FlakyStore):
    """Counts what is read."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, set())
        self.num_bytes, self.paths = 0, Counter[str]()

    def _count(self, path: str, data: bytes) -> bytes:
        self.num_bytes += len(data)
        self.paths[path] += 1
        return data

    def get(self, path: str) -> bytes:
        return self._count(path, self._store.get(path))

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return self._count(path, self._store.get_range(path, start, stop))

    def get_many(self, paths: list[str]) -> list[bytes]:
        return [self.get(path) for path in paths]


def reopened(cache: Cache, **kwargs: object) -> tuple[Cache, CountingStore]:
    store = CountingStore(cache.store)
    return Cache(store, cache.identity, cache.plan, cache.shards, **kwargs), store


def big_cache() -> Cache:
    """One shard of ten chunks: 80 samples of 512 rows."""
    num_samples, rows = 80, 512
    topk = make_topk(num_samples * rows, 32, 100, labels=np.arange(num_samples * rows, dtype=np.int32) % 100)
    ids = np.arange(num_samples * rows, dtype=np.int32).reshape(num_samples, rows) % 100
    samples = [(np.append(np.int32(7), row), np.array([[1, rows + 1]], np.int32)) for row in ids]
    topks = [topk[i * rows : (i + 1) * rows] for i in range(num_samples)]
    url = new_url()
    write_cache(url, samples, topks, identity=make_identity(k=32, vocab_size=100, precision="fp32", shard_rows=10**6))
    return Cache.open(url)


def test_one_sample_of_many_costs_the_ranges_that_hold_it() -> None:
    cache, store = reopened(big_cache())
    size = cache.shards[0].num_bytes
    assert not [path for path in store.paths if path.startswith("shards")]
    store.num_bytes = 0
    assert len(cache[17].topk) == 512
    # A tenth of each column; but in whole blocks of 256 KiB, and with the block that says where its chunks are.
    assert store.num_bytes < 0.35 * size


def test_a_disk_cache_reads_each_object_once_for_all(tmp_path, cache: Cache) -> None:
    """Also for a second reader of the same folder, and for a second epoch."""
    readers = [reopened(cache, disk_cache=DiskCache(tmp_path, 10**7)) for _ in range(2)]
    for reader, store in readers:
        store.paths.clear()
        for _ in range(2):
            for shard in reader.shards:
                found = reader.read_shard(shard)
                assert found.equals(cache.read_shard(shard))
                assert not found.ids.flags.writeable
            for i, (ids, positions) in enumerate(reader.read_tokens(range(len(reader)))):
                assert np.array_equal(ids, SAMPLES[i][0])
                assert np.array_equal(positions, target_positions(SAMPLES[i][1].ravel()))
    (_, first), (_, second) = readers
    assert not second.paths
    samples = cache.plan.parts[0].object.path
    assert first.paths.pop(samples) <= 2  # its footer, and its one row group
    paths = [item.path for record in cache.shards.values() for item in record.row_objects]
    assert first.paths == {path: 1 for path in paths if not path.endswith("/zarr.json")}


def test_two_caches_share_a_folder(tmp_path) -> None:
    disk_cache = DiskCache(tmp_path, 10**7)
    caches = []
    for k in (2, 3):
        url = new_url()
        topks = [topk.keep_mass(1.0) for topk in make_samples(40, k=k, vocab_size=50, seed=9)[1]]
        write_cache(url, SAMPLES, topks, identity=make_identity(**{**EXACT, "k": k}))
        caches.append((Cache.open(url, disk_cache=disk_cache), Cache.open(url)))
    for _ in range(2):
        for shared, plain in caches:
            for shard in plain.shards:
                assert shared.read_shard(shard).equals(plain.read_shard(shard))
            assert [s.key for s in shared.read([3, 20])] == [s.key for s in plain.read([3, 20])]


def test_a_damaged_source_is_named_and_not_kept(tmp_path) -> None:
    url = new_url()
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(container="arrow", **EXACT))
    cache = Cache.open(url, disk_cache=DiskCache(tmp_path, 10**7))
    path = cache.shards[0].objects[0].path
    original = cache.store.get(path)
    cache.store.put(path, original[:50] + b"!" + original[51:])
    for read in (cache.read_shard, cache.read_shard_ahead):
        with pytest.raises(CorruptionError, match=path):
            read(0)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    cache.store.put(path, original)
    assert cache.read_shard(0).equals(Cache.open(url).read_shard(0))


def test_a_shard_without_rows_passes_through_the_disk_cache(tmp_path) -> None:
    cache = DiskCache(tmp_path, 1000)
    empty = TOPKS[0][:0]
    data = cache.get("empty", lambda: to_buffers(empty), source="")
    assert from_buffer(data, 0, 3).equals(empty)
    with pytest.raises(CorruptionError, match="local rows of 0 bytes, expected 36"):
        from_buffer(data, 1, 3)


def test_a_disk_cache_has_room_for_what_it_says(tmp_path) -> None:
    """`num_local_bytes` of all shards is what reading everything takes, but for what Arrow and checksums add."""
    url = new_url()
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    cache = Cache.open(url, disk_cache=DiskCache(tmp_path, 10**7))
    for shard in cache.shards:
        cache.read_shard(shard)
    rows = sum(path.stat().st_size for path in tmp_path.glob("*.rows"))
    num_shards = len(cache.shards)
    # Up to 1,024 samples a group are counted, and there are 40 of them.
    assert rows - 4 * num_shards <= cache.num_local_bytes(num_shards) <= rows + 1024 * 4 * 40
    assert cache.num_local_bytes(1) < cache.num_local_bytes(2) < cache.num_local_bytes(num_shards)


@pytest.mark.parametrize("precision", ["u8", "u10", "fp16", "fp32"])
def test_what_is_read_keeps_the_invariants(precision: str) -> None:
    url = new_url()
    identity = make_identity(k=5, precision=precision, kept_mass=0.95, shard_rows=64)
    samples, topks = make_samples(12, k=5, vocab_size=50, seed=1)
    write_cache(url, samples, [topk.keep_mass(0.95) for topk in topks], identity=identity)
    for sample in Cache.open(url):
        check_rows(sample.topk, sample.labels, 50, where=sample.key, precision=precision)


def test_ids_outside_the_vocabulary_are_damage() -> None:
    url = new_url()
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(**EXACT))
    cache = Cache.open(url)
    narrow = Cache(cache.store, make_identity(**{**EXACT, "vocab_size": 40}), cache.plan, cache.shards)
    with pytest.raises(CorruptionError, match=r"ids outside \[0, 40\)"):
        narrow.read_shard(0)
    deeper = Cache(cache.store, make_identity(**{**EXACT, "k": 4}), cache.plan, cache.shards)
    with pytest.raises(CorruptionError, match=r"hold \d+; \d+ rows of \('<i4', \(4,\)\) are \d+"):
        deeper.read_shard(0)
    coarser = Cache(cache.store, make_identity(**{**EXACT, "precision": "u8"}), cache.plan, cache.shards)
    with pytest.raises(CorruptionError, match=r"shards/00000-\w+/codes"):
        coarser.read_shard(0)


def test_vocabulary() -> None:
    url = new_url()
    words = ["a", "é", " the", "\n", *[f"w{i}" for i in range(46)]]
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(**EXACT), vocabulary=words)
    vocabulary = Cache.open(url).vocabulary
    assert len(vocabulary) == 50
    assert vocabulary.decode([2, 0, 1]) == " theaé"
    assert vocabulary.text(1) == "é".encode()


def _shards_of_the_plan(cache: Cache) -> list[int]:
    sizes = cache.plan.shard_num_rows
    ends = np.cumsum(sizes)
    rows = np.cumsum([0, *(len(topk) for topk in TOPKS)])[:-1]
    return [int(np.searchsorted(ends, row, side="right")) for row in rows]
