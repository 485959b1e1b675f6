"""What the rehearsal starts: commands that are shown, timed and bounded, and processes of which none is left behind."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
GRACE_SECONDS = 3
POLL_SECONDS = 0.2
TAIL_LINES = 60


class RehearsalError(Exception):
    """A step did not do what it should; the message says which, and holds what its command said."""


class Interrupted(BaseException):
    """A signal asked us to end, or the time is over."""

    def __init__(self, number: int) -> None:
        is_late = number == signal.SIGALRM
        super().__init__("it took too long" if is_late else f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 1 if is_late else 128 + number


class Running:
    """A process in the background, with all that it says in a file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self._log = name, process, log

    def said(self) -> str:
        """All of its output up to now."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Refuse to go on without it.

        Raises:
            RehearsalError: it has ended, and not with status 0.
        """
        if self.process.poll():
            raise RehearsalError(f"{self.name} ended with exit status {self.process.returncode}:\n{_tail(self.said())}")

    def wait(self, seconds: float) -> str:
        """Wait for it to end well; returns its output.

        Raises:
            RehearsalError: it has failed, or does not end in time.
        """
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired as e:
            raise RehearsalError(f"{self.name} did not end within {seconds:.0f} s:\n{_tail(self.said())}") from e
        self.check()
        return self.said()

    def kill(self) -> int:
        """End it and everything below it at once, as a lost machine would; returns how many processes that were."""
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for member in family:
            _signal(member, signal.SIGKILL)
        self.process.wait(GRACE_SECONDS)
        return len(family)


class Processes:
    """Everything that was started, and its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, name: str, command: Sequence[object], environment: Mapping[str, str]) -> Running:
        """Start a process of its own session, so that a Ctrl-C reaches only us, and we end it."""
        log = self._folder / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(word) for word in command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(name, process, log)

    def run(self, name: str, command: Sequence[object], environment: Mapping[str, str], seconds: float = 120) -> str:
        """Run a command to its end; returns its output.

        Raises:
            RehearsalError: it has failed, or does not end in time.
        """
        return self.start(name, command, environment).wait(seconds)


@contextmanager
def own_processes(seconds: int) -> Iterator[tuple[Processes, Path]]:
    """A folder of our own and the processes of a rehearsal: however the block is left, both are gone afterwards.

    Processes whose parent dies become our children, so that none is out of reach.

    Args:
        seconds: how long the block may take.

    Raises:
        Interrupted: a signal asked us to end, or the time is over.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    handlers = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    signal.alarm(seconds)
    # Short, because Ray's sockets are in it, and the path of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True) as folder:
        try:
            yield Processes(Path(folder)), Path(folder)
        finally:
            signal.alarm(0)
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)
            end_all()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_all() -> None:
    """End all that descends from this process: asked first, killed after a few seconds."""
    me = psutil.Process()
    for member in me.children(recursive=True):
        _signal(member, signal.SIGTERM)
    psutil.wait_procs(me.children(recursive=True), timeout=GRACE_SECONDS)
    while left := [member for member in me.children(recursive=True) if member.status() != psutil.STATUS_ZOMBIE]:
        for member in left:
            _signal(member, signal.SIGKILL)
        psutil.wait_procs(left, timeout=GRACE_SECONDS)


def wait_until(what: str, condition: Any, *, seconds: float, while_running: Sequence[Running] = ()) -> Any:
    """Wait for a condition to hold; returns what it returned.

    Raises:
        RehearsalError: it does not hold in time, or one of the processes has failed meanwhile.
    """
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        for running in while_running:
            running.check()
        if time.monotonic() > deadline:
            said = "\n".join(_tail(running.said()) for running in while_running)
            raise RehearsalError(f"waited {seconds:.0f} s for {what}, in vain\n{said}")
        time.sleep(POLL_SECONDS)


class Steps:
    """Numbered steps as lines for people, and how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Of each step that is done, by its title."""
        self._title = ""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and say how long it took.

        Raises:
            RehearsalError: whatever failed in it, with its title.
        """
        print(f"\n{len(self.seconds) + 1}. {title}", flush=True)
        start = time.perf_counter()
        try:
            yield
        except (RehearsalError, RuntimeError, OSError) as e:
            raise RehearsalError(f"step {len(self.seconds) + 1} failed: {title}\n{e}") from e
        self.seconds[title] = round(time.perf_counter() - start, 2)
        print(f"   took {self.seconds[title]:.1f} s", flush=True)

    @staticmethod
    def command(*words: object) -> None:
        """Show a command that is about to run."""
        print(f"   $ {shlex.join(str(word) for word in words)}", flush=True)

    @staticmethod
    def say(text: str | Sequence[str], last: int | None = None) -> None:
        """Show lines below the step; of many, the last few."""
        lines = text.splitlines() if isinstance(text, str) else list(text)
        for line in lines if last is None else lines[-last:]:
            if line.strip():
                print(f"   {line.rstrip()}", flush=True)


def without(names: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without variables whose names begin with one of these words."""
    return {name: value for name, value in environment.items() if not name.startswith(tuple(names.split()))}


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def fail(message: str) -> int:
    """Say on standard error what went wrong; returns the exit status."""
    print(f"\nrehearsal: {message}", file=sys.stderr, flush=True)
    return 1
