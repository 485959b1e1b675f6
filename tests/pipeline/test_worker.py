"""The worker against the model itself: its logits of one sample at a time, float64 log-softmax over all of them."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache_pipeline.build import remaining_tasks
from logitcache_pipeline.engines.transformers import TransformersTeacher
from logitcache_pipeline.prepare import prepare, write_plan
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import MAX_LENGTH, VOCAB_SIZE, write_teacher
from logitcache_pipeline.worker import (
    ScoringWorker,
    ShardOutcome,
    ShardTask,
    TeacherSettings,
    WorkerStoppingError,
)
from logitcache_storage import Cache, TopKLogProbs
from logitcache_storage.commit import create_or_continue, load_commit
from logitcache_storage.errors import (
    CacheNotFoundError,
    InputError,
    LogitCacheError,
    MismatchError,
    StoreUnavailableError,
)
from logitcache_storage.objects import LocalStore, open_store
from logitcache_storage.schema import PlanRecord
from logitcache_storage.verify import verify_cache

# Logits up to 8 in float32 (steps of 5e-7), through two layers of batches of another shape: a few dozen such steps.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model(teacher: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()


@pytest.fixture
def settings(teacher: Path, corpus: Path, tmp_path: Path) -> BuildSettings:
    """As in a build, without a Ray cluster."""
    cache = str(tmp_path / "cache")
    return BuildSettings(str(teacher), (str(corpus),), cache, k=9, precision="fp32", shard_rows=24)


def planned(settings: BuildSettings) -> PlanRecord:
    store, prepared = open_store(settings.cache), prepare(settings)
    create_or_continue(store, prepared.identity("float32"))
    return write_plan(store, prepared)


def worker(settings: BuildSettings, teacher: Path | None = None) -> ScoringWorker:
    return ScoringWorker(
        settings.cache,
        None,
        TeacherSettings("transformers", str(teacher or settings.teacher), "float32", {"tokens_per_batch": 300}),
    )


def score(scorer: ScoringWorker, task: ShardTask) -> ShardOutcome:
    """As the driver asks for it."""
    return scorer.score(task) or scorer.commit(task.shard)


def expected(model: torch.nn.Module, ids: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> torch.Tensor:
    """[M, V]: the model's distribution at the position before each target."""
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
    return logits.log_softmax(-1)[positions.astype(np.int64) - 1]


def check_rows(topk: TopKLogProbs, log_probs: torch.Tensor, labels: npt.NDArray[np.int32]) -> None:
    values = log_probs.numpy()
    for row, (ids, num_kept) in enumerate(zip(topk.ids, topk.num_kept, strict=True)):
        kept, full = ids[:num_kept], values[row]
        np.testing.assert_allclose(topk.log_probs[row, :num_kept], np.sort(full)[::-1][:num_kept], atol=TOLERANCE)
        np.testing.assert_allclose(topk.log_probs[row, :num_kept], full[kept], atol=TOLERANCE)
        outside = np.delete(full, kept)
        np.testing.assert_allclose(topk.log_tail[row], np.log(np.exp(outside).sum()), atol=TOLERANCE)
        np.testing.assert_allclose(topk.label_log_prob[row], full[labels[row]], atol=TOLERANCE)


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_every_row_is_what_the_model_says_of_its_target(settings, model, container):
    settings = replace(settings, format=container)
    plan = planned(settings)
    scorer = worker(settings)
    scorer.start()
    tasks = remaining_tasks(open_store(settings.cache), plan)
    outcomes = [score(scorer, task) for task in reversed(tasks)]
    assert sum(outcome.num_rows for outcome in outcomes) == plan.num_rows
    assert all(outcome.scored for outcome in outcomes)
    cache = Cache.open(settings.cache)
    assert len(cache) == plan.num_samples == 14
    for sample in cache:
        check_rows(sample.topk, expected(model, sample.input_ids, sample.target_positions), sample.labels)
    assert all(record.statistics_object is not None for record in cache.shards.values())
    assert verify_cache(settings.cache, deep=True).is_intact


def test_only_what_is_asked_is_scored(settings):
    plan = planned(settings)
    tasks = remaining_tasks(open_store(settings.cache), plan)
    outcome = score(worker(settings), tasks[3])
    assert (outcome.shard, outcome.num_rows) == (3, plan.shard_num_rows[3])
    assert list(Cache.open(settings.cache).shards) == [3]
    assert [task.shard for task in remaining_tasks(open_store(settings.cache), plan)] == [
        task.shard for task in tasks if task.shard != 3
    ]


def test_what_the_engine_warns_of_comes_with_the_next_shard(settings, monkeypatch):
    plan, scorer = planned(settings), worker(settings)
    tasks = remaining_tasks(open_store(settings.cache), plan)
    scorer.start()
    teacher, log = scorer._teacher, logging.getLogger("logitcache_pipeline.engines.transformers")
    score_all = teacher.score

    def hungry(*args):
        log.info("a batch")
        log.warning("a batch of %d tokens does not fit", 90)
        return score_all(*args)

    monkeypatch.setattr(teacher, "score", hungry)
    assert score(scorer, tasks[0]).warnings == ("a batch of 90 tokens does not fit",)
    monkeypatch.setattr(teacher, "score", score_all)
    log.warning("beside a score")
    assert score(scorer, tasks[1]).warnings == ()


def test_duplicates_share_the_rows_of_the_first(settings):
    plan = planned(settings)
    scorer = worker(settings)
    for task in remaining_tasks(open_store(settings.cache), plan):
        score(scorer, task)
    cache = Cache.open(settings.cache)
    first, second = (i for i, sample in enumerate(cache) if sample.columns["level"] in (3, 99))
    assert cache[first].key == cache[second].key
    assert cache[first].topk.equals(cache[second].topk)
    assert plan.num_rows == sum(len(sample.topk) for i, sample in enumerate(cache) if i != second)


def test_a_committed_shard_is_not_scored_again(settings):
    plan = planned(settings)
    scorer, store = worker(settings), open_store(settings.cache)
    task = remaining_tasks(store, plan)[0]
    score(scorer, task)
    record = load_commit(store, task.shard)
    outcome = scorer.score(task)
    assert (outcome.scored, outcome.seconds) == (False, 0.0)
    assert (outcome.num_rows, outcome.num_bytes) == (record.num_rows, record.num_bytes)
    assert load_commit(store, task.shard) == record


def test_kept_mass_drops_what_is_not_needed(settings, model):
    settings = replace(settings, kept_mass=0.3)
    plan = planned(settings)
    scorer = worker(settings)
    for task in remaining_tasks(open_store(settings.cache), plan)[:2]:
        score(scorer, task)
    kept = set()
    for sample in Cache.open(settings.cache):
        log_probs = expected(model, sample.input_ids, sample.target_positions)
        check_rows(sample.topk, log_probs, sample.labels)
        sums = np.cumsum(np.sort(log_probs.exp().numpy())[:, ::-1], axis=1)
        np.testing.assert_array_equal(sample.topk.num_kept, np.minimum((sums < 0.3).sum(1) + 1, settings.k))
        kept |= set(sample.topk.num_kept.tolist())
    assert len(kept) > 2


def test_a_worker_names_itself_and_may_be_started_again(settings):
    planned(settings)
    scorer = worker(settings)
    assert scorer.start() == scorer.start() == scorer.info


def test_a_sample_that_cannot_be_scored_leaves_nothing_behind(settings, tmp_path):
    """NaN in the embedding of a letter that the last shard but one holds."""
    broken = write_teacher(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    letter = AutoTokenizer.from_pretrained(broken)("w")["input_ids"][0]
    weights["model.embed_tokens.weight"][letter] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = replace(settings, teacher=str(broken))
    plan = planned(settings)
    with pytest.raises(LogitCacheError, match="the teacher's logits are NaN or infinite"):
        worker(settings).score(remaining_tasks(open_store(settings.cache), plan)[-2])
    assert not open_store(settings.cache).list("shards")


def test_a_probe_leaves_nothing_behind(settings):
    plan = planned(settings)
    scorer, store = worker(settings), open_store(settings.cache)
    task = remaining_tasks(store, plan)[0]
    assert scorer.score(replace(task, samples=task.samples[:1], is_probe=True)) is None
    assert not store.list("shards") and not store.list("commits")
    with pytest.raises(KeyError):
        scorer.commit(task.shard)


def test_samples_that_are_left_out_are_named_by_the_commit(settings, model):
    """One of them is two records of equal tokens; all others are in the cache, and right."""
    settings = replace(settings, shard_rows=1000)
    plan = planned(settings)
    scorer, store = worker(settings), open_store(settings.cache)
    (task,) = remaining_tasks(store, plan)
    places = scorer._samples.places()
    shared = next(int(s) for s in task.samples if (places.first_row == places.first_row[s]).sum() == 2)
    bad = [shared, int(task.samples[-1])]
    rest = np.array([s for s in task.samples if s not in bad])
    outcome = score(scorer, replace(task, samples=rest, excluded=((bad[1], "too odd"), (bad[0], "kills"))))
    assert [(s.reason, len(s.source_ids)) for s in outcome.excluded] == [("kills", 2), ("too odd", 1)]
    assert outcome.num_rows + sum(s.num_rows for s in outcome.excluded) == plan.num_rows
    cache = Cache.open(settings.cache)
    assert len(cache) == plan.num_samples - 3
    lost = {source_id for sample in outcome.excluded for source_id in sample.source_ids}
    for sample in cache:
        assert sample.source_id not in lost
        check_rows(sample.topk, expected(model, sample.input_ids, sample.target_positions), sample.labels)
    assert verify_cache(settings.cache, deep=True).is_intact
    assert worker(settings).score(task).excluded == outcome.excluded


def test_a_shard_is_committed_while_the_next_one_is_scored(settings, monkeypatch):
    """The store holds the first commit until the next shard has been scored."""
    plan = planned(settings)
    scorer = worker(settings)
    first, second = remaining_tasks(open_store(settings.cache), plan)[:2]
    scored = threading.Event()
    monkeypatch.setattr(
        scorer._store, "create", lambda *args: scored.wait(60) and LocalStore.create(scorer._store, *args)
    )
    assert scorer.score(first) is None
    with ThreadPoolExecutor(1) as thread:
        committing = thread.submit(scorer.commit, first.shard)
        assert scorer.score(second) is None
        assert not committing.done()
        scored.set()
        assert committing.result().shard == first.shard
    assert scorer.commit(second.shard).num_rows == plan.shard_num_rows[second.shard]


def test_rows_wait_for_a_store_that_does_not_answer(settings, monkeypatch):
    monkeypatch.setattr("logitcache_pipeline.worker.STORE_SECONDS", 0.0)
    plan = planned(settings)
    scorer = worker(settings)
    task = remaining_tasks(open_store(settings.cache), plan)[0]
    assert scorer.score(task) is None
    with monkeypatch.context() as away:
        away.setattr(scorer._store, "put", lambda path, data: (_ for _ in ()).throw(StoreUnavailableError("away")))
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="away"):
                scorer.commit(task.shard)
    assert scorer.commit(task.shard).num_rows == plan.shard_num_rows[task.shard]


def test_a_worker_that_is_told_to_stop_ends_what_it_has_begun_to_write(settings):
    plan = planned(settings)
    scorer = worker(settings)
    first, second = remaining_tasks(open_store(settings.cache), plan)[:2]
    assert scorer.score(first) is None
    scorer.stop()
    with pytest.raises(WorkerStoppingError, match="told to stop"):
        scorer.score(second)
    assert scorer.commit(first.shard).scored
    assert list(Cache.open(settings.cache).shards) == [first.shard]


def test_another_checkpoint_at_a_node_is_refused_by_name(settings, tmp_path):
    planned(settings)
    other = write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"another weights than the cache's teacher.* every node the same"):
        worker(settings, other).start()


def test_another_config_at_a_node_is_refused_by_name(settings, tmp_path):
    planned(settings)
    other = write_teacher(tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    with pytest.raises(MismatchError, match="another config than"):
        worker(settings, other).start()


def test_a_config_that_lies_about_the_vocabulary_is_refused(settings):
    identity = prepare(settings).identity("float32")
    store = open_store(settings.cache)
    create_or_continue(store, replace(identity, vocab_size=VOCAB_SIZE + 1))
    write_plan(store, prepare(settings))
    with pytest.raises(MismatchError, match=f"head has {VOCAB_SIZE} rows, .* {VOCAB_SIZE + 1}"):
        worker(settings).start()


def test_an_engine_that_takes_less_than_the_longest_sample_is_refused_before_it_scores(settings, monkeypatch):
    planned(settings)
    monkeypatch.setattr(TransformersTeacher, "max_length", MAX_LENGTH - 1)
    with pytest.raises(InputError, match=rf"has {MAX_LENGTH} tokens, .* takes 255 in the engine .*--max-length 255"):
        worker(settings).start()


def test_a_node_that_does_not_see_the_cache_says_so(settings):
    with pytest.raises(CacheNotFoundError, match=r"does not see the cache at .*; put it where every node"):
        worker(settings).start()


def test_an_unknown_teacher_is_named(settings, tmp_path):
    planned(settings)
    with pytest.raises(InputError, match="empty"):
        worker(settings, tmp_path / "empty").start()
