"""One message where several ranks meet the same error: what is wrong with the input is wrong for all of them."""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import socket
import time
from argparse import ArgumentParser
from typing import NoReturn

from logitcache_storage.errors import InputError

PATIENCE = 1.0
"""Seconds that ranks stay once they have met an error. A silent one: when one rank ends, torchrun ends all, and by then
the speaker must have spoken. The speaker: others may meet the error a little later, and find its name taken."""

_spoken: dict[str, socket.socket] = {}
"""What this process says, by name; a name is held until the process ends."""


def is_said_by_another(message: str) -> bool:
    """Whether another rank of this node says this very message; if not, it is for this one to say.

    A rank that meets an error alone is never silent, and any doubt means False: better twice than never.
    """
    if "LOCAL_RANK" not in os.environ:
        return False
    launcher = f"{os.getppid()}, port {os.environ.get('MASTER_PORT')}"
    name = hashlib.sha256(f"{launcher}: {message}".encode(errors="backslashreplace")).hexdigest()
    if name in _spoken:
        return False
    # A name in Linux's abstract namespace has one owner, and is free again once that process has ended, in any way.
    ours = None
    try:
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.bind(f"\0logitcache-{name}")
    except OSError as e:
        if ours is not None:
            ours.close()
        if e.errno != errno.EADDRINUSE:
            return False
        time.sleep(PATIENCE)
        return True
    _spoken[name] = ours
    atexit.register(time.sleep, PATIENCE)
    return False


def say_errors_once(parser: ArgumentParser) -> None:
    """What this parser refuses, it refuses in every rank: usage and error come from one of them."""
    say = parser.error

    def error(message: str) -> NoReturn:
        if is_said_by_another(message):
            parser.exit(InputError.exit_status)
        say(message)

    parser.error = error  # type: ignore[method-assign]
