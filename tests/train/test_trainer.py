"""Whole runs on a tiny student: exact resume, exact steps, the same losses however a batch is cut; and refusals."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache_storage.cache import Cache
from logitcache_storage.errors import CacheNotFoundError, InputError, LogitCacheError, MismatchError


def steps(log):
    """The entries of training steps."""
    return [entry for entry in log if "loss" in entry]


def losses(log):
    return [entry["loss"] for entry in steps(log)]


def test_a_run_resumed_in_mid_epoch_ends_in_the_same_bits(run, made, tmp_path, capfd):
    """Attention dropout is on, so the random state counts; epochs of five steps, and two accumulation steps each."""
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 7}
    whole = steps(run(made, tmp_path / "whole", **options))
    resumed = run(made, tmp_path / "resumed", **options, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-7")
    assert [entry["epoch"] for entry in whole] == pytest.approx([(i + 1) / 5 for i in range(12)])
    assert losses(resumed) == losses(whole)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    said = capfd.readouterr().err
    assert "training: step 12 of 12: loss" in said
    assert said.count(f"training: on from {tmp_path / 'whole' / 'checkpoint-7'}\n") == 1


def test_a_run_shorter_than_its_logging_steps_says_its_loss(run, made, tmp_path, capfd):
    whole = losses(run(made, tmp_path / "each", max_steps=3))
    found = losses(run(made, tmp_path / "last", max_steps=3, logging_steps=10))
    assert found == pytest.approx([sum(whole) / 3], rel=1e-5)
    assert "training: step 3 of 3: loss" in capfd.readouterr().err


def test_true_resumes_the_last_checkpoint_of_the_output_folder(run, made, tmp_path):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = run(made, tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    resumed = run(made, tmp_path / "out", **options, resume_from_checkpoint="true")
    assert losses(resumed) == losses(whole)


def test_auto_starts_a_run_and_goes_on_after_a_crash(run, made, tmp_path):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto"}
    whole = run(made, tmp_path / "out", **options)
    # Killed while it was writing the last checkpoint: the state is not there yet.
    first, _, last = states = [tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json" for step in (2, 4, 5)]
    last.unlink()
    written = first.stat().st_mtime_ns
    assert losses(run(made, tmp_path / "out", **options)) == losses(whole)
    assert all(state.exists() for state in states) and first.stat().st_mtime_ns == written


def test_accumulation_packing_and_activation_checkpointing_change_no_loss(run, plain, tmp_path):
    options = {"attn_implementation": "eager", "max_steps": 5}
    one = losses(run(plain, tmp_path / "one", **options))
    cut = losses(run(plain, tmp_path / "cut", **options, gradient_accumulation_steps=3))
    packed = losses(run(plain, tmp_path / "packed", **options, packing="on", gradient_accumulation_steps=2))
    again = losses(run(plain, tmp_path / "again", **options, activation_checkpointing="true"))
    assert again == one
    # Five AdamW steps at a learning rate of 1e-2 on float32 sums in another order.
    assert cut == pytest.approx(one, abs=1e-5)
    assert packed == pytest.approx(one, abs=1e-5)


def test_loader_workers_change_nothing(run, made, tmp_path):
    alone = run(made, tmp_path / "alone", max_steps=3)
    served = run(made, tmp_path / "served", max_steps=3, dataloader_num_workers=1)
    assert losses(served) == losses(alone)


def test_an_error_of_a_loader_worker_has_its_own_message_and_no_traceback(run, made, tmp_path):
    keys = pa.array([bytes.fromhex(sample.key) for sample in Cache.open(made.cache)], pa.binary(16))
    pq.write_table(pa.table({"key": keys, "critical": [[1.0] * 99] * len(keys)}), tmp_path / "odd.parquet")
    options = {"objective": "critical_tokens", "columns": tmp_path / "odd.parquet", "dataloader_num_workers": 1}
    with pytest.raises(InputError, match=r"\Acolumn 'critical' of sample \w{32}: expected a number, .*\Z"):
        run(made, tmp_path / "out", **options)


@pytest.mark.parametrize(("option", "value", "num_steps"), [("max_steps", 7, 7), ("num_train_epochs", 1, 5)])
def test_a_run_has_exactly_as_many_steps_as_asked(run, made, tmp_path, option, value, num_steps):
    total = sum(Cache.open(made.cache).samples.column("num_tokens").to_pylist())
    assert math.ceil(total / 150) == 5
    log = run(made, tmp_path / "out", **{"max_steps": None, option: value})
    assert [entry["step"] for entry in steps(log)] == list(range(1, num_steps + 1))


def test_the_logged_loss_is_the_mean_over_the_global_batch(run, plain, tmp_path):
    """All samples in one step of learning rate 0: the loss is that of the student over the whole cache."""
    options = {"objective": "sft", "batch_tokens": 10**6, "max_steps": 1, "learning_rate": 0}
    [entry] = steps(run(plain, tmp_path / "out", **options))
    model, losses, p_labels = AutoModelForCausalLM.from_pretrained(plain.student), [], []
    for sample in Cache.open(plain.cache):
        logits_LV = model(input_ids=torch.tensor(sample.input_ids[None], dtype=torch.long)).logits[0].double()
        log_p = logits_LV[sample.target_positions - 1].log_softmax(-1)
        label_log_p = log_p[range(len(sample.labels)), sample.labels]
        losses += (-label_log_p).tolist()
        p_labels += label_log_p.exp().tolist()
    assert entry["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert entry["p_label"] == pytest.approx(sum(p_labels) / len(p_labels), abs=1e-6)
    assert entry["gamma"] == 1.0
    assert entry["target_tokens_per_second"] > 0


def test_training_lowers_the_loss_and_logs_the_teacher(run, made, tmp_path):
    log = steps(run(made, tmp_path / "out", objective="kd", max_steps=30))
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    tails = [math.exp(x) for s in Cache.open(made.cache) for x in s.topk.log_tail.tolist()]
    # The logged tail leaves out the label's share of it.
    assert 0 < log[-1]["teacher_tail"] < max(tails)


def test_the_output_is_an_ordinary_checkpoint_with_a_record_of_the_run(run, made, tmp_path):
    run(made, tmp_path / "out", save_strategy="steps", save_steps=6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["LlamaForCausalLM"] and model.config.use_cache
    inputs = tokenizer("a 3 b", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):
        record = json.loads((folder / "logitcache.json").read_text())
        assert record["objective"] == {"name": "target_sft", "eta": 0.5}
        assert record["batch_tokens"] == 150 and record["layout"] == "padded"
        assert record["caches"]["teacher"][0]["identity"]["k"] == made.identity.k
        assert record["training_arguments"]["learning_rate"] == 1e-2


def test_the_batch_size_of_the_trainer_means_samples_of_mean_length(run, made, tmp_path):
    run(
        made,
        tmp_path / "out",
        batch_tokens=None,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    record = json.loads((tmp_path / "out" / "logitcache.json").read_text())
    lengths = Cache.open(made.cache).samples.column("num_tokens").to_pylist()
    assert record["batch_tokens"] == round(6 * sum(lengths) / len(lengths))


def test_a_resumed_run_keeps_the_batches_of_the_checkpoint(run, made, tmp_path):
    options = {"batch_tokens": None, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    run(made, tmp_path / "first", **options, max_steps=2)
    resume = {"resume_from_checkpoint": tmp_path / "first" / "checkpoint-2"}
    run(made, tmp_path / "second", **{**options, "per_device_train_batch_size": 16}, max_steps=3, **resume)
    records = [json.loads((tmp_path / n / "logitcache.json").read_text()) for n in ("first", "second")]
    assert records[0]["batch_tokens"] == records[1]["batch_tokens"]


def test_checkpoints_of_an_earlier_run_are_neither_overwritten_nor_taken_silently(run, made, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(made, tmp_path / "out", **options)
    with pytest.raises(InputError, match=r"checkpoint-1 is there .* --resume_from_checkpoint true, or choose another"):
        run(made, tmp_path / "out", **options)
    with pytest.raises(MismatchError, match=r"another run .*batch_tokens: 99, there 150.* --student"):
        run(made, tmp_path / "out", **{**options, "batch_tokens": 99}, resume_from_checkpoint="true")
    with pytest.raises(MismatchError, match=r"objective: .*'dft'.*, there .*'target_sft'"):
        run(made, tmp_path / "out", **{**options, "objective": "dft"}, resume_from_checkpoint="true")
    (tmp_path / "out" / "checkpoint-1" / "logitcache.json").unlink()
    with pytest.raises(InputError, match=r"only a checkpoint of 'logitcache train' can be resumed"):
        run(made, tmp_path / "out", **options, resume_from_checkpoint="true")


def test_arguments_that_only_the_trainer_knows_to_be_wrong_are_refused(run, made, tmp_path):
    with pytest.raises(InputError, match="the Trainer cannot work with these arguments: nonsense is not supported"):
        run(made, tmp_path / "out", report_to="nonsense")


def test_nothing_to_resume_is_refused(run, made, tmp_path):
    with pytest.raises(InputError, match=r"has no checkpoint to go on from"):
        run(made, tmp_path / "out", resume_from_checkpoint="true")
    with pytest.raises(InputError, match=r"elsewhere: no trainer_state.json there"):
        run(made, tmp_path / "out", resume_from_checkpoint=tmp_path / "elsewhere")


def test_a_student_that_is_not_there_is_refused(run, made, tmp_path):
    with pytest.raises(InputError, match=r"nobody: no such folder"):
        run(made, tmp_path / "out", student=tmp_path / "nobody")
    with pytest.raises(InputError, match=r"config.json: a file, expected the folder of a checkpoint"):
        run(made, tmp_path / "out", student=made.student / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot load a causal language model"):
        run(made, tmp_path / "out", student=tmp_path / "empty")
    with pytest.raises(CacheNotFoundError):
        run(made, tmp_path / "out", cache=tmp_path / "no-cache")


def test_a_student_with_missing_weights_is_refused(run, made, tmp_path):
    shutil.copytree(made.student, tmp_path / "student")
    weights = load_file(made.student / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of LlamaForCausalLM, first 'lm_head.weight'"):
        run(made, tmp_path / "out", student=tmp_path / "student")


def test_another_tokenizer_is_refused(run, made, tmp_path):
    shutil.copytree(made.student, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(made.student)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(MismatchError, match=r"another vocabulary than the cache: found \w{12}, expected \w{12}"):
        run(made, tmp_path / "out", student=tmp_path / "student")


def test_a_padded_student_trains_and_one_with_too_few_tokens_is_refused(run, made, make_llama, tmp_path):
    def student(size):
        folder = tmp_path / f"student-{size}"
        shutil.copytree(made.student, folder)
        make_llama(size).save_pretrained(folder)
        return folder

    run(made, tmp_path / "out", student=student(made.vocab_size + 9), max_steps=2)
    with pytest.raises(MismatchError, match=r"has the token id \d+, and .*student-20 has 20 tokens"):
        run(made, tmp_path / "other", student=student(20))


def test_a_cache_of_more_tokens_than_the_student_has_is_refused(run, made, make_llama, tmp_path):
    shutil.copytree(made.student, tmp_path / "student")
    make_llama(4).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match=r"keeps k = 5 tokens, and .* has a vocabulary of 4"):
        run(made, tmp_path / "out", student=tmp_path / "student")


def test_samples_longer_than_the_student_reads_are_refused(run, made, make_llama, tmp_path):
    shutil.copytree(made.student, tmp_path / "student")
    make_llama(made.vocab_size, max_position_embeddings=9).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match=r"samples of up to \d+ tokens, and .* reads 9 .*--max-length 9"):
        run(made, tmp_path / "out", student=tmp_path / "student")


def test_a_missing_role_is_refused_before_the_student_is_loaded(run, made, tmp_path):
    with pytest.raises(InputError, match=r"'asft' needs a reference cache, given: teacher"):
        run(made, tmp_path / "out", objective="asft", cache=f"teacher={made.cache}", student=tmp_path / "nobody")


def test_a_student_that_diverges_stops_with_the_samples_named(run, made, tmp_path):
    with pytest.raises(LogitCacheError, match=r"step 2, samples ([0-9a-f]{32}, )*[0-9a-f]{32}: .* NaN or infinite"):
        run(made, tmp_path / "out", learning_rate="1e38", max_grad_norm=0)


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"save_strategy": "steps", "save_steps": 1}])
def test_a_student_that_has_diverged_is_not_saved(run, made, tmp_path, options):
    with pytest.raises(LogitCacheError, match=r"of no use, and is not saved: \S+ holds NaN .* after step 1;"):
        run(made, tmp_path / "out", learning_rate="1e38", weight_decay="1e38", **options)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_student_of_damaged_weights_is_refused(run, made, tmp_path):
    shutil.copytree(made.student, tmp_path / "student")
    weights = load_file(made.student / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"student .* cannot be a student: its logits are NaN or infinite"):
        run(made, tmp_path / "out", student=tmp_path / "student")


def test_bfloat16_arithmetic_keeps_float32_weights_and_about_the_loss(run, plain, tmp_path):
    exact = losses(run(plain, tmp_path / "exact"))
    narrow = losses(run(plain, tmp_path / "narrow", bf16="true"))
    assert narrow != exact
    # bfloat16 has 8 bits: logits of about 3 are off by up to 1e-2.
    assert narrow == pytest.approx(exact, abs=5e-2)
    weights = load_file(tmp_path / "narrow" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
