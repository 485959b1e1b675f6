"""A teacher whose code lies beside its weights: nothing of it runs unless asked for, then wherever it is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from logitcache_pipeline.build import build
from logitcache_pipeline.engines.base import ScoringRequest, load_teacher
from logitcache_pipeline.rescore import rescore_samples
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.testing import write_teacher
from logitcache_storage import Cache
from logitcache_storage.errors import InputError, MismatchError

pytestmark = pytest.mark.timeout(120)

CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

with Path({log!r}).open("a") as log:
    log.write(f"{{os.getpid()}}\\n")


class HouseConfig(LlamaConfig):
    model_type = "of_the_house"


class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig
"""


@pytest.fixture
def house(settings: BuildSettings, tmp_path: Path) -> BuildSettings:
    """A build with a teacher of an architecture that only its own code knows; `ran` has the processes that ran that."""
    folder = write_teacher(tmp_path / "house")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}
    own = {"model_type": "of_the_house", "architectures": ["HouseForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "house.py").write_text(CODE.format(log=str(tmp_path / "ran")))
    return replace(settings, teacher=str(folder))


def test_code_of_the_teacher_runs_only_where_it_is_asked_for(house, teacher, tmp_path):
    with pytest.raises(InputError, match=r"house' comes with code of its own, .* with --trust-remote-code") as caught:
        build(house)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()

    trusting = replace(house, trust_remote_code=True)
    build(replace(trusting, dry_run=True), say=lambda line: None)
    build(trusting, say=lambda line: None)
    assert len(set((tmp_path / "ran").read_text().split())) >= 2  # here, and in a worker
    cache = Cache.open(house.cache)
    plain = load_teacher("transformers", str(teacher), "float32", "cpu")  # the same weights
    for sample in cache:
        (expected,) = plain.score([ScoringRequest(sample.input_ids, sample.target_positions)], 9)
        assert abs(sample.topk.label_log_prob - expected.label_log_prob).max() < 2e-5

    assert rescore_samples(cache, 3, engine_options={"trust_remote_code": True}).agrees
    with pytest.raises(MismatchError, match=r"teacher\.config"):
        rescore_samples(cache, 3)
    with (Path(house.teacher) / "house.py").open("a") as code:
        code.write("# another version\n")
    with pytest.raises(MismatchError, match=r"teacher\.config"):
        build(trusting)
