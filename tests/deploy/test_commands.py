"""Every command line of ours in manifests, compose, scripts and pages is one that the commands take."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path

import pytest
import yaml
from deployed import KUBERNETES, OVERLAYS, ROOT, command_lines

from logitcache_pipeline.settings import BuildSettings
from logitcache_storage.cli import find_commands
from logitcache_storage.record_json import parse


@pytest.fixture(scope="module")
def training_options() -> set[str]:
    from transformers import HfArgumentParser, TrainingArguments

    return {option for action in HfArgumentParser(TrainingArguments)._actions for option in action.option_strings}


def mistakes(words: list[str], training_options: set[str]) -> str:
    """What is wrong with a command line; nothing where `...` stands for what is left out, if its options are known."""
    name, rest = ("train", words[1:]) if words[0] == "logitcache_train" else (words[1], words[2:])
    if name.startswith("-") or name in ("COMMAND", "..."):
        return ""
    if name not in find_commands():
        return f"no command {name!r}"
    command = find_commands()[name].load()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true")
    if any("..." in word for word in rest):
        for action in parser._actions:
            action.required = False
            action.nargs = "?" if not action.option_strings and action.nargs is None else action.nargs
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            _, unknown = parser.parse_known_args([word for word in rest if "..." not in word])
    except SystemExit as e:
        return said.getvalue() if e.code else ""
    allowed = training_options if command.takes_rest else set()
    strangers = [word for word in unknown if word.startswith("--") and word.partition("=")[0] not in allowed]
    return f"unknown {strangers}" if strangers or (unknown and not command.takes_rest) else ""


def test_every_command_line_is_one_that_the_command_takes(training_options):
    found = list(command_lines())
    wrong = {f"{where}: {' '.join(words)}": m for where, words in found if (m := mistakes(words, training_options))}
    assert wrong == {}
    assert {"build", "train", "verify", "serve", "status"} <= {words[1] for _, words in found}


@pytest.mark.parametrize(
    "line",
    [
        "logitcache build --teacher t --data d --cash c",
        "logitcache serve URL --port many",
        "logitcache verify",
        "logitcache bild",
        "logitcache_train --student s --chache c",
        "logitcache build --shards 3 ...",
    ],
)
def test_a_renamed_option_would_be_found(line, training_options):
    assert mistakes(line.split(), training_options)


def test_what_the_runbook_quotes_is_said():
    from botocore.exceptions import NoCredentialsError

    page = (ROOT / "deploy" / "README.md").read_text()
    section = page.partition("## When something goes wrong")[2].partition("\n## ")[0]
    seen = " ".join(row.split(" | ")[0] for row in section.splitlines() if row.startswith("| "))
    quoted = [part for span in re.findall(r"`([^`]+)`", seen) for part in re.split(r" ?\.\.\. ?", span)]
    code = [path.read_text() for name in ("storage", "pipeline", "train") for path in (ROOT / name).rglob("*.py")]
    said = "\n".join([*code, NoCredentialsError.fmt])
    assert len(quoted) > 9 and [text for text in quoted if text not in said] == []


def settings_files(name: str) -> list[Path]:
    """Not the manifests and patches of the same name."""
    return sorted(path for path in KUBERNETES.rglob(name) if path.parent.name in ("settings", *OVERLAYS))


@pytest.mark.parametrize("path", settings_files("build.yaml"), ids=lambda path: path.parent.name)
def test_the_settings_of_a_build_are_options_of_build(path: Path):
    values = {name.replace("-", "_"): value for name, value in yaml.safe_load(path.read_text()).items()}
    parse(BuildSettings, {"teacher": "t", "data": ["d"], "cache": "c", **values}, where=str(path))


@pytest.mark.parametrize("path", settings_files("train.yaml"), ids=lambda path: path.parent.name)
def test_the_settings_of_a_student_are_options_of_train(path: Path, tmp_path: Path):
    from logitcache_train.commands.train import COMMAND
    from logitcache_train.settings import parse_settings

    parser = argparse.ArgumentParser(allow_abbrev=False)
    COMMAND.add_arguments(parser)
    words = ["--config", str(path), "--student", "s", "--cache", "c", "--output", str(tmp_path)]
    args, args_rest = parser.parse_known_args(words)
    args.rest = args_rest
    settings = parse_settings(args)
    assert settings.arguments.resume_from_checkpoint == "auto" and settings.local_cache == "/shards"
