"""What a build's settings ask of the engine and of the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from logitcache_pipeline.settings import BuildSettings
from logitcache_storage.errors import InputError


def settings(**changes: Any) -> BuildSettings:
    return BuildSettings("teacher", ("data",), "cache", **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"compile": True, "tokens_per_batch": 64}, {"compile": True, "tokens_per_batch": 64}),
        ({"engine": "vllm", "k": 128}, {"tensor_parallel": 1, "nodes_per_worker": 1}),
        (
            {"engine": "vllm", "tensor_parallel": 4, "nodes_per_worker": 2, "engine_options": {"max_model_len": 4096}},
            {"tensor_parallel": 4, "nodes_per_worker": 2, "max_model_len": 4096},
        ),
        ({"revision": "v2", "trust_remote_code": True}, {"revision": "v2", "trust_remote_code": True}),
    ],
)
def test_what_the_engine_is_told(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert settings(**changes).teacher_options == {"revision": None, "trust_remote_code": False} | expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"gpus_per_worker": 0.5}, 0.5),
        ({"engine": "vllm", "tensor_parallel": 4}, 4.0),
        ({"engine": "vllm", "tensor_parallel": 4, "gpus_per_worker": 4.0}, 4.0),
        ({"engine": "vllm", "tensor_parallel": 2, "gpus_per_worker": 0.0}, 0.0),
    ],
)
def test_one_worker_has_all_gpus_of_its_model(changes: dict[str, Any], expected: float | None) -> None:
    assert settings(**changes).devices_per_worker == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 2}, r"the engine transformers runs on one device, got tensor_parallel 2; .* vllm"),
        ({"engine": "vllm", "tensor_parallel": 4, "gpus_per_worker": 2.0}, r"gpus_per_worker is 2, .* needs 4 GPUs"),
        ({"nodes_per_worker": 2}, "nodes_per_worker is 2, which does not divide tensor_parallel 1"),
        (
            {"engine": "vllm", "tensor_parallel": 4, "nodes_per_worker": 3},
            "nodes_per_worker is 3, which does not divide tensor_parallel 4; let each node hold",
        ),
        (
            {"engine": "vllm", "tensor_parallel": 2, "nodes_per_worker": 2, "gpus_per_worker": 0.0},
            "gpus_per_worker is 0, and nodes_per_worker 2: only GPUs",
        ),
        (
            {"engine": "vllm", "engine_options": {"pipeline_parallel_size": 2}},
            "no model is run in stages here; .*--nodes-per-worker M",
        ),
        ({"engine": "vllm", "compile": True}, "vllm compiles by itself; leave compile out"),
        ({"gpus_per_worker": float("nan")}, "gpus_per_worker must be at least 0, got nan"),
        ({"overlong": "ignore"}, "unknown overlong 'ignore'; choose from truncate, skip, refuse"),
        ({"start_deadline": 0.0}, r"start_deadline must be above 0 seconds, got 0\.0"),
        ({"engine_options": {"revision": "v2"}}, "engine_options has 'revision', .* give it with --revision"),
        ({"k": 0}, "k must be at least 1, got 0; .*--role reference"),
        ({"k": -1, "role": "reference"}, "k must be at least 1, got -1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_a_reference_may_keep_labels_alone() -> None:
    assert settings(k=0, role="reference").k == 0
