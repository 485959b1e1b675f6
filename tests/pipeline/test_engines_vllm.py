"""vLLM for real, against the transformers engine; runs in an environment of its own (`make test-vllm`)."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)
# Read when vLLM is imported; its CPU build cannot compile here, and one process is enough for tests.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from logitcache_pipeline.build import build, dry_run
from logitcache_pipeline.engines.base import ScoringRequest, load_teacher
from logitcache_pipeline.engines.transformers import TransformersTeacher
from logitcache_pipeline.engines.vllm import VllmTeacher
from logitcache_pipeline.rescore import rescore_samples
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import write_teacher
from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError

V, K, MAX_LENGTH = 1003, 17, 256
SIZES = {
    "vocab_size": V,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED, head_dim=32),
    "phi": lambda: PhiConfig(**SIZES),
}
TOLERANCE = 3e-5
"""Nats, in float32: what two implementations of the same forward pass differ by."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with random weights, large enough that the distributions are far from uniform."""
    made = {}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
            made[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(made[name])
            PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(made[name])
        return made[name]

    return make


def start(path, **options):
    return load_teacher("vllm", path, "float32", enforce_eager=True, **options)


def make_requests(lengths=(2, 5, 33, 200, 80, MAX_LENGTH - 1), seed=0):
    rng = np.random.default_rng(seed)
    requests = []
    for length in lengths:
        ids = rng.integers(V, size=length).astype(np.int32)
        positions = rng.choice(np.arange(1, length), size=max(1, length // 2), replace=False)
        # In the order of the corpus, but for one: answers follow the request, whatever its order.
        requests.append(ScoringRequest(ids, (positions if length == 33 else np.sort(positions)).astype(np.int32)))
    return requests


def by_transformers(path, requests):
    """To be called before vLLM starts: it may change classes of transformers in its process."""
    return TransformersTeacher.load(path, dtype="float32").score(requests, K)


def check_equal(found, expected, *, tolerance=TOLERANCE, tail=TOLERANCE):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids.dtype == np.int32 and ours.k == K and len(ours) == len(theirs)
        assert np.abs(ours.log_probs - theirs.log_probs).max() <= tolerance
        assert np.abs(ours.label_log_prob - theirs.label_log_prob).max() <= tolerance
        assert np.abs(ours.log_tail - theirs.log_tail).max() <= tail
        for row in range(len(ours)):
            # Where the sets differ, the tokens in question must be tied at the border.
            differ = set(ours.ids[row].tolist()) ^ set(theirs.ids[row].tolist())
            assert not differ or abs(theirs.log_probs[row, -1] - ours.log_probs[row, -1]) <= tolerance
        assert np.mean((ours.ids == theirs.ids).all(1)) > 0.9


def check_labels(found, expected):
    """Answers without ids (k = 0)."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids.shape == (len(theirs), 0) and not ours.num_kept.any() and not ours.log_tail.any()
        assert np.abs(ours.label_log_prob - theirs.label_log_prob).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_pooling_route_agrees_with_transformers(checkpoint, name):
    path, requests = checkpoint(name), make_requests()
    expected = by_transformers(path, requests)
    teacher = start(path)
    assert teacher.route == "pooling"
    assert (teacher.vocab_size, teacher.max_length) == (V, MAX_LENGTH)
    assert (teacher.identity.engine, teacher.identity.dtype) == ("vllm", "float32")
    check_equal(teacher.score(requests, K), expected)
    del teacher
    gc.collect()


def test_prompts_longer_than_a_step_come_in_several(checkpoint):
    path, requests = checkpoint("llama"), make_requests()
    expected = by_transformers(path, requests)
    teacher = start(path, tokens_per_batch=48, max_num_seqs=4)
    check_equal(teacher.score(requests, K), expected)
    # The engine may be asked again, for another k.
    assert [len(answer) for answer in teacher.score(requests[:2], 1)] == [1, 2]
    check_labels(teacher.score(requests, 0), expected)


def test_two_ranks_agree_with_transformers(checkpoint):
    path, requests = checkpoint("qwen3"), make_requests()
    expected = by_transformers(path, requests)
    teacher = start(path, tensor_parallel=2)
    check_equal(teacher.score(requests, K), expected)
    check_labels(teacher.score(requests, 0), expected)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_prompt_logprobs_agree_with_transformers(checkpoint, name):
    """`phi` is no architecture of the pooling route and gets this one by itself; its tail is a difference from one."""
    path, requests = checkpoint(name), make_requests()
    expected = by_transformers(path, requests)
    teacher = start(path, route=None if name == "phi" else "prompt_logprobs")
    assert teacher.route == "prompt_logprobs"
    answers = teacher.score(requests, K)
    smallest = min(float(answer.log_tail.min()) for answer in answers)
    rounding = K * 2**-24 / math.exp(smallest)
    check_equal(answers, expected, tail=TOLERANCE + rounding)
    check_labels(teacher.score(requests, 0), expected)
    assert teacher.score(requests[:1], 100)[0].ids.shape[1] == 100  # vLLM's own default is at most 20
    with pytest.raises(InputError, match=f"request 0 has {MAX_LENGTH} tokens, the teacher takes {MAX_LENGTH - 1}"):
        teacher.score(make_requests((MAX_LENGTH,)), K)


def test_a_build_gives_the_cache_that_transformers_gives(tmp_path):
    """vLLM with two ranks beneath one Ray actor."""
    teacher = write_teacher(tmp_path / "teacher", head_dim=32)
    data = tmp_path / "data.jsonl"
    records = [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}." * (1 + i % 5)} for i in range(20)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    two_ranks = {"tensor_parallel": 2, "gpus_per_worker": 0.0, "engine_options": {"enforce_eager": True}}
    caches, said = {}, []
    for engine in ("transformers", "vllm"):
        settings = BuildSettings(
            str(teacher),
            (str(data),),
            str(tmp_path / engine),
            engine=engine,
            precision="fp32",
            k=K,
            role="reference",
            **(two_ranks if engine == "vllm" else {}),
        )
        build(settings, say=said.append)
        caches[engine] = Cache.open(settings.cache)
    ours, theirs = caches["vllm"], caches["transformers"]
    assert ours.is_complete and len(ours) == len(theirs) == 20
    assert ours.identity.differences(theirs.identity) == ["teacher.engine: 'vllm', 'transformers'"]
    assert ours.identity.role == "reference"
    assert "vLLM scores LlamaForCausalLM by the route pooling" in said
    # This teacher's weights are five times as wide, and so are its logits and what rounding makes of them.
    check_equal(
        [sample.topk for sample in ours],
        [sample.topk for sample in theirs],
        tolerance=5 * TOLERANCE,
        tail=5 * TOLERANCE,
    )
    report = rescore_samples(ours, 3, engine_options={"enforce_eager": True})
    assert report.agrees and report.label.largest <= 5 * TOLERANCE


RAY_ON_CPUS = {
    "ray_on_cpus.py": """
from vllm.platforms.cpu import CpuPlatform

class RayOnCpus(CpuPlatform):
    ray_device_key = "GPU"

def platform():
    return "ray_on_cpus.RayOnCpus"
""",
    "ray_on_cpus-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: ray-on-cpus\nVersion: 1\n",
    "ray_on_cpus-1.dist-info/entry_points.txt": "[vllm.platform_plugins]\nray_on_cpus = ray_on_cpus:platform\n",
}
"""A package that vLLM takes its platform from: its own for CPUs does not say what Ray calls its devices."""


@pytest.fixture
def three_nodes(tmp_path, monkeypatch):
    """A Ray cluster of three nodes with a GPU each, as Ray believes."""
    from ray.cluster_utils import Cluster

    for name, text in RAY_ON_CPUS.items():
        file = tmp_path / "plugin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugin"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1, num_gpus=1)
    yield cluster
    cluster.shutdown()


def lose_a_rank(cluster, cache, lost):
    """As soon as shards are committed, take the node away where a rank runs and the worker does not."""
    import ray

    while len(list((cache / "commits").glob("*"))) < 3:
        time.sleep(0.05)
    (group,) = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    actor_node, rank_node = (group["bundles_to_node_id"][i] for i in range(2))
    lost += [actor_node, rank_node]
    cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == rank_node), allow_graceful=False)


@pytest.mark.timeout(600)
def test_one_teacher_over_two_nodes_gives_the_same_cache_though_one_is_lost(tmp_path, three_nodes):
    teacher = write_teacher(tmp_path / "teacher", head_dim=32)
    data = tmp_path / "data.jsonl"
    records = [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}." * (1 + i % 5)} for i in range(100)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = BuildSettings(
        str(teacher),
        (str(data),),
        str(tmp_path / "cache"),
        engine="vllm",
        dtype="float32",
        precision="fp32",
        k=K,
        shard_rows=24,
        tensor_parallel=2,
        nodes_per_worker=2,
        engine_options={"enforce_eager": True},
        ray_address=three_nodes.address,
    )
    found = dry_run(replace(settings, dry_run=True, calibrate=0.5, price_per_gpu_hour=3.0))
    assert found["rate"]["device"] == "2 GPUs of 2 nodes" and found["bytes"]["sampled_target_tokens"] >= 2000
    assert found["run"]["gpu_hours"] == pytest.approx(2 * found["run"]["hours"])
    nodes = []
    thief = threading.Thread(target=lose_a_rank, args=(three_nodes, Path(settings.cache), nodes), daemon=True)
    thief.start()
    build(settings, say=lambda line: None)
    thief.join()
    assert len(set(nodes)) == 2
    (run,) = json.loads((tmp_path / "cache/report.json").read_text())["runs"]
    assert run["workers"][0]["starts"] == 2 and run["failed_attempts"] == 1
    cache = Cache.open(settings.cache)
    assert cache.is_complete and len(cache) == 100
    requests = [ScoringRequest(sample.input_ids, sample.target_positions) for sample in cache]
    expected = TransformersTeacher.load(str(teacher), dtype="float32").score(requests, K)
    check_equal([sample.topk for sample in cache], expected, tolerance=5 * TOLERANCE, tail=5 * TOLERANCE)


def test_a_dry_run_asks_the_engine_in_this_process(tmp_path):
    data = tmp_path / "data.jsonl"
    records = [{"prompt": f"{i}?", "response": f"It is {2 * i}." * (1 + i % 5)} for i in range(40)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    teacher = str(write_teacher(tmp_path / "teacher", head_dim=32))
    settings = BuildSettings(
        teacher,
        (str(data),),
        str(tmp_path / "cache"),
        engine="vllm",
        engine_options={"enforce_eager": True},
        k=K,
        dry_run=True,
        sample_rows=400,
    )
    found = dry_run(settings)
    assert found["bytes"]["sampled_target_tokens"] >= 400
    assert found["bytes"]["low"] < found["bytes"]["high"]


def test_what_cannot_be_answered_is_refused_before_it_is_scored(checkpoint):
    teacher = start(checkpoint("llama"))
    request = ScoringRequest(np.array([1, V], np.int32), np.array([1], np.int32))
    with pytest.raises(InputError, match=f"token id {V}"):
        teacher.score([request], K)
    with pytest.raises(InputError, match="k must be between 0"):
        teacher.score(make_requests((5,)), V + 1)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="vLLM cannot run"):
        VllmTeacher.load(str(tmp_path / "none"), dtype="float32")


def test_a_device_is_not_for_vllm_to_choose():
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        VllmTeacher.load("any", device="cuda:1")
