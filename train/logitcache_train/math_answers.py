"""Answers compared as mathematics, by math-verify, in a process that is ended when it takes too long."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_train.answers import find_marked, is_exact, normalise

SECONDS = 5.0
"""For one comparison; most take milliseconds."""
START_SECONDS = 60.0
"""For the process to be ready."""
TAIL = 2000
"""Characters at the end of a text that are looked at: answers come last, and the parser is slow on long texts."""
PROSE_WORDS = 3
"""A reference that marks no answer and has so many words says it somewhere; with fewer it is one."""

_WORKER = Path(__file__).with_name("math_worker.py")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_MATHS = re.compile(r"[\d\\^=<>+*/|]")


class MathComparison:
    """Whether a response's answer and the reference's are the same mathematics.

    1/2, 0.5 and \\frac{1}{2} are; so are 1,000 and 1000, 5 cm and 5, x=3 and 3, (x+1)^2 and x^2+2x+1; a percentage is
    taken both ways (50% is 50 and 0.5); intervals and sets are compared as such. What has no mathematics in it, as the
    name of a city, is compared by `answers.is_exact`. Use it as a context manager.
    """

    def __init__(self, *, seconds: float = SECONDS) -> None:
        if find_spec("math_verify") is None:
            raise InputError(
                "--compare math needs the package math-verify, which is not installed;"
                ' run: pip install "logitcache[train]"'
            )
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        # Samples of one problem often give the same answer.
        self._ask_once = lru_cache(maxsize=256)(self._ask)

    def __call__(self, response: str, reference: str) -> bool | None:
        """Right or wrong, or None where that could not be found out in time or memory.

        Raises:
            LogitCacheError: the process does not start.
        """
        expected, found = find_marked(reference), find_marked(response)
        if not _MATHS.search(reference if expected is None else expected):
            return is_exact(response, reference)
        if expected is not None and found is not None and normalise(expected) == normalise(found):
            return True
        if expected is None and len(_WORD.findall(reference)) < PROSE_WORDS:
            expected = reference
        reply = self._ask_once(json.dumps([_texts(reference, expected), _texts(response, found)]))
        if reply is None:
            return None
        verdict: bool | None = json.loads(reply)
        return is_exact(response, reference) if verdict is None else verdict

    def __enter__(self) -> MathComparison:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _ask(self, request: str) -> str | None:
        """The reply, or None where there is none in time; then the process is ended, and the next request starts it."""
        if self._process is None:
            self._start()
        reply = self._exchange(request + "\n", self._seconds)
        if reply is None:
            self._end()
        return reply

    def _start(self) -> None:
        # Without the folder of the script on its path, whose modules have common names.
        words = [sys.executable, "-P", str(_WORKER)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self._exchange("", START_SECONDS) is None:
            self._end()
            raise LogitCacheError(
                f"the process that compares answers does not start; to see why, run: {' '.join(words)}"
            )

    def _exchange(self, request: str, seconds: float) -> str | None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        return self._process.stdout.readline() or None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _texts(text: str, answer: str | None) -> list[str]:
    """Where the worker looks for mathematics, in order: the answer as LaTeX and as it is, or the end of the text."""
    if answer is None:
        return [text[-TAIL:]]
    bare = answer[-TAIL:].strip().strip("$")
    return [f"\\boxed{{{bare}}}", bare]
