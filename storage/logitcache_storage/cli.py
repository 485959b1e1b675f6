"""The command `logitcache`: finds its sub-commands, runs one, and turns errors into a line and a status.

Only the module of the chosen command is imported, so that looking at a cache never waits for torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from itertools import takewhile
from pathlib import Path
from typing import Any

from logitcache_storage.command import Command
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.visible import printable

GROUP = "logitcache.commands"
SUMMARY = "Run a teacher once, keep what it thought of every target token, train any number of students from it."

INTERRUPTED = 130
BROKEN_PIPE = 141

_EXTRA_OF_MODULE = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure", "vllm": "vllm"}
_EXTRA_OF_PACKAGE = {"logitcache_storage": "web", "logitcache_pipeline": "pipeline", "logitcache_train": "train"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `logitcache` with these arguments (default: the process's own); returns the exit status.

    0 done, 1 the work failed or a check found damage, 2 the arguments or the input are wrong,
    130 interrupted, 141 nobody reads the output any more.
    """
    _print_any_text()
    words = list(sys.argv[1:] if argv is None else argv)
    options = list(takewhile(lambda word: word.startswith("-"), words))
    name = words[len(options)] if len(options) < len(words) else None
    speaker = "logitcache" if name is None else f"logitcache {name}"
    debug = "--debug" in words
    commands = find_commands()
    try:
        _parse_options(options, commands, is_alone=name is None)
        assert name is not None
        status = _run(_entry_point(name, commands), words[len(options) + 1 :])
        sys.stdout.flush()
        return status
    except SystemExit as e:  # argparse, which has said what there was to say
        return e.code if isinstance(e.code, int) else 0
    except BrokenPipeError:
        # Whoever read our output has had enough; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail(speaker, "interrupted", INTERRUPTED, debug)
    except LogitCacheError as e:
        return _fail(speaker if name in commands else "logitcache", str(e), e.exit_status, debug)
    except Exception as e:
        found = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
        again = "" if debug else "; run again with --debug for the traceback"
        return _fail(speaker, f"unexpected error: {found}{again}", 1, debug)


def find_commands() -> dict[str, EntryPoint]:
    """Every sub-command by name."""
    return find_entry_points(GROUP)


def find_entry_points(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name: those of the checkout we run from, and those of installed packages."""
    declared = _checkout().get("project", {}).get("entry-points", {}).get(group, {})
    found = [EntryPoint(name, value, group) for name, value in declared.items()]
    named = {entry.name: entry for entry in [*found, *entry_points(group=group)]}
    return dict(sorted(named.items()))


def _run(entry: EntryPoint, words: Sequence[str]) -> int:
    try:
        command: Command = entry.load()
        return command.run(_parse(entry.name, command, words))
    except ModuleNotFoundError as e:
        if _is_left_out(entry, e):
            raise LogitCacheError(
                f"not part of this installation: the package {e.name!r} was left out of it, as in the images of other"
                f' roles; where it is needed: pip install "logitcache[{_EXTRA_OF_PACKAGE[str(e.name)]}]"'
            ) from e
        extra = _missing_extra(entry, e)
        if extra is None:
            raise
        raise LogitCacheError(
            f'needs the package {e.name!r}, which is not installed; run: pip install "logitcache[{extra}]"'
        ) from e


def _parse(name: str, command: Command, words: Sequence[str]) -> Namespace:
    parser = ArgumentParser(f"logitcache {name}", description=command.summary, allow_abbrev=False)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if not command.takes_rest:
        return parser.parse_args(words)
    args, rest = parser.parse_known_args(words)
    args.rest = rest
    return args


def _parse_options(options: Sequence[str], commands: Mapping[str, EntryPoint], *, is_alone: bool) -> None:
    """What stands before the sub-command; leaves with SystemExit where that is all there is to do."""
    parser = ArgumentParser("logitcache", usage="logitcache [-h] [--version] [--debug] COMMAND ...", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(options)
    if args.version:
        print(f"logitcache {_version()}")
    elif args.help:
        print(_help(parser.format_usage(), commands))
    elif is_alone:
        print(_help(parser.format_usage(), commands), file=sys.stderr)
        raise SystemExit(2)
    else:
        return
    sys.stdout.flush()
    raise SystemExit(0)


def _help(usage: str, commands: Mapping[str, EntryPoint]) -> str:
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:<{width}}  {_summary(entry)}" for name, entry in commands.items()]
    return "\n".join(
        [
            usage,
            SUMMARY,
            "",
            "commands (logitcache COMMAND --help says more):",
            *lines,
            "",
            "options:",
            "  -h, --help  show this",
            "  --version   show the version",
            "  --debug     show the traceback of an error",
        ]
    )


def _summary(entry: EntryPoint) -> str:
    """Of a command that cannot be loaded, why: one broken command must not hide the others."""
    try:
        command: Command = entry.load()
        return command.summary
    except ModuleNotFoundError as e:
        if _is_left_out(entry, e):
            return "not part of this installation"
        extra = _missing_extra(entry, e)
        return f'needs pip install "logitcache[{extra}]"' if extra else f"cannot be loaded: {e}"
    except Exception as e:
        return printable(f"cannot be loaded: {type(e).__name__}: {e}")


def _is_left_out(entry: EntryPoint, error: ModuleNotFoundError) -> bool:
    """Whether the command's own package is not there: an image holds its role's packages only."""
    package = entry.module.split(".")[0]
    return package in _EXTRA_OF_PACKAGE and error.name == package


def _missing_extra(entry: EntryPoint, error: ModuleNotFoundError) -> str | None:
    """The extra that brings the module that was not found; None where the module is one of our own."""
    module = (error.name or "").split(".")[0]
    if not module or module.startswith("logitcache"):
        return None
    return _EXTRA_OF_MODULE.get(module) or _EXTRA_OF_PACKAGE.get(entry.module.split(".")[0])


def _entry_point(name: str, commands: Mapping[str, EntryPoint]) -> EntryPoint:
    if name in commands:
        return commands[name]
    import difflib

    near = difflib.get_close_matches(name, commands)
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise InputError(f"unknown command {name!r}; {meant}'logitcache --help' lists them all")


def _fail(speaker: str, message: str, status: int, debug: bool) -> int:
    if debug:
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
    print(printable(f"{speaker}: {message}"), file=sys.stderr)
    return status


def _version() -> str:
    try:
        return version("logitcache")
    except PackageNotFoundError:
        return str(_checkout().get("project", {}).get("version", "of an unknown version"))


def _checkout() -> dict[str, Any]:
    """The pyproject.toml of the checkout that this file stands in; empty where the package is installed."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    if not path.is_file():
        return {}
    import tomllib

    found = tomllib.loads(path.read_text(encoding="utf-8"))
    return found if found.get("project", {}).get("name") == "logitcache" else {}


def _print_any_text() -> None:
    """A terminal of a smaller character set gets escapes, never an exception."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
