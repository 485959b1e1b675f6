"""A student that starts before its cache is complete: refused, or trained on what every rank sees, now and resumed."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.testing import make_samples, write_cache


@pytest.fixture
def grow(made, tmp_path):
    """Builds a cache as far as so many shards; returns its URL."""
    samples, topks = make_samples(60, made.identity.k, made.vocab_size, seed=3)
    url = str(tmp_path / "cache")

    def to(num_shards):
        write_cache(url, samples, topks, identity=made.identity, commit_shards=num_shards)
        return url

    return to


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


def test_refused_with_how_far_it_is_and_what_to_do(run, made, grow, tmp_path):
    url = grow(2)
    found = rf"the teacher cache {url} is unfinished: \d+ of 60 samples are there; .*logitcache status.*--allow_partial"
    with pytest.raises(InputError, match=found):
        run(made, tmp_path / "out", cache=url)
    with pytest.raises(InputError, match=found):
        run(made, tmp_path / "out", eval_cache=url, eval_strategy="epoch")
    assert not (tmp_path / "out").exists()


def test_allowed_and_said_to_be(run, made, grow, tmp_path, capfd):
    url = grow(2)
    run(made, tmp_path / "out", cache=url, max_steps=1, allow_partial="true")
    assert "the teacher cache is unfinished:" in capfd.readouterr().err
    record = json.loads((tmp_path / "out" / "logitcache.json").read_text())
    assert record["num_samples"] == len(Cache.open(url)) < 60


def test_a_resumed_run_goes_on_with_the_samples_that_it_began_with(run, plain, grow, tmp_path):
    options = {"cache": grow(4), "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "allow_partial": "true"}
    whole = run(plain, tmp_path / "whole", **options)
    grow(7)
    options["resume_from_checkpoint"] = tmp_path / "whole" / "checkpoint-3"
    assert losses(run(plain, tmp_path / "again", **options)) == losses(whole)
    grow(None)
    assert losses(run(plain, tmp_path / "later", **options)) == losses(whole)
    with pytest.raises(MismatchError, match=r"belongs to another run \(samples: "):
        run(plain, tmp_path / "other", **{**options, "allow_partial": "false"})


RANK = """
import sys, torch
from logitcache_storage.cache import Cache
from logitcache_train.unfinished import agreed
rank, url, meeting = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
cache = agreed({"teacher": [Cache.open(url)]}, None)["teacher"][0]
print(sorted(cache.shards), cache.keys().tobytes().hex())
torch.distributed.destroy_process_group()
"""


def test_ranks_that_saw_different_states_go_by_what_all_of_them_saw(made, grow, tmp_path):
    shutil.copytree(grow(3), tmp_path / "earlier")
    urls = [tmp_path / "earlier", grow(5)]
    assert [len(Cache.open(str(url)).shards) for url in urls] == [3, 5]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(url), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, url in enumerate(urls)
    ]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    expected = f"[0, 1, 2] {Cache.open(str(tmp_path / 'earlier')).keys().tobytes().hex()}\n"
    assert said == [expected, expected]
