"""Runs `logitcache` commands as a user would: as processes, shown before they run, timed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from logitcache_storage.errors import LogitCacheError
from logitcache_storage.terminal import format_duration


class StepError(LogitCacheError):
    """A command of the demo failed; it has printed why, and its exit status becomes the demo's."""

    def __init__(self, command: str, status: int) -> None:
        super().__init__(f"stopped: '{command}' ended with exit status {status}; what it said stands above")
        self.exit_status = status


class Steps:
    """The parts of a demo, in the order they ran."""

    def __init__(self, console: Console, environment: Mapping[str, str] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds of each part, by its title."""
        self._console = console
        self._unsaid = dict(environment or {})
        self._environment = {**os.environ, **self._unsaid}

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Announce a part and keep how long it took."""
        self._console.print(Text(f"\n{len(self.seconds) + 1}. {title}", style="bold"), soft_wrap=True)
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start
        self._console.print(Text(f"   took {format_duration(self.seconds[title])}", style="dim"))

    def command(self, *arguments: object) -> None:
        """Show `logitcache ARGUMENTS`, run it, and let its output through.

        Raises:
            StepError: its exit status is not 0.
        """
        self._run(arguments, capture=False)

    def output_of(self, *arguments: object) -> str:
        """The same, but its standard output is returned instead of shown."""
        return self._run(arguments, capture=True)

    def _run(self, arguments: tuple[object, ...], *, capture: bool) -> str:
        words = [str(argument) for argument in arguments]
        shown = shell_line(words)
        while self._unsaid:
            self._show(shlex.join(["export", "=".join(self._unsaid.popitem())]))
        self._show(shown)
        stdout = subprocess.PIPE if capture else None
        done = subprocess.run(
            [*_program(), *words], stdout=stdout, env=self._environment, text=True, encoding="utf-8", check=False
        )
        if done.returncode:
            if done.stdout:
                print(done.stdout, end="", flush=True)
            # A process that died of signal n has return code -n; a shell says 128 + n.
            raise StepError(shown, done.returncode if done.returncode > 0 else 128 - done.returncode)
        return done.stdout or ""

    def _show(self, line: str) -> None:
        self._console.print(Text(f"$ {line}", style="cyan"), soft_wrap=True)
        sys.stdout.flush()


def shell_line(words: list[str]) -> str:
    """The command as it can be pasted into a shell in this folder."""
    return shlex.join([*_shown_program(), *words])


def _script() -> Path:
    return Path(sys.executable).parent / "logitcache"


def _program() -> list[str]:
    return [str(_script())] if _script().is_file() else [sys.executable, "-m", "logitcache_storage.cli"]


def _shown_program() -> list[str]:
    """As short as it can be and still work: the bare name where the shell finds this very script by it."""
    found = shutil.which("logitcache")
    if found is not None and Path(found) == _script():
        return ["logitcache"]
    first, *rest = _program()
    here = Path.cwd()
    return [str(Path(first).relative_to(here)) if Path(first).is_relative_to(here) else first, *rest]
