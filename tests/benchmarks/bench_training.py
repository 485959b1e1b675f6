"""Training: the loader's rate, two ranks against one, and resuming.

Whole steps are timed in `bench_objective_steps.py`.

    python tests/benchmarks/bench_training.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from logitcache_storage.cache import Cache
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.collate import collate
from logitcache_train.data import CachedSamples, GlobalBatchSampler
from logitcache_train.demo.models import build_tokenizer
from logitcache_train.objectives import objective

K, NUM_THREADS = 64, 2


def run() -> dict[str, Any]:
    """All measures; the bounds are 1e-5 for the losses, and equal bits for the resumed weights."""
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {"loader_target_rows_per_second": loader_rate(folder), **whole_runs(folder)}


def loader_rate(folder: Path) -> int:
    """Target rows per second of one process from a local Zarr cache to collated tensors, decoding included."""
    num_samples, vocab_size = 1500, 1000
    samples, topks = make_samples(num_samples, K, vocab_size, max_targets=200)
    identity = make_identity(vocab_size=vocab_size, k=K, shard_rows=8192)
    write_cache(str(folder / "large"), samples, topks, identity=identity)
    data = CachedSamples({"teacher": [Cache.open(str(folder / "large"))]}, objective("kd"), window_shards=8)
    sampler = GlobalBatchSampler(
        data, batch_tokens=4096, window_shards=8, seed=0, rank=0, world_size=1, accumulation_steps=1
    )
    start, rows = time.perf_counter(), 0
    for part in sampler:
        micro = data.__getitems__(part)
        rows += len(collate(micro.samples, num_items=micro.num_items, layout="padded")["targets"].labels_N)
    return round(rows / (time.perf_counter() - start))


def whole_runs(folder: Path) -> dict[str, Any]:
    """Losses of two ranks against one, and the weights of a run that was resumed in mid-epoch."""
    _write_student_and_cache(folder)
    one = _train(folder, "one", ranks=1)
    two = _train(folder, "two", ranks=2)
    checkpoint = folder / "one" / "checkpoint-7"
    _train(folder, "resumed", ranks=1, resume_from_checkpoint=checkpoint)
    expected, found = (load_file(folder / name / "model.safetensors") for name in ("one", "resumed"))
    return {
        "two_ranks_max_loss_difference": max(abs(a - b) for a, b in zip(one, two, strict=True)),
        "resumed_weights_equal_bits": all(torch.equal(expected[name], found[name]) for name in expected),
    }


def _write_student_and_cache(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "student")
    identity = make_identity(
        tokenizer=tokenizer_identity(tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template),
        vocab_size=len(tokenizer),
    )
    samples, topks = make_samples(80, identity.k, len(tokenizer))
    write_cache(str(folder / "cache"), samples, topks, identity=identity)


def _train(folder: Path, name: str, *, ranks: int, **changes: object) -> list[float]:
    options = {"student": folder / "student", "cache": folder / "cache", "output": folder / name}
    options |= {"objective": "target_sft", "learning_rate": 1e-3, "batch_tokens": 150, "max_steps": 20}
    options |= {"logging_steps": 1, "save_steps": 7, **changes}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launcher, "-m", "logitcache_train", *words], env=env, check=True, capture_output=True
    )
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
