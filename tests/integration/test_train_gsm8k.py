"""From the GSM8K file to a trained student, by the commands that a user types."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache_pipeline.testing import write_teacher
from logitcache_storage import Cache

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k-1000.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is absent; the data is not part of this repository"),
]

NUM_RECORDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of GSM8K, a teacher, a student with the same tokenizer, and the cache."""
    folder = tmp_path_factory.mktemp("gsm8k")
    lines = GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:NUM_RECORDS]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    write_teacher(folder / "teacher")
    write_teacher(folder / "base", seed=1)
    build = ["build", "--teacher", "teacher", "--data", "train.jsonl", "--cache", "cache", "--k", "8"]
    logitcache(folder, *build, "--format", "arrow")
    return folder


def logitcache(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "logitcache_storage.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize("objective", ["target_sft", "kd"])
def test_a_student_learns_from_the_cache_and_is_an_ordinary_checkpoint(folder, objective):
    words = ["--student", "base", "--cache", "cache", "--objective", objective, "--output", objective]
    words += ["--max_steps", "30", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--logging_steps", "1"]
    logitcache(folder, "train", *words)
    state = json.loads((folder / objective / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 30 and all(map(math.isfinite, losses))

    before, after = (divergence(folder, name) for name in ("base", objective))
    assert after < 0.9 * before
    assert AutoTokenizer.from_pretrained(folder / objective).eos_token == "<eos>"


def divergence(folder: Path, model_name: str) -> float:
    """Mean KL(teacher, model) over the targets of some samples, full vocabulary, in float64; no cached value used."""
    models = [AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float64) for n in ("teacher", model_name)]
    cache = Cache.open(str(folder / "cache"))
    sums, count = 0.0, 0
    for ids, positions in cache.read_tokens(range(0, len(cache), 9)):
        rows = torch.from_numpy(positions.astype(np.int64) - 1)
        with torch.inference_mode():
            teacher, student = (
                m(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, rows].log_softmax(-1) for m in models
            )
        sums += float((teacher.exp() * (teacher - student)).sum())
        count += len(rows)
    return sums / count


def test_a_student_can_be_evaluated_with_the_corpus_file(folder):
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    short = [line for line in lines if len(json.loads(line)["question"].encode()) < 200][:3]
    (folder / "short.jsonl").write_text("".join(short), encoding="utf-8")
    words = ["evaluate", "--model", "base", "--data", "short.jsonl", "--samples", "2", "--max-new-tokens", "8"]
    report = json.loads(logitcache(folder, *words, "--json").stdout)
    assert report["num_problems"] == 3 and report["num_samples"] == 2
    # Random weights that know no arithmetic; right answers would mean that the reference leaks into the prompt.
    assert report["average"] == report["greedy"] == 0.0


def test_a_problem_without_room_for_a_response_is_named(folder):
    error = logitcache(folder, "evaluate", "--model", "base", "--data", "train.jsonl", status=2).stderr
    assert "the prompt of problem 3 has 261 tokens" in error


def test_a_student_with_another_tokenizer_is_refused(folder):
    shutil.copytree(folder / "base", folder / "other", dirs_exist_ok=True)
    path = folder / "other" / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'"Ġ": (\d+)', r'"ĠĠ": \1', text), encoding="utf-8")
    words = ["--student", "other", "--cache", "cache", "--objective", "sft", "--output", "refused"]
    error = logitcache(folder, "train", *words, status=2).stderr
    assert "tokenizer" in error and "vocabulary" in error
    assert not (folder / "refused").exists()
