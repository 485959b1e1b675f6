"""The two routes of the engine vllm against each other: throughput, and what they cost the host besides the model.

Model: a Qwen2 of random weights, D = 512, 4 layers, V = 65,536, float32; 24 sequences of 256 random tokens, of which
either all or the last three fifths are targets; k = 64.

    pooling          the model as a pooling model, which reduces the rows of targets where it runs
    prompt_logprobs  vLLM's own top-k of every prompt token, in its flat form

Each route is an engine in a process of its own, in vLLM's environment, on one thread; they are timed in turn. Ratios
are medians of those within a round. `host_us_per_token` is CPU time of the calling thread outside of the model's steps,
per token of a sequence: what one process in front of a GPU has to do. Everything from the requests to `TopKLogProbs` is
in both numbers. The answers of the two are compared.

    python tests/benchmarks/bench_vllm.py
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ROUTES = ("pooling", "prompt_logprobs")
TARGETS = {"all": 0, "three_fifths": 102}
"""Where the targets begin, in each sequence."""
V, K, T, NUM_SEQUENCES, ROUNDS = 65536, 64, 256, 24, 3


def run() -> dict[str, Any]:
    """Rates of both routes, their ratios, and how far their answers differ."""
    if not VLLM_PYTHON.exists():
        return {"skipped": "no vLLM here: make test-vllm sets its environment up"}
    with tempfile.TemporaryDirectory() as folder:
        engines = {route: _Engine(route, folder) for route in ROUTES}
        try:
            for name in TARGETS:  # a first round that is not counted
                answers = {route: engine.ask(name)["answers"] for route, engine in engines.items()}
            rounds = [{(name, r): engines[r].ask(name) for name in TARGETS for r in ROUTES} for _ in range(ROUNDS)]
        finally:
            for engine in engines.values():
                engine.close()
    shape = f"Qwen2, D=512, 4 layers, V={V}, T={T}"
    found = {name: _summary(name, rounds) for name in TARGETS}
    return {"shape": shape, "k": K, "dtype": "float32", "threads": 1, "targets": found, **_differences(answers)}


class _Engine:
    """A route in a process of its own, which answers one line with one line."""

    def __init__(self, route: str, folder: str) -> None:
        words = [str(VLLM_PYTHON), __file__, route, folder]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
        )
        assert self._read() == {"ready": True}

    def ask(self, targets: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{targets}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # what is no JSON object is vLLM's
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the engine has ended with status {self._process.wait()}")


def _summary(name: str, rounds: list[dict[tuple[str, str], dict[str, Any]]]) -> dict[str, Any]:
    num_tokens = NUM_SEQUENCES * T

    def median(route: str, what: str) -> float:
        return statistics.median(found[name, route][what] for found in rounds)

    def ratio(what: str) -> float:
        return statistics.median(found[name, ROUTES[1]][what] / found[name, ROUTES[0]][what] for found in rounds)

    return {
        "tokens_per_second": {route: num_tokens / median(route, "seconds") for route in ROUTES},
        "host_us_per_token": {route: 1e6 * median(route, "host_seconds") / num_tokens for route in ROUTES},
        "pooling_over_prompt_logprobs": ratio("seconds"),
        "host_cpu_prompt_logprobs_over_pooling": ratio("host_seconds"),
    }


def _differences(answers: dict[str, Any]) -> dict[str, Any]:
    pooling, flat = (np.array(answers[route]["log_probs"]) for route in ROUTES)
    labels = [np.array(answers[route]["label_log_prob"]) for route in ROUTES]
    found = {"log_probs": float(np.abs(pooling - flat).max()), "label": float(np.abs(labels[0] - labels[1]).max())}
    return {"max_abs_difference": found}


def _serve(route: str, folder: str) -> None:
    """The engine's side."""
    from logitcache_pipeline.engines.base import ScoringRequest
    from logitcache_pipeline.engines.vllm import VllmTeacher

    _save_model(folder)
    teacher = VllmTeacher.load(folder, dtype="float32", route=route, enforce_eager=True, max_model_len=T + 1)
    model = _Clock(teacher._engine.llm_engine.engine_core.engine_core.model_executor)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(V, size=T).astype(np.int32) for _ in range(NUM_SEQUENCES)]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        positions = np.arange(max(1, TARGETS[line.strip()]), T, dtype=np.int32)
        requests = [ScoringRequest(ids, positions) for ids in sequences]
        model.seconds = 0.0
        start = time.perf_counter(), time.thread_time()
        rows = teacher.score(requests, K)
        seconds, cpu = time.perf_counter() - start[0], time.thread_time() - start[1]
        sample = {name: getattr(rows[0], name).tolist() for name in ("log_probs", "label_log_prob")}
        print(json.dumps({"seconds": seconds, "host_seconds": cpu - model.seconds, "answers": sample}), flush=True)


class _Clock:
    """CPU time of this thread within the model's steps."""

    def __init__(self, executor: Any) -> None:
        self.seconds = 0.0
        for name in ("execute_model", "sample_tokens"):
            setattr(executor, name, self._timed(getattr(executor, name)))

    def _timed(self, step: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return step(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return timed


def _save_model(folder: str) -> None:
    from random_models import Shape, random_qwen2
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    if (Path(folder) / "config.json").exists():
        return
    random_qwen2(Shape(V, 512, 1408, 4)).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _serve(sys.argv[1], sys.argv[2])
    else:
        print(json.dumps(run(), indent=1))
