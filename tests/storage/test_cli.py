"""The command line itself: finding commands, statuses, what an error looks like."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache_storage.cli import BROKEN_PIPE, INTERRUPTED, find_commands, main

STORAGE = Path(__file__).parents[2] / "storage"

PROBE_MODULE = """
from logitcache_storage.command import Command
from logitcache_storage.errors import InputError, StoreError


def add_arguments(parser):
    parser.add_argument("--do", default="nothing")


def run(args):
    match args.do:
        case "input":
            raise InputError("no \\x1b[31mfield 'x'")
        case "store":
            raise StoreError("the store is gone")
        case "bug":
            raise KeyError("x")
        case "interrupt":
            raise KeyboardInterrupt
        case "pipe":
            raise BrokenPipeError
        case "damage":
            return 1
    print("rest", getattr(args, "rest", None), "debug", args.debug)
    return 0


PROBE = Command("does what it is told", add_arguments, run)
GREEDY = Command("takes the rest", add_arguments, run, takes_rest=True)
"""


@pytest.fixture(autouse=True)
def probe_package(tmp_path, monkeypatch):
    """A really installed distribution with commands of its own."""
    (tmp_path / "probe_commands.py").write_text(PROBE_MODULE)
    info = tmp_path / "probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
    commands = "probe = probe_commands:PROBE\ngreedy = probe_commands:GREEDY\nabsent = no_such_module:COMMAND\n"
    (info / "entry_points.txt").write_text(f"[logitcache.commands]\n{commands}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("probe_commands", None)


def run_apart(*args, **options):
    environment = {**os.environ, "PYTHONPATH": str(STORAGE)}
    command = [sys.executable, "-m", "logitcache_storage.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)


def test_commands_of_the_checkout_and_of_other_packages_are_found():
    assert {"status", "inspect", "stats", "verify", "build", "train", "probe", "greedy"} <= find_commands().keys()


def test_help_lists_every_command_even_one_that_cannot_be_loaded(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "does what it is told" in out and "check every object against its checksum" in out
    assert "absent" in out and "cannot be loaded: No module named 'no_such_module'" in out


def test_a_package_that_an_image_leaves_out_is_said_to_be_left_out():
    code = (
        "import sys; sys.path = [p for p in sys.path if not p.endswith('/train')];"
        "from logitcache_storage.cli import main;"
        "print(main(['--help']), main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("0 1\n")
    assert re.search(r"^  train +not part of this installation$", done.stdout, re.MULTILINE)
    assert "logitcache train: not part of this installation: the package 'logitcache_train'" in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from logitcache_storage.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'ray', 'transformers', 'rich', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (STORAGE, *sys.path)))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert found.stderr.strip() == "[]"


def test_runs_as_a_module_from_a_checkout():
    found = run_apart("--version")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("logitcache ")


def test_no_command_at_all_is_a_wrong_call(capsys):
    assert main([]) == 2
    assert "usage: logitcache" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["stat"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("logitcache: unknown command 'stat'; did you mean ") and "'stats'" in err


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("nothing", 0, ""),
        ("damage", 1, ""),
        ("input", 2, "logitcache probe: no \\x1b[31mfield 'x'\n"),
        ("store", 1, "logitcache probe: the store is gone\n"),
        ("bug", 1, "logitcache probe: unexpected error: KeyError: 'x'; run again with --debug for the traceback\n"),
        ("interrupt", INTERRUPTED, "logitcache probe: interrupted\n"),
    ],
)
def test_outcomes_become_statuses_and_one_line(what, status, said, capsys):
    assert main(["probe", "--do", what]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["--debug", "probe", "--do", "bug"], ["probe", "--do", "bug", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(words, capsys):
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("logitcache probe: unexpected error: KeyError: 'x'\n")


def test_unknown_options_are_refused_or_handed_on(capsys):
    assert main(["probe", "--learning_rate", "1"]) == 2
    assert "unrecognized arguments: --learning_rate 1" in capsys.readouterr().err
    assert main(["greedy", "--learning_rate", "1"]) == 0
    assert "rest ['--learning_rate', '1'] debug False" in capsys.readouterr().out


def test_an_unknown_option_before_the_command_is_refused(capsys):
    assert main(["--frob", "probe"]) == 2
    assert "unrecognized arguments: --frob" in capsys.readouterr().err


def test_a_missing_package_names_the_extra_that_brings_it(tmp_path, monkeypatch, capsys):
    package = tmp_path / "logitcache_train"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "needy.py").write_text("import a_package_nobody_has\n")
    for module in [name for name in sys.modules if name.split(".")[0] == "logitcache_train"]:
        monkeypatch.delitem(sys.modules, module)
    info = tmp_path / "needy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: needy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[logitcache.commands]\nneedy = logitcache_train.needy:COMMAND\n")
    try:
        assert main(["needy"]) == 1
        expected = "needs the package 'a_package_nobody_has', which is not installed; run: pip install"
        assert capsys.readouterr().err == f'logitcache needy: {expected} "logitcache[train]"\n'
        assert main(["--help"]) == 0
        assert 'needs pip install "logitcache[train]"' in capsys.readouterr().out
    finally:
        for module in [name for name in sys.modules if name.split(".")[0] == "logitcache_train"]:
            del sys.modules[module]


def test_a_closed_pipe_is_quiet(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STORAGE), str(tmp_path)])}
    command = [sys.executable, "-m", "logitcache_storage.cli", "probe", "--do", "pipe"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (BROKEN_PIPE, "", "")


def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(STORAGE)}
    command = [sys.executable, "-m", "logitcache_storage.cli", "--help"]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(writing)
    assert (found.returncode, found.stderr) == (BROKEN_PIPE, "")


def test_a_small_character_set_gets_escapes():
    environment = {**os.environ, "PYTHONPATH": str(STORAGE), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "logitcache_storage.cli", "stätus"]
    found = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert found.returncode == 2
    assert b"unknown command 'st\\xe4tus'" in found.stderr
