"""What a command line and a configuration file become."""

from argparse import ArgumentParser

import pytest

from logitcache_storage.errors import InputError
from logitcache_train.commands.train import add_arguments, parameter_names
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
    assert (found.student, dict(found.caches), str(found.output)) == ("base", {"teacher": "./cache"}, "out")
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
        "learning_rate: 1e-3\nbf16: false\nbatch-tokens: 100\nmax_steps: 7\nlr_scheduler_kwargs: {a: 1}\n"
        "packing: null\n"
    )
    found = parse("--config", str(path), "--max_steps", "9", "--output", "other", "--batch_tokens", "50")
    assert dict(found.caches) == {"teacher": "./t", "reference": "s3://b/r"}
    assert found.objective.values == {"weight": 0.3}
    assert (found.arguments.learning_rate, found.arguments.max_steps, found.batch_tokens) == (1e-3, 9, 50)
    assert str(found.output) == "other" and found.arguments.lr_scheduler_kwargs == {"a": 1}
    replaced = parse("--config", str(path), "--cache", "reference=./mine", "--cache", "teacher=./t2")
    assert dict(replaced.caches) == {"reference": "./mine", "teacher": "./t2"}


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
        (["stray"], "unknown argument stray; 'logitcache train --help'"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16"),
        (["--batch_tokens", "0"], "--batch_tokens must be at least 1, got 0"),
        (["--window_shards", "0"], "--window_shards must be at least 1, got 0"),
        (["--eval_strategy", "steps"], "--eval_strategy steps does not work here: evaluate checkpoints with"),
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
    assert parse_caches(["./c"], objective("sft")) == {"teacher": "./c"}
    assert parse_caches(["./c"], objective("asft")) == {"reference": "./c"}
    assert parse_caches(["s3://b/c?x=1"], objective("kd")) == {"teacher": "s3://b/c?x=1"}
    assert parse_caches(["reference=./r", "./t"], objective("kd")) == {"reference": "./r", "teacher": "./t"}


def test_roles_must_be_known_and_distinct():
    with pytest.raises(InputError, match=r"unknown role 'techer'; choose from teacher, reference"):
        parse_caches(["techer=./c"], objective("kd"))
    with pytest.raises(InputError, match=r"two teacher caches, ./a and ./b"):
        parse_caches(["./a", "teacher=./b"], objective("kd"))
