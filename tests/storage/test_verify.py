"""Verification: every object of a cache damaged in turn, and rows that are wrong behind right checksums."""

import dataclasses
import random
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache_storage import verify
from logitcache_storage.cache import Cache
from logitcache_storage.commit import (
    commit_path,
    load_commit,
    load_identity,
    load_manifest,
    new_attempt,
    quarantine_path,
    quarantine_shard,
    write_manifest,
)
from logitcache_storage.committed import object_record
from logitcache_storage.encoding import encode
from logitcache_storage.errors import CacheNotFoundError, MismatchError, StoreError
from logitcache_storage.objects import open_store
from logitcache_storage.plans import load_plan, write_samples
from logitcache_storage.record_json import dump_record
from logitcache_storage.shard_format import shard_format
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

K, VOCAB = 5, 30


def write(url, container="zarr", **options):
    samples, topks = make_samples(20, K, VOCAB)
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=50, container=container, id_layout="plain")
    write_cache(url, samples, topks, identity=identity, **options)


@pytest.fixture(scope="module", params=["zarr", "arrow"])
def intact(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write(str(folder / "cache"), request.param)
    return folder / "cache"


@pytest.fixture
def cache(intact, tmp_path):
    """A copy to damage."""
    return shutil.copytree(intact, tmp_path / "cache")


def paths_of(report):
    return [found.path for found in report.damage]


@pytest.mark.parametrize("deep", [False, True])
def test_an_intact_cache_is_intact(intact, deep):
    report = verify_cache(str(intact), deep=deep)
    assert report.is_intact and report.is_deep == deep
    files = [path for path in intact.rglob("*") if path.is_file()]
    assert report.num_objects == len(files)
    opened = Cache.open(str(intact))
    assert (report.num_shards, report.num_planned_shards) == (len(opened.shards), len(opened.plan.shard_num_rows))
    assert report.num_rows == opened.plan.num_rows


def damages(data):
    """One changed bit, the end cut off, something appended, nothing left."""
    bit = random.Random(0).randrange(8 * len(data))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return [bytes(flipped), data[:-1], data + b"\0", b""]


def test_every_object_damaged_in_turn_is_reported_by_name(cache):
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        name, data = path.relative_to(cache).as_posix(), path.read_bytes()
        for wrong in damages(data):
            path.write_bytes(wrong)
            found = paths_of(verify_cache(str(cache)))
            assert found == [name], f"{name} with {len(wrong)} of {len(data)} bytes: {found}"
        path.write_bytes(data)


def test_every_missing_object_is_reported_by_name(cache):
    files = sorted(p for p in cache.rglob("*") if p.is_file())
    may_be_absent = {"cache.json", "manifest.json", "plans/00000.json"}  # absent before, during and after a build
    for path in files:
        name, data = path.relative_to(cache).as_posix(), path.read_bytes()
        if name in may_be_absent:
            continue
        path.unlink()
        found = paths_of(verify_cache(str(cache)))
        assert found == (["manifest.json"] if name.startswith("commits/") else [name]), name
        path.write_bytes(data)


def test_the_check_goes_on_to_the_end(cache):
    names = [f"{commit_path(0)}", *(sorted(o.path for o in load_commit(open_store(str(cache)), 1).objects)[:2])]
    names.append(load_plan(open_store(str(cache))).vocabulary.path)
    for name in names:
        (cache / name).write_bytes(b"{}")
    for deep in (False, True):
        report = verify_cache(str(cache), deep=deep)
        assert set(paths_of(report)) == set(names)
        assert {found.shard for found in report.damage} == {None, 0, 1}


def test_commits_without_a_plan_are_damage(cache):
    (cache / "plans/00000.json").unlink()
    assert paths_of(verify_cache(str(cache))) == ["plans/00000.json"]


def test_no_cache_and_another_version_are_refused(cache, tmp_path):
    with pytest.raises(CacheNotFoundError):
        verify_cache(str(tmp_path / "nothing"))
    identity = (cache / "cache.json").read_text().replace('"format_version": 1', '"format_version": 9')
    (cache / "cache.json").write_text(identity)
    with pytest.raises(MismatchError, match="format version 9"):
        verify_cache(str(cache))


def test_an_unfinished_build_with_quarantine_is_intact(tmp_path):
    write(str(tmp_path), commit_shards=1)
    quarantine_shard(open_store(str(tmp_path)), 2, ["worker lost"])
    report = verify_cache(str(tmp_path), deep=True)
    assert report.is_intact and report.num_shards == 1 < report.num_planned_shards
    assert [(q.shard, q.reasons) for q in report.quarantine] == [(2, ("worker lost",))]


def test_a_cache_without_a_plan_yet_is_intact(tmp_path):
    store = open_store(str(tmp_path))
    store.create("cache.json", dump_record(make_identity()))
    assert verify_cache(store, deep=True).is_intact


# What only --deep can see: right checksums over wrong contents.


def rewrite_shard(url, shard, change_columns=None, change_record=None):
    """Replace a shard by one whose checksums are right, whatever its contents."""
    store = open_store(url)
    identity, record = load_identity(store), load_commit(store, shard)
    topk = Cache.open(url).read_shard(shard)
    columns = encode(topk, identity.precision, identity.id_layout)
    if change_columns:
        columns = change_columns(columns)
    prefix = f"shards/{shard:05d}-{'f' * 16}"
    objects = []
    for suffix, data in shard_format(identity.container).write(columns, {}).items():
        store.put(prefix + suffix, data)
        objects.append(object_record(prefix + suffix, data))
    record = dataclasses.replace(
        record, attempt="f" * 16, objects=tuple(objects), num_bytes=sum(o.size for o in objects)
    )
    commit(store, change_record(record) if change_record else record)


def commit(store, record):
    listed = load_manifest(store)
    store.put(commit_path(record.shard), dump_record(record))
    write_manifest(store, {**listed, record.shard: record})


def set_column(name, row, value):
    def change(columns):
        column = columns[name].copy()
        column[row] = value
        return {**columns, name: column}

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_column("ids", 3, 7), "the same id twice in a row at row 3"),
        (set_column("ids", (2, 1), VOCAB), "ids outside"),
        (set_column("num_kept", 1, 0), "num_kept"),
        (set_column("label_log_prob", 4, np.nan), "label_log_prob"),
        (set_column("log_tail", 0, 0.5), "log_tail"),
        (set_column("codes", (5, 4), 255), "level|entropy_sum"),
        (lambda columns: {name: column[:-1] for name, column in columns.items()}, "rows"),
        (lambda columns: {**columns, "codes": columns["codes"].astype(np.uint16)}, "codes"),
        (lambda columns: {n: c for n, c in columns.items() if n != "log_tail"}, "log_tail"),
    ],
)
def test_rows_that_make_no_sense_are_found_by_deep_alone(cache, change, problem):
    rewrite_shard(str(cache), 1, change)
    assert verify_cache(str(cache)).is_intact
    report = verify_cache(str(cache), deep=True)
    assert paths_of(report) == [f"shards/00001-{'f' * 16}"]
    assert report.damage[0].shard == 1
    assert re.search(problem, report.damage[0].problem)


def test_statistics_that_do_not_follow_from_the_rows(cache):
    def lie(record):
        return dataclasses.replace(record, statistics={**record.statistics, "entropy_sum": 1.0})

    rewrite_shard(str(cache), 0, change_record=lie)
    (found,) = verify_cache(str(cache), deep=True).damage
    assert "entropy_sum is" in found.problem and "its commit record says 1.0" in found.problem


def test_rows_of_another_shard_do_not_fit_the_labels(cache):
    """Right in themselves, in the wrong place: only the labels can tell."""
    other = Cache.open(str(cache)).read_shard(0)

    def exchange(columns):
        rows = len(columns["ids"])
        taken = encode(other[np.arange(rows) % len(other)], "u8", "plain")
        return {name: taken[name] for name in columns}

    rewrite_shard(str(cache), 1, exchange)
    (found,) = verify_cache(str(cache), deep=True).damage
    assert found.path == f"shards/00001-{'f' * 16}"


def test_a_shard_of_another_size_than_planned(cache):
    store = open_store(str(cache))
    record = load_commit(store, 1)
    commit(store, dataclasses.replace(record, num_rows=record.num_rows - 1))
    found = verify_cache(str(cache)).damage[0]
    assert found.path == commit_path(1) and "the plan has" in found.problem


def test_samples_whose_key_is_not_theirs(tmp_path):
    url = str(tmp_path)
    write(url)
    store = open_store(url)
    plan = load_plan(store)
    part = plan.parts[0]
    path = tmp_path / part.object.path
    table = pq.read_table(path)
    keys = table.column("key").to_pylist()
    keys[2] = bytes(16)
    table = table.set_column(0, "key", pa.array(keys, pa.binary(16)))
    pq.write_table(table, path)
    record = object_record(part.object.path, path.read_bytes())
    changed = dataclasses.replace(plan, parts=(dataclasses.replace(part, object=record),))
    store.put("plans/00000.json", dump_record(changed))
    assert verify_cache(url).is_intact
    index, found = verify_cache(url, deep=True).damage
    assert (found.path, found.shard) == (part.object.path, None)
    assert found.problem == "sample 2: its key is not the hash of its tokens"
    assert (index.path, index.shard) == (part.index.path, None)
    assert index.problem == f"differs from {part.object.path}, whose columns it repeats"


def test_parts_whose_columns_differ(tmp_path):
    """What inner fields of a list are called is no difference: Parquet calls them as it likes."""
    url, store = str(tmp_path), open_store(str(tmp_path))
    write(url)
    plan = load_plan(store)
    table = pq.read_table(tmp_path / plan.parts[0].object.path)
    for extra, differs in ((pa.list_(pa.field("item", pa.string())), False), (pa.string(), True)):
        tables = [
            table.slice(0, 12).append_column("x", pa.array([None] * 12, pa.list_(pa.field("element", pa.string())))),
            table.slice(12).append_column("x", pa.array([None] * 8, extra)),
        ]
        parts = write_samples(store, new_attempt(), tables)
        store.put("plans/00000.json", dump_record(dataclasses.replace(plan, parts=parts)))
        found = [(item.path, item.problem) for item in verify_cache(url, deep=True).damage]
        problem = "has other columns than the parts before it"
        assert found == ([(parts[1].object.path, problem)] if differs else [])


def test_a_damaged_quarantine_record_is_named_and_hides_no_other(tmp_path):
    write(str(tmp_path), commit_shards=1)
    store = open_store(str(tmp_path))
    for shard in (1, 2):
        quarantine_shard(store, shard, ["worker lost"])
    store.put(quarantine_path(1), b"{}")
    report = verify_cache(store)
    assert [(found.path, found.shard) for found in report.damage] == [(quarantine_path(1), None)]
    assert [record.shard for record in report.quarantine] == [2]


class DeafStore:
    """A store that does not answer for one object."""

    def __init__(self, store, path):
        self._store, self._path = store, path

    def get(self, path):
        if path == self._path:
            raise StoreError(f"{self._store.url}/{path}: connection reset")
        return self._store.get(path)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_what_the_store_does_not_answer_for_is_told_from_damage(cache):
    store = open_store(str(cache))
    path = load_commit(store, 1).objects[0].path
    for name in (path, commit_path(1), load_plan(store).parts[0].object.path):
        found = {found.path: found for found in verify_cache(DeafStore(store, name)).damage}
        assert found.pop(name).is_unreachable
        assert not found
    (cache / path).write_bytes(b"")
    (found,) = verify_cache(store).damage
    assert not found.is_unreachable


def test_commits_made_while_the_check_runs_are_no_damage(cache, monkeypatch):
    """A builder finishes the cache after the commits were listed, before the plan is read."""
    store = open_store(str(cache))
    late = {path: store.get(path) for path in (commit_path(1), "manifest.json", "manifest.parquet")}
    for path in late:
        store.delete(path)
    plan = verify._Check.plan

    def build_on(check):
        for path, data in late.items():
            store.put(path, data)
        return plan(check)

    monkeypatch.setattr(verify._Check, "plan", build_on)
    report = verify_cache(store)
    assert report.is_intact and report.num_shards == report.num_planned_shards - 1
