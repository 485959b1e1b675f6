"""Several plans read as one: what stands where, what is refused, and which manifest is believed."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from logitcache_storage import commit
from logitcache_storage.cache import Cache
from logitcache_storage.errors import CorruptionError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import (
    Plans,
    commit_extension,
    join_plans,
    load_plan,
    load_plans,
    plan_path,
    plan_paths,
    write_samples,
)
from logitcache_storage.record_json import dump_record
from logitcache_storage.samples import target_positions
from logitcache_storage.schema import CorpusIdentity, ExtensionRecord, PlanRecord
from logitcache_storage.status import build_status
from logitcache_storage.testing import PlannedTokens, _plan_table, make_identity, make_samples, write_cache
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.verify import verify_cache

K, VOCAB = 3, 50
IDENTITY = make_identity(k=K, vocab_size=VOCAB, precision="fp32", shard_rows=24)
SAMPLES, TOPKS = make_samples(9, K, VOCAB, seed=1)
MORE = [make_samples(n, K, VOCAB, seed=n) for n in (5, 2)]


def extension_of(store: ObjectStore, samples: Sequence[PlannedTokens], name: str) -> ExtensionRecord:
    """A plan of further samples, its objects written."""
    plan = load_plan(store)
    assert plan is not None
    table, sizes = _plan_table(samples, IDENTITY.shard_rows, {})
    place = table.column_names.index("shard")
    shifted = pc.add(table.column("shard"), pa.scalar(len(plan.shard_num_rows), pa.int32()))
    parts = write_samples(store, commit.new_attempt(), [table.set_column(place, table.schema.field("shard"), shifted)])
    num_tokens = sum(len(ids) for ids, _ in samples)
    report = {"records": len(samples), "examples": {"empty": [f"{name}:1"]}}
    record = PlanRecord(len(samples), num_tokens, sum(sizes), sizes, report, parts, plan.vocabulary)
    return ExtensionRecord(CorpusIdentity(name, len(samples), {}), len(plan.shard_num_rows), record)


def score(
    store: ObjectStore, first_shard: int, samples: Sequence[PlannedTokens], topks: Sequence[TopKLogProbs]
) -> None:
    """Commit the shards of an extension."""
    shard_of = np.asarray(_plan_table(samples, IDENTITY.shard_rows, {})[0].column("shard"))
    for shard in np.unique(shard_of):
        inside = np.flatnonzero(shard_of == shard)
        labels = np.concatenate([samples[i][0][target_positions(samples[i][1].ravel())] for i in inside])
        topk = TopKLogProbs.concatenate([topks[i] for i in inside])
        commit.commit_shard(store, IDENTITY, first_shard + int(shard), topk, labels, seconds=0.0, worker="test")


@pytest.fixture
def store() -> ObjectStore:
    """A complete cache of one plan."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    write_cache(store, SAMPLES, TOPKS, identity=IDENTITY)
    return store


def extend(store: ObjectStore, number: int) -> ExtensionRecord:
    extension = extension_of(store, MORE[number - 1][0], f"more-{number}")
    assert commit_extension(store, number, extension)
    return extension


def test_one_plan_is_itself(store: ObjectStore) -> None:
    plans = load_plans(store)
    assert plans is not None and plans.extensions == ()
    assert load_plan(store) == plans.first


def test_samples_shards_and_rows_stand_one_plan_behind_the_other(store: ObjectStore) -> None:
    for number, (samples, topks) in enumerate(MORE, 1):
        score(store, extend(store, number).first_shard, samples, topks)
    plan = load_plan(store)
    assert plan is not None
    assert plan.num_samples == 16 == sum(part.num_samples for part in plan.parts)
    assert [part.first_sample for part in plan.parts] == [0, 9, 14]
    assert plan.num_tokens == sum(len(ids) for ids, _ in [*SAMPLES, *MORE[0][0], *MORE[1][0]])
    cache = Cache.open(store.url)
    assert cache.is_complete
    expected = [*zip(SAMPLES, TOPKS, strict=True), *(pair for more in MORE for pair in zip(*more, strict=True))]
    assert len(cache) == len(expected)
    for sample, ((ids, _), topk) in zip(cache, expected, strict=True):
        assert np.array_equal(sample.input_ids, ids)
        assert sample.topk.equals(topk)
    report = verify_cache(store, deep=True)
    assert report.is_intact and report.num_shards == len(plan.shard_num_rows)


def test_reports_are_added_up_and_kept(store: ObjectStore) -> None:
    extend(store, 1)
    extend(store, 2)
    report = build_status(store).plan.report
    assert report["records"] == 7
    assert report["examples"] == {"empty": ["more-1:1", "more-2:1"]}
    assert [r.get("records") for r in report["plans"]] == [None, 5, 2]


def test_the_plan_of_a_corpus_is_found(store: ObjectStore) -> None:
    extend(store, 1)
    extend(store, 2)
    plans = load_plans(store)
    assert plans is not None
    assert [plans.number_of(name) for name in ("more-1", "more-2", "f" * 64)] == [1, 2, None]


def test_of_two_extensions_one_wins(store: ObjectStore) -> None:
    ours, theirs = extension_of(store, MORE[0][0], "ours"), extension_of(store, MORE[1][0], "theirs")
    assert commit_extension(store, 1, theirs)
    assert not commit_extension(store, 1, ours)
    assert load_plans(store).extensions == (theirs,)
    assert not commit_extension(store, 1, ours)
    assert len(plan_paths(store)) == 2


def test_a_missing_plan_is_named(store: ObjectStore) -> None:
    extend(store, 1)
    extend(store, 2)
    store.delete(plan_path(1))
    with pytest.raises(CorruptionError, match=r"plans/00001\.json: no such object, and there are 2 plans"):
        load_plan(store)
    assert [found.path for found in verify_cache(store).damage] == [plan_path(1)]


def test_an_extension_of_another_cache_is_refused(store: ObjectStore) -> None:
    extension = extend(store, 1)
    store.put(plan_path(1), dump_record(dataclasses.replace(extension, first_shard=extension.first_shard + 1)))
    planned = extension.first_shard
    with pytest.raises(CorruptionError, match=rf"begins at shard {planned + 1}, and {planned} shards are planned"):
        load_plan(store)
    assert [found.path for found in verify_cache(store).damage] == [plan_path(1)]
    with pytest.raises(CorruptionError, match=r"^here/plans/00001\.json"):
        join_plans(load_plans(store) or Plans(extension.plan), where="here")


def test_every_plan_and_its_samples_are_verified(store: ObjectStore) -> None:
    part = extend(store, 1).plan.parts[0]
    for path in (plan_path(0), plan_path(1), part.object.path):
        good = store.get(path)
        store.put(path, good[:-1])
        assert [found.path for found in verify_cache(store).damage] == [path]
        store.put(path, good)
    assert verify_cache(store, deep=True).is_intact


def test_a_manifest_older_than_an_extension_hides_nothing(store: ObjectStore) -> None:
    old = commit.load_commits(store)
    score(store, extend(store, 1).first_shard, *MORE[0])
    assert commit.load_manifest(store) == old  # as where a build of the first plan was slow to write it
    cache = Cache.open(store.url)
    assert cache.is_complete and len(cache) == 14
    assert verify_cache(store).is_intact


def test_a_reader_beside_an_extension_sees_the_plans_it_has_read(store: ObjectStore) -> None:
    """Whatever of a later plan is committed between its reads of plan and commits."""
    old = commit.load_commits(store)
    score(store, extend(store, 1).first_shard, *MORE[0])
    assert commit.load_commits(store, len(old)) == old
    store.delete(commit.MANIFEST_PATH)
    assert commit.load_commits(store, len(old)) == old
    commit.write_manifest(store, commit.load_commits(store))
    assert commit.load_commits(store, len(old)) == old
