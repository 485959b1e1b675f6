"""What a command line and a configuration file become."""

from argparse import ArgumentParser, ArgumentTypeError

import pytest

from logitcache_storage.errors import InputError
from logitcache_train.collate import Mixing
from logitcache_train.commands.train import add_arguments, byte_count, parameter_names
from logitcache_train.lora import LoraSettings
from logitcache_train.objectives import OBJECTIVES, objective
from logitcache_train.settings import REFUSED, parse_caches, parse_settings

NEEDED = ("--student", "base", "--cache", "./cache", "--objective", "target_sft", "--output", "out")


def parse(*words):
    parser = ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args, args.rest = parser.parse_known_args(words)
    return parse_settings(args)


def test_the_needed_arguments_are_enough():
    found = parse(*NEEDED)
    assert (found.student, dict(found.caches), str(found.output)) == ("base", {"teacher": ("./cache",)}, "out")
    assert (found.objective.name, found.objective.values) == ("target_sft", {"eta": 0.5})
    assert (found.batch_tokens, found.window_shards, found.packing, found.dtype) == (None, 8, "auto", "float32")
    assert (found.arguments.logging_steps, found.arguments.report_to, found.arguments.bf16) == (10, [], False)


@pytest.mark.parametrize("style", [str, lambda word: word.replace("_", "-")], ids=["underscores", "hyphens"])
def test_both_spellings_work_for_our_options_and_the_trainers(style):
    words = ("--batch_tokens", "512", "--window_shards", "3", "--learning_rate", "3e-4", "--output_dir", "there")
    found = parse(*NEEDED, *(style(w) if w.startswith("--") else w for w in words))
    assert (found.batch_tokens, found.window_shards, found.arguments.learning_rate) == (512, 3, 3e-4)
    assert str(found.output) == "there"


def test_parameters_reach_the_objective():
    assert parse(*NEEDED, "--eta", "0.25").objective.values == {"eta": 0.25}
    with pytest.raises(InputError, match=r"'target_sft' has no parameter 'beta'"):
        parse(*NEEDED, "--beta", "0.7")
    with pytest.raises(InputError, match=r"eta of objective 'target_sft' must be a number in \[0, 1\], got 2"):
        parse(*NEEDED, "--eta", "2")


def test_every_parameter_of_every_objective_is_an_option():
    assert {name for row in OBJECTIVES.values() for name in row.parameters} == set(parameter_names())


def test_no_option_of_ours_hides_one_of_the_trainers():
    from dataclasses import fields

    from transformers import TrainingArguments

    parser = ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    ours = {action.dest for action in parser._actions}
    assert ours.isdisjoint({f.name for f in fields(TrainingArguments)})


def test_json_and_flags_reach_the_trainer():
    words = ("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}')
    found = parse(*NEEDED, *words, "--activation_checkpointing", "--max_steps", "-1").arguments
    assert found.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert found.activation_checkpointing is True and found.max_steps == -1


def test_a_configuration_file_gives_what_the_command_line_leaves_open(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "student: base\ncache: {teacher: ./t, reference: s3://b/r}\nobjective: asft\noutput: out\nweight: 0.3\n"
        "learning_rate: 1e-3\nbf16: false\nbatch-tokens: 100\nmax_steps: 7\npacking: null\n"
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 1}\n"
    )
    found = parse("--config", str(path), "--max_steps", "9", "--output", "other", "--batch_tokens", "50")
    assert dict(found.caches) == {"teacher": ("./t",), "reference": ("s3://b/r",)}
    assert found.objective.values == {"weight": 0.3}
    assert (found.arguments.learning_rate, found.arguments.max_steps, found.batch_tokens) == (1e-3, 9, 50)
    assert str(found.output) == "other" and found.arguments.lr_scheduler_kwargs == {"num_cycles": 1}
    replaced = parse("--config", str(path), "--cache", "reference=./mine", "--cache", "teacher=./t2")
    assert dict(replaced.caches) == {"reference": ("./mine",), "teacher": ("./t2",)}


def test_words_that_yaml_takes_for_booleans_are_words(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("packing: off\nsave_strategy: no\nbf16: no\nallow_partial: yes\n")
    found = parse(*NEEDED, "--config", str(path))
    assert (found.packing, found.arguments.save_strategy, found.arguments.bf16) == ("off", "no", False)
    assert found.allow_partial is True
    path.write_text("packing: on\n")
    assert parse(*NEEDED, "--config", str(path)).packing == "on"


def test_the_student_is_not_written_over(tmp_path):
    with pytest.raises(InputError, match=r"--output .* is the student, which would be written over"):
        parse(*NEEDED, "--student", str(tmp_path), "--output", f"{tmp_path}/../{tmp_path.name}")
    assert parse(*NEEDED, "--student", str(tmp_path), "--output", str(tmp_path / "out")).student == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("config: x.yaml\n", "names another configuration file"),
        ("packing: maybe\n", "--packing: invalid choice"),
        ("learning_rte: 3\n", "unknown argument --learning_rte; did you mean --learning_rate?"),
    ],
)
def test_a_bad_configuration_file_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        parse(*NEEDED, "--config", str(path))
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot be read as YAML"):
        parse(*NEEDED, "--config", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("name", ["student", "cache", "objective", "output"])
def test_a_missing_argument_is_named(name):
    at = NEEDED.index(f"--{name}")
    with pytest.raises(InputError, match=f"--{name} is missing"):
        parse(*NEEDED[:at], *NEEDED[at + 2 :])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "3"], "unknown argument --lerning_rate; did you mean --learning_rate?"),
        (["--batch_token", "3"], "unknown argument --batch_token; did you mean --batch_tokens?"),
        (["extra"], "unknown argument extra; 'logitcache train --help'"),
        (["stray"], "unknown argument stray; 'logitcache train --help'"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16"),
        (["--batch_tokens", "0"], "--batch_tokens must be at least 1, got 0"),
        (
            ["--local_cache_bytes", "5GB"],
            "--local_cache_bytes bounds the folder of --local_cache; add --local_cache DIR",
        ),
        (["--window_shards", "0"], "--window_shards must be at least 1, got 0"),
        (["--eval_strategy", "steps"], "to evaluate while training takes held-out data: add --eval_cache URL"),
        (["--fsdp"], "--fsdp shards a model over processes: torchrun --nproc_per_node N -m logitcache_train"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1 does not work here: use --objective"),
        (["--auto_find_batch_size", "true"], "--auto_find_batch_size True does not work here"),
    ],
)
def test_arguments_that_do_not_work_are_refused(words, message):
    with pytest.raises(InputError) as e:
        parse(*NEEDED, *words)
    assert message in str(e.value)


def test_an_unknown_objective_is_refused():
    with pytest.raises(InputError, match=r"unknown objective 'sgd'; choose from .*target_sft"):
        parse(*NEEDED, "--objective", "sgd")


def test_what_is_refused_exists():
    from dataclasses import fields

    from transformers import TrainingArguments

    assert set(REFUSED) <= {f.name for f in fields(TrainingArguments)}


def test_a_cache_without_a_role_has_the_one_that_the_objective_needs():
    assert parse_caches(["./c"], objective("sft")) == {"teacher": ("./c",)}
    assert parse_caches(["./c"], objective("asft")) == {"reference": ("./c",)}
    assert parse_caches(["s3://b/c?x=1"], objective("kd")) == {"teacher": ("s3://b/c?x=1",)}
    assert parse_caches(["reference=./r", "./t"], objective("kd")) == {"reference": ("./r",), "teacher": ("./t",)}


def test_several_teachers_keep_their_order_and_other_roles_have_one_cache():
    assert parse_caches(["teacher=./a", "./b"], objective("kd")) == {"teacher": ("./a", "./b")}
    with pytest.raises(InputError, match=r"--eval_cache: two reference caches, ./a and ./b; only teachers are mixed"):
        parse_caches(["reference=./a", "reference=./b"], objective("kd"), option="--eval_cache")
    with pytest.raises(InputError, match=r"unknown role 'techer'; choose from teacher, reference"):
        parse_caches(["techer=./c"], objective("kd"))


TWO = (*NEEDED, "--cache", "teacher=./second", "--cache", "teacher=./third")


def test_teachers_are_mixed_equally_unless_weights_are_given(tmp_path):
    words = (*NEEDED, "--cache", "teacher=./second")
    assert parse(*words).mixing == Mixing("arithmetic", ())
    assert parse(*words, "--mix", "geometric", "--mix_weights", "3,1").mixing == Mixing("geometric", (0.75, 0.25))
    path = tmp_path / "run.yaml"
    path.write_text("cache: {teacher: [./a, ./b], reference: ./r}\nmix_weights: [0.5, 1.5]\nlora_targets: [q, v]\n")
    found = parse("--student", "s", "--output", "o", "--objective", "kd", "--config", str(path), "--lora_rank", "2")
    assert dict(found.caches) == {"teacher": ("./a", "./b"), "reference": ("./r",)}
    assert found.mixing.weights == (0.25, 0.75) and found.lora == LoraSettings(2, targets=("q", "v"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix_weights", "1,2"], "--mix_weights 1,2: 2 weights for 3 teachers; give one for each"),
        (["--mix_weights", "1,-2"], "--mix_weights 1,-2: weights of teachers must be numbers >= 0"),
        (["--mix_weights", "0,0"], "--mix_weights 0,0: weights of teachers must be numbers >= 0, at least one"),
        (["--mix_weights", "nan,1"], "--mix_weights nan,1: weights of teachers must be numbers >= 0"),
        (["--mix_weights", "half,half"], "--mix_weights half,half: could not convert"),
        (
            ["--objective", "iw_sft", "--mix", "geometric"],
            "'iw_sft' reads the label's log-prob in the teacher's cache, which a geometric mean",
        ),
    ],
)
def test_mixtures_that_do_not_work_are_refused(words, message):
    with pytest.raises(InputError) as e:
        parse(*TWO, *words)
    assert message in str(e.value)


def test_mixing_one_teacher_is_refused():
    with pytest.raises(InputError, match=r"--mix mixes several teachers, and there is 1; add --cache teacher=URL"):
        parse(*NEEDED, "--mix", "geometric")


def test_an_optional_role_is_needed_once_it_is_given():
    words = ("--student", "s", "--output", "o", "--objective", "iw_sft", "--cache", "reference=./r")
    for more, roles in (((), ("reference",)), (("--cache", "teacher=./t"), ("reference", "teacher"))):
        found = parse(*words, *more).objective
        assert (found.roles, found.optional_roles) == (roles, ())


def test_held_out_caches_are_looked_at_after_each_epoch_unless_told_otherwise():
    words = (*NEEDED, "--eval_cache", "teacher=./h")
    assert parse(*words).arguments.eval_strategy == "epoch" and dict(parse(*words).eval_caches) == {"teacher": ("./h",)}
    assert parse(*words, "--eval_strategy", "steps", "--eval_steps", "3").arguments.eval_steps == 3
    with pytest.raises(InputError, match="--eval_cache is never looked at with --eval_strategy no"):
        parse(*words, "--eval_strategy", "no")


@pytest.mark.parametrize(("metric", "greater"), [("nll", False), ("eval_kl", False), ("loss", False)])
def test_the_best_model_has_the_lowest_divergence_and_the_highest_agreement(metric, greater):
    words = (*NEEDED, "--eval_cache", "./h", "--metric_for_best_model")
    assert parse(*words, metric).arguments.greater_is_better is greater
    assert parse(*words, metric, "--greater-is-better", "true").arguments.greater_is_better is True
    assert parse(*words, "top_1_agreement").arguments.greater_is_better is True
    with pytest.raises(
        InputError, match=r"--metric_for_best_model bleu: .* choose from loss, nll, kl, top_1_agreement"
    ):
        parse(*words, "bleu")
    with pytest.raises(
        InputError, match=r"--metric_for_best_model kl: an evaluation of reference caches .* loss, nll$"
    ):
        parse(*NEEDED, "--eval_cache", "reference=./h", "--metric_for_best_model", "kl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_alpha", "3"], "--lora_alpha needs --lora_rank"),
        (["--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
        (["--lora_rank", "2", "--lora_alpha", "0"], "--lora_alpha must be > 0, got 0"),
        (["--lora_rank", "2", "--lora_dropout", "1"], "--lora_dropout must be in [0, 1), got 1"),
        (["--lora_rank", "2", "--lora_targets", "q_proj,"], "--lora_targets: name all-linear or layers"),
    ],
)
def test_adapters_that_do_not_work_are_refused(words, message):
    with pytest.raises(InputError) as e:
        parse(*NEEDED, *words)
    assert message in str(e.value)


def test_eta_beyond_its_range_must_be_asked_for():
    with pytest.raises(InputError, match=r"eta .* must be a number in \[0, 1\], got 1.5.*--extrapolate"):
        parse(*NEEDED, "--eta", "1.5")
    assert parse(*NEEDED, "--eta", "1.5", "--extrapolate").objective.values == {"eta": 1.5}


@pytest.mark.parametrize(("text", "count"), [("200GB", 2 * 10**11), ("1.5 tb", 15 * 10**11), ("64", 64), ("7k", 7000)])
def test_sizes_are_bytes_in_powers_of_a_thousand(text, count):
    assert parse(*NEEDED, "--local_cache", "d", "--local_cache_bytes", text).local_cache_bytes == count


@pytest.mark.parametrize("text", ["many", "-1", "1.5.2GB", "GB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ArgumentTypeError, match="expected bytes, as in 200GB"):
        byte_count(text)


ROW = """
student: base
cache: ./c
output: out
extrapolate: false
objective:
  name: floored
  label: max(p_label, floor)
  guided: 1 - max(p_label, floor)
  role: teacher
  parameters: {eta: 0.5, floor: {default: 0.05, low: 0, high: 1}}
"""


def test_a_row_of_ones_own_is_an_objective_with_parameters(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(ROW)
    found = parse("--config", str(path), "--eta", "0.25", "--floor", "0.1", "--max_steps", "3")
    assert (found.objective.name, found.objective.values) == ("floored", {"eta": 0.25, "floor": 0.1})
    assert found.objective_row["label"] == "max(p_label, floor)" and found.arguments.max_steps == 3
    assert parse("--config", str(path), "--objective", "sft").objective_row is None
    with pytest.raises(InputError, match=r"floor of objective 'floored' must be a number in \[0, 1\], got 2"):
        parse("--config", str(path), "--floor", "2")
    with pytest.raises(InputError, match="unknown argument --ceiling"):
        parse("--config", str(path), "--ceiling", "2")
    path.write_text(ROW.replace("floor", "seed"))
    with pytest.raises(InputError, match=r"has a parameter 'seed', and --seed is an option of 'logitcache train'"):
        parse("--config", str(path))
    path.write_text(ROW.replace("label:", "lable:"))
    with pytest.raises(InputError, match="an objective has no key 'lable'"):
        parse("--config", str(path))
