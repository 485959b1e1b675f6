"""From corpus and teacher to identity and plan: what is refused before a model is loaded, what the plan reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from logitcache_pipeline.prepare import plan_summary, prepare, write_plan
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import MAX_LENGTH, VOCAB_SIZE, write_teacher
from logitcache_storage import Cache
from logitcache_storage.commit import create_or_continue
from logitcache_storage.errors import CorpusError, InputError
from logitcache_storage.objects import open_store


@pytest.fixture
def settings(teacher: Path, corpus: Path, tmp_path: Path) -> BuildSettings:
    return BuildSettings(str(teacher), (str(corpus),), str(tmp_path / "cache"), k=9, shard_rows=24)


def test_the_report_counts_what_is_no_sample(settings):
    report = plan_summary(prepare(settings)).report
    counts = {"records": 16, "samples": 14, "duplicates": 1, "empty": 1, "without_targets": 1, "truncated": 1}
    assert {name: report[name] for name in counts} == counts
    assert report["examples"]["duplicates"] == ["train.jsonl:12"]
    assert report["examples"]["empty"] == ["train.jsonl:13"]
    assert report["examples"]["without_targets"] == ["train.jsonl:14"]
    assert report["examples"]["truncated"] == ["train.jsonl:15"]


def test_the_identity_holds_what_was_asked_for(settings):
    identity = prepare(settings).identity("bfloat16")
    assert (identity.vocab_size, identity.k, identity.shard_rows) == (VOCAB_SIZE, 9, 24)
    assert (identity.teacher.dtype, identity.teacher.engine) == ("bfloat16", "transformers")
    assert identity.corpus.num_records == 16
    assert identity.corpus.settings["max_length"] == MAX_LENGTH


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, MAX_LENGTH), ({"max_model_len": 100}, 100), ({"route": "prompt_logprobs"}, MAX_LENGTH - 1)],
)
def test_samples_are_cut_to_what_vllm_takes(settings, options, expected):
    prepared = prepare(replace(settings, engine="vllm", engine_options=options))
    assert prepared.corpus_identity.settings["max_length"] == expected
    assert plan_summary(prepared).report["tokens_per_sample"]["max"] == expected


def test_the_written_plan_is_the_planned_one_and_the_same_on_two_runs(settings, tmp_path):
    prepared, stores = prepare(settings), [open_store(str(tmp_path / name)) for name in ("one", "two")]
    plans = []
    for store in stores:
        create_or_continue(store, prepared.identity("float32"))
        plans.append(write_plan(store, prepare(settings)))
    summary = plan_summary(prepared)
    for plan in plans:
        assert plan.shard_num_rows == summary.shard_num_rows
        assert plan.report == summary.report
    pairs = [(one.object, two.object) for one, two in zip(plans[0].parts, plans[1].parts, strict=True)] + [
        (plans[0].vocabulary, plans[1].vocabulary)
    ]
    for one, two in pairs:
        assert one.path != two.path
        assert stores[0].get(one.path) == stores[1].get(two.path)


def test_the_cache_brings_its_own_vocabulary(settings, teacher):
    store, prepared = open_store(settings.cache), prepare(settings)
    create_or_continue(store, prepared.identity("float32"))
    write_plan(store, prepared)
    ids = AutoTokenizer.from_pretrained(teacher)("12 é?")["input_ids"]
    assert Cache.open(settings.cache).vocabulary.decode(ids) == "12 é?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": VOCAB_SIZE + 1}, rf"k must be at most the teacher's vocabulary size {VOCAB_SIZE}, got 272"),
        ({"max_length": MAX_LENGTH + 1}, f"max_length 257 is above the {MAX_LENGTH} tokens the teacher takes"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 0}, "max_length must be at least 2"),
        ({"prompt_field": "question"}, "prompt_field and response_field go together"),
        ({"data": ("missing.jsonl",)}, "missing.jsonl: no such file or folder"),
        ({"revision": "main"}, "revision is for a hub id, and the teacher .* is a folder; leave it out"),
        ({"teacher": "./missing"}, "the teacher './missing': neither a folder nor a model that the hub gives"),
    ],
)
def test_what_is_refused_before_the_corpus_is_read(settings, change, message):
    with pytest.raises(InputError, match=message):
        prepare(replace(settings, **change))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{}", "cannot load its config: Unrecognized model"),
        ("tokenizer.json", "{", "cannot load its tokenizer: "),
    ],
)
def test_a_damaged_teacher_is_named_in_a_line(settings, tmp_path, file, content, message):
    teacher = write_teacher(tmp_path / "teacher")
    (teacher / file).write_text(content)
    with pytest.raises(InputError, match=f"^the teacher '{teacher}': {message}") as caught:
        prepare(replace(settings, teacher=str(teacher)))
    assert "\n" not in str(caught.value)


def test_a_teacher_of_no_language_is_named(settings, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="is a vit, which has no vocabulary; expected a causal language model"):
        prepare(replace(settings, teacher=str(tmp_path)))


def test_a_teacher_without_weights_is_refused(settings, tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        prepare(replace(settings, teacher=str(teacher))).identity("float32")


def test_a_token_id_outside_the_vocabulary_is_named(settings, tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(20)])
    tokenizer.save_pretrained(teacher)
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(
        json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps({"prompt": "a", "response": "<extra 19>"})
    )
    prepared = prepare(replace(settings, teacher=str(teacher), data=(str(corpus),)))
    with pytest.raises(CorpusError, match=rf"c.jsonl:2: token id 276, the teacher's vocabulary is 0..{VOCAB_SIZE - 1}"):
        plan_summary(prepared)
