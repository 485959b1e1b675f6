"""What a sub-command of `logitcache` is: a summary, its arguments, and what it does."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One sub-command, registered under the entry-point group `logitcache.commands`.

    The module that defines it must import nothing heavy: its summary is read by `logitcache --help`.
    """

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    """Returns the exit status: 0 done, 1 the work failed or a check found damage."""
    takes_rest: bool = False
    """Whether arguments this parser does not know are handed to `run` as `args.rest`."""
