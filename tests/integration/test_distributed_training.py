"""Two ranks under torchrun against one: the same global batches, losses and evaluations, with DDP and with FSDP2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.demo.models import build_tokenizer
from logitcache_train.student import CHECK_LENGTH

K = 5
COMMON = {
    "objective": "target_sft",
    "learning_rate": "1e-3",
    "batch_tokens": "150",
    "max_steps": "8",
    "logging_steps": "1",
    "save_strategy": "steps",
    "save_steps": "3",
    "eval_strategy": "steps",
    "eval_steps": "4",
}
SEVERAL_RUNS = Path(__file__).with_name("several_runs.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Students without dropout, because ranks draw their own, and caches of 60 and of 23 samples."""
    folder, tokenizer = tmp_path_factory.mktemp("distributed"), build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, tied in (("student", True), ("untied", False)):
        tokenizer.save_pretrained(folder / name)
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=64, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    loaded = AutoTokenizer.from_pretrained(folder / "student")
    identity = make_identity(
        tokenizer=tokenizer_identity(loaded.get_vocab(), loaded.special_tokens_map, loaded.chat_template),
        vocab_size=len(loaded),
        k=K,
        shard_rows=40,
        container="arrow",
    )
    for name, num_samples, seed in (("cache", 60, 3), ("held-out", 23, 9)):
        samples, topks = make_samples(num_samples, K, len(loaded), seed=seed)
        write_cache(str(folder / name), samples, topks, identity=identity)
    return folder


def words_of(folder, name, **changes):
    paths = {"student": "student", "cache": "cache", "eval_cache": "held-out", "output": name}
    options = {**{key: folder / path for key, path in paths.items()}, **COMMON, **changes}
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)]


def run_alone(folder, name, **changes):
    """Train with one rank, in this process; returns the log."""
    assert main(["train", *words_of(folder, name, **changes)]) == 0
    return log_of(folder / name)


def run_with_two_ranks(folder, mode, *runs):
    """Train with two ranks in processes of their own; returns what those said, and the exit status of each run."""
    request, status = folder / f"{mode}.json", folder / f"{mode}-status.json"
    request.write_text(json.dumps(runs))
    done = torchrun(SEVERAL_RUNS, mode, request, status)
    assert done.returncode == 0, done.stderr
    return done, json.loads(status.read_text())


def torchrun(*words):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def log_of(output: Path):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


def evaluations(log):
    names = ("eval_loss", "eval_nll", "eval_kl", "eval_top_1_agreement")
    return [[entry[name] for name in names] for entry in log if "eval_nll" in entry]


def assert_same_run(found, expected):
    # AdamW steps on float32 sums in another order.
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    for ours, theirs in zip(evaluations(found), evaluations(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


FEW = {"batch_tokens": 15, "save_strategy": "no", "max_steps": 6, "eval_steps": 6}
UNTIED = {"student": "untied", "max_steps": 5, "save_strategy": "no", "eval_steps": 5}
ADAPTED = {**UNTIED, "lora_rank": 2, "learning_rate": "1e-2"}


@pytest.fixture(scope="module")
def one_rank(folder):
    return run_alone(folder, "one")


@pytest.fixture(scope="module")
def two_ranks(folder):
    """With DDP."""
    return run_with_two_ranks(
        folder,
        "ddp",
        words_of(folder, "two", gradient_accumulation_steps=2, per_device_eval_batch_size=3),
        words_of(folder, "few-two", **FEW, per_device_eval_batch_size=22),
        [*words_of(folder, "refused"), "--fsdp"],
        [*words_of(folder, "refused"), "--fsdp", "--fsdp_config", '{"cpu_ram_efficient_loading": true}'],
    )


@pytest.fixture(scope="module")
def sharded(folder):
    """With FSDP2."""
    untied, adapted = ({**options, "student": folder / "untied"} for options in (UNTIED, ADAPTED))
    resumed = {"max_steps": 8, "resume_from_checkpoint": folder / "sharded" / "checkpoint-6"}
    runs = [
        words_of(folder, "sharded"),
        words_of(folder, "sharded-again", **resumed),
        words_of(folder, "untied-two", **untied),
        words_of(folder, "adapted-two", **adapted),
    ]
    _, statuses = run_with_two_ranks(folder, "fsdp", *([*words, "--fsdp"] for words in runs))
    assert statuses == [0, 0, 0, 0]


def test_two_ranks_have_the_losses_and_the_evaluations_of_one(folder, one_rank, two_ranks):
    assert len(losses(one_rank)) == 8 and len(evaluations(one_rank)) == 2
    assert_same_run(log_of(folder / "two"), one_rank)
    assert max(losses(one_rank)) - min(losses(one_rank)) > 1e-2


def test_only_the_main_process_prints(folder, two_ranks):
    done, _ = two_ranks
    assert done.stdout.count(f"saved {folder / 'two'} ") == 1
    assert done.stderr.count("step 8 of 8") == 1
    assert done.stderr.count("held-out after step 8") == 1


def test_one_rank_goes_on_from_a_checkpoint_of_two(folder, one_rank, two_ranks):
    found = run_alone(folder, "resumed", resume_from_checkpoint=folder / "two" / "checkpoint-3")
    assert losses(found) == pytest.approx(losses(one_rank), abs=1e-5)


def test_ranks_without_a_sample_of_their_own_change_nothing(folder, two_ranks):
    """Batches of one or two samples, so that in most steps a rank has nothing to train on."""
    assert_same_run(log_of(folder / "few-two"), run_alone(folder, "few-one", **FEW))


def test_sharding_that_cannot_be_is_refused(two_ranks):
    done, statuses = two_ranks
    assert statuses == [0, 0, 2, 2]
    assert "--fsdp: accelerate shards models on GPUs only, and would use DDP here" in done.stderr
    assert "--fsdp_config cpu_ram_efficient_loading: only one rank of a node would have the student" in done.stderr


def test_a_sharded_student_trains_as_a_whole_one(folder, one_rank, sharded):
    assert_same_run(log_of(folder / "sharded"), one_rank)
    # Only a run that FSDP sharded saves this.
    assert (folder / "sharded" / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()
    whole, parts = (LlamaForCausalLM.from_pretrained(folder / name) for name in ("one", "sharded"))
    for (name, expected), found in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=name)


def test_a_sharded_run_is_resumed_but_not_as_a_whole_one(folder, one_rank, sharded, capsys):
    assert_same_run(log_of(folder / "sharded-again"), one_rank)
    checkpoint = folder / "sharded" / "checkpoint-3"
    assert main(["train", *words_of(folder, "never", resume_from_checkpoint=checkpoint)]) == 2
    assert "checkpoint-3 is of a run with --fsdp" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "options"), [("untied", UNTIED), ("adapted", ADAPTED)])
def test_a_sharded_student_may_have_a_head_of_its_own_and_adapters(folder, sharded, name, options):
    expected = run_alone(folder, f"{name}-one", **{**options, "student": folder / "untied"})
    assert_same_run(log_of(folder / f"{name}-two"), expected)


def test_a_bad_batch_of_one_rank_ends_all_of_them(folder):
    """The embedding of one token is NaN, and only one rank of a step gets a sample that has it."""
    samples = list(Cache.open(str(folder / "cache")))
    model = LlamaForCausalLM.from_pretrained(folder / "untied")
    checked = np.random.default_rng(0).integers(model.config.vocab_size, size=(2, CHECK_LENGTH))
    holders = {t: [s for s in samples if t in s.input_ids] for t in range(model.config.vocab_size)}
    token = min((t for t in holders if holders[t] and t not in checked), key=lambda t: len(holders[t]))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    shutil.copytree(folder / "untied", folder / "damaged")
    model.save_pretrained(folder / "damaged")
    words = [
        "--student",
        folder / "damaged",
        "--cache",
        folder / "cache",
        "--objective",
        "sft",
        "--num_train_epochs",
        1,
    ]
    words += ["--gradient_accumulation_steps", 2, "--batch_tokens", 150, "--output", folder / "never"]
    done = torchrun("-m", "logitcache_train", *words)
    assert done.returncode != 0
    found = re.search(r"step \d+, samples ([0-9a-f, ]+): the logits .* NaN or infinite", done.stderr)
    assert found and set(found[1].split(", ")) <= {sample.key for sample in holders[token]}
