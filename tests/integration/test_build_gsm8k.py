"""From the GSM8K file to a verified cache, by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcache_pipeline.testing import write_teacher
from logitcache_storage import Cache

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k-1000.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is absent; the data is not part of this repository"),
]

PRECISION_NATS = 0.13
"""Half of the coarsest step of the u8 encoding (0.25 nats), and float32 rounding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and the cache of what it thought of GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    write_teacher(folder / "teacher", max_length=2048)
    logitcache(folder, "build", "--teacher", "teacher", "--data", str(GSM8K), "--cache", "cache", "--k", "16")
    return folder


def logitcache(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "logitcache_storage.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cache_is_complete_and_intact(folder):
    report = json.loads(logitcache(folder, "verify", "cache", "--deep", "--json"))
    assert report["intact"]
    assert report["committed_shards"] == report["planned_shards"] > 1
    assert report["quarantine"] == []


def test_the_targets_are_the_answers(folder):
    records = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    cache = Cache.open(str(folder / "cache"))
    assert cache.plan.report["samples"] == len(cache) == len(records)
    for index, record in enumerate(records):
        ids, positions = cache.read_tokens([index])[0]
        assert cache.vocabulary.decode(ids) == f"{record['question']}\n{record['answer']}<eos>"
        assert cache.vocabulary.decode(ids[positions]) == f"{record['answer']}<eos>"


def test_rows_are_what_the_teacher_says(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    cache = Cache.open(str(folder / "cache"))
    for sample in cache.read(np.linspace(0, len(cache) - 1, 7, dtype=int).tolist()):
        with torch.inference_mode():
            logits = model(torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0]
        log_probs = logits.double().log_softmax(-1).numpy()[sample.target_positions - 1]
        found = np.take_along_axis(log_probs, sample.topk.ids, axis=1)
        np.testing.assert_allclose(sample.topk.log_probs, found, atol=PRECISION_NATS)
        labels = log_probs[np.arange(len(log_probs)), sample.labels]
        np.testing.assert_allclose(sample.topk.label_log_prob, labels, atol=PRECISION_NATS)
