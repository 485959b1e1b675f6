"""Whole runs with several caches, samples missing, rows of one's own, and what is logged where."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import WandbCallback

from logitcache_storage import Cache, TopKLogProbs
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.testing import write_cache

ONE_STEP = {"objective": "kd", "batch_tokens": 10**6, "max_steps": 1, "learning_rate": 0}
"""All samples in one step that changes nothing: the loss does not depend on their order."""


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


def record_of(folder):
    return json.loads((folder / "logitcache.json").read_text())


@pytest.fixture(scope="module")
def second(made, other_teacher, tmp_path_factory):
    """The same samples by another teacher, in another order and other shards."""
    return other_teacher(tmp_path_factory.mktemp("run") / "second")


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_mixture_with_all_weight_on_one_teacher_is_that_teacher(run, plain, second, tmp_path, mean):
    caches = [f"teacher={plain.cache}", f"teacher={second}"]

    def loss(name, **options):
        return losses(run(plain, tmp_path / name, **{**ONE_STEP, **options}))[0]

    first_alone, second_alone = loss("a"), loss("b", cache=second)
    assert abs(first_alone - second_alone) > 1e-2
    for weights, expected in (("1,0", first_alone), ("0,2.5", second_alone)):
        found = loss(weights, cache=caches, mix=mean, mix_weights=weights)
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_mixture_is_trained_on_recorded_and_resumed(run, made, second, tmp_path):
    options = {"cache": [f"teacher={made.cache}", f"teacher={second}"], "mix_weights": "3,1", "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = run(made, tmp_path / "whole", **options)
    checkpoint = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
    assert losses(run(made, tmp_path / "again", **options, **checkpoint)) == losses(whole)
    record = record_of(tmp_path / "whole" / "checkpoint-2")
    assert record["mixing"] == {"mean": "arithmetic", "weights": [0.75, 0.25]}
    assert [cache["url"] for cache in record["caches"]["teacher"]] == [made.cache, second]
    with pytest.raises(MismatchError, match=r"mixing: .*\[0.5, 0.5\].*, there .*\[0.75, 0.25\]"):
        run(made, tmp_path / "other", **{**options, "mix_weights": "1,1"}, **checkpoint)
    with pytest.raises(MismatchError, match=r"another run \(mixing: None, there .*; samples: "):
        run(made, tmp_path / "other", **{**options, "cache": made.cache, "mix_weights": None}, **checkpoint)


def test_samples_that_a_cache_lacks_are_refused_or_left_out_and_counted(run, made, other_teacher, tmp_path, capfd):
    partial, smaller = (other_teacher(tmp_path / f"partial-{keep}", keep=keep) for keep in (50, 49))
    options = {"cache": [f"teacher={made.cache}", f"teacher={partial}"], "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(MismatchError, match=r"lacks 10 of the 60 samples of .*--missing drop"):
        run(made, tmp_path / "refused", **options)
    options |= {"missing": "drop", "max_steps": 3}
    whole = run(made, tmp_path / "whole", **options)
    assert f"10 of 60 samples are left out: {partial} lacks 10" in capfd.readouterr().err
    record = record_of(tmp_path / "whole")
    assert (record["missing"], record["num_samples"]) == ("drop", 50)
    checkpoint = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
    assert losses(run(made, tmp_path / "again", **options, **checkpoint)) == losses(whole)
    options["cache"] = [f"teacher={made.cache}", f"teacher={smaller}"]
    with pytest.raises(MismatchError, match=r"\(samples: 49 \(fingerprint \w{12}\), there 50 \(fi.*--allow_partial"):
        run(made, tmp_path / "other", **options, **checkpoint)


def test_a_row_of_ones_own_trains_as_the_row_of_the_table_that_it_repeats(run, made, tmp_path):
    config = tmp_path / "run.yaml"
    row = {"name": "mine", "label": "p_label", "guided": "1 - p_label", "role": "teacher", "parameters": {"eta": 0.5}}
    config.write_text(json.dumps({"objective": row}))
    mine = run(made, tmp_path / "mine", objective=None, config=config, max_steps=3)
    assert losses(mine) == pytest.approx(losses(run(made, tmp_path / "table", max_steps=3)), abs=1e-6)
    record = record_of(tmp_path / "mine")
    assert record["objective"] == {"name": "mine", "eta": 0.5} and record["objective_row"] == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "column('critical')"}, r"objective 'mine' needs the column 'critical', which .* does not have"),
        (
            {"label": "exp(log_reference_label)"},
            "'mine' needs a reference cache, given: teacher; add --cache reference=",
        ),
        ({"cached": 1, "role": "reference"}, "'mine' needs a reference cache, given: teacher; add --cache reference="),
    ],
)
def test_a_row_of_ones_own_says_what_it_needs(run, made, tmp_path, row, message):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"objective": {"name": "mine", **row}}))
    with pytest.raises(InputError, match=message):
        run(made, tmp_path / "out", objective=None, config=config, cache=f"teacher={made.cache}")


def test_a_local_cache_changes_nothing(run, made, second, held_out, tmp_path):
    options = {"cache": [f"teacher={made.cache}", f"teacher={second}"], "eval_cache": held_out, "max_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    local = {"local_cache": tmp_path / "local", "local_cache_bytes": "5MB"}
    found, expected = (run(made, tmp_path / name, **options, **more) for name, more in (("a", local), ("b", {})))
    assert losses(found) == losses(expected)
    assert [e["eval_kl"] for e in found if "eval_kl" in e] == [e["eval_kl"] for e in expected if "eval_kl" in e]
    assert sum(path.stat().st_size for path in (tmp_path / "local").iterdir()) > 1000
    with pytest.raises(InputError, match=r"the local cache .* may have 1,000 bytes, and a shuffle window"):
        run(made, tmp_path / "c", **options, **{**local, "local_cache_bytes": "1KB"})


def test_a_cache_that_is_not_read_is_said_so(run, made, tmp_path, capfd):
    run(made, tmp_path / "out", objective="dft", max_steps=1)
    assert "objective 'dft' reads no distribution of the teacher cache" in capfd.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_student_is_loaded(run, made, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=rf"--output {file} is a file, expected a folder"):
        run(made, file)
    with pytest.raises(InputError, match=rf"--output {file}/below: {file} is no folder that can be written"):
        run(made, file / "below", student=tmp_path / "nowhere")


def test_tensorboard_gets_what_is_logged(run, made, held_out, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {"report_to": "tensorboard", "eval_cache": held_out, "eval_strategy": "steps", "eval_steps": 2}
    log = run(made, tmp_path / "out", **options, max_steps=2)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    training = ("loss", "p_label", "gamma", "teacher_tail", "target_entropy", "grad_norm", "target_tokens_per_second")
    for name in training:
        found = [event.value for event in events.Scalars(f"train/{name}")]
        assert found == pytest.approx([entry[name] for entry in log if "loss" in entry], rel=1e-6)
    for name in ("loss", "nll", "kl", "top_1_agreement"):
        assert [event.step for event in events.Scalars(f"eval/{name}")] == [2]


def test_wandb_gets_what_is_logged(run, made, tmp_path, monkeypatch):
    """Through transformers' callback; a run of wandb's own, even offline, takes its service ten seconds."""
    pytest.importorskip("wandb")
    logged: dict[str, float] = {}

    def setup(self, *args, **kwargs):
        self._initialized = True
        self._wandb = SimpleNamespace(run=SimpleNamespace(summary={}), log=logged.update)

    monkeypatch.setattr(WandbCallback, "setup", setup)
    log = run(made, tmp_path / "out", report_to="wandb", max_steps=1)
    for name in ("loss", "p_label", "gamma", "teacher_tail", "target_entropy", "grad_norm", "target_tokens_per_second"):
        assert logged[f"train/{name}"] == log[0][name]


@pytest.mark.parametrize("name", ["psft", "iw_sft"])
def test_objectives_that_read_labels_alone_train_from_a_cache_without_ids(run, plain, tmp_path, capfd, name):
    """As from one with ids: the same losses to the last bit, and the same held-out metrics."""
    cache = Cache.open(plain.cache)
    samples = [(sample.input_ids, _ranges(sample.target_positions)) for sample in cache]
    rows = [TopKLogProbs.of_labels(sample.topk.label_log_prob) for sample in cache]
    bare = str(tmp_path / "bare")
    write_cache(bare, samples, rows, identity=replace(plain.identity, role="reference", k=0))
    options = {"objective": name, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    logs = {
        url: run(plain, tmp_path / Path(url).name, **options, cache=f"reference={url}", eval_cache=f"reference={url}")
        for url in (plain.cache, bare)
    }
    assert losses(logs[bare]) == losses(logs[plain.cache]) and len(losses(logs[bare])) == 3
    held_out = [next(entry for entry in log if "eval_loss" in entry) for log in logs.values()]
    assert held_out[0]["eval_loss"] == held_out[1]["eval_loss"]
    said = capfd.readouterr().err
    assert said.count(f"{plain.cache} was built as teacher, and is read as reference here") == 1
    assert f"{bare} was built as" not in said


@pytest.mark.parametrize(("name", "role"), [("kl_sft", "reference"), ("target_sft", "teacher"), ("kd", "teacher")])
def test_objectives_that_train_towards_a_distribution_refuse_a_cache_without_ids(run, plain, tmp_path, name, role):
    cache = Cache.open(plain.cache)
    sample = cache[0]
    bare = str(tmp_path / "bare")
    rows = TopKLogProbs.of_labels(sample.topk.label_log_prob)
    tokens = (sample.input_ids, _ranges(sample.target_positions))
    write_cache(bare, [tokens], [rows], identity=replace(plain.identity, role="reference", k=0))
    with pytest.raises(InputError, match=rf"{name!r} trains towards .* {role} cache, .*\(k = 0\); build it with --k"):
        run(plain, tmp_path / "out", objective=name, cache=f"{role}={bare}")


def _ranges(positions):
    """Target ranges of one position each."""
    return np.stack([positions, positions + 1], axis=1).astype(np.int32)
