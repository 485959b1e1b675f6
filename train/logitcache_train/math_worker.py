"""Compares mathematical answers: a JSON request on each line of standard input, a verdict on each of standard output.

A script that `math_answers` runs in a process of its own, because an answer can keep sympy busy for hours within one
step of the interpreter (a power tower does), where no signal reaches it: such a process can only be ended from outside.

A request is a list of two lists of texts, for the reference and for the response: the first text of each that holds
mathematics counts. The verdict is true, false, or null where the reference holds none.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Sequence
from typing import Any

MEMORY_BYTES = 4 << 30
"""Of address space; an expression that wants more is no answer."""


def main() -> None:
    """Say whether a first comparison works, which loads what sympy loads late; then answer until the input ends."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    logging.disable(logging.CRITICAL)
    print(json.dumps(verdict(["$x^2 + 2x + 1$"], ["$(x + 1)^2$"])), flush=True)
    for line in sys.stdin:
        reference, response = json.loads(line)
        print(json.dumps(verdict(reference, response)), flush=True)


def verdict(reference: Sequence[str], response: Sequence[str]) -> bool | None:
    """Whether the response's mathematics is the reference's; None if the reference has none."""
    from math_verify import verify  # type: ignore[import-untyped]

    expected = _parse(reference)
    if not expected:
        return None
    # Without a time limit of its own: that is a signal, and whoever asked keeps the time.
    return bool(verify(expected, _parse(response), timeout_seconds=None))


def _parse(texts: Sequence[str]) -> list[Any]:
    """Expressions of the first text that has any."""
    from math_verify import parse

    for text in texts:
        expressions = parse(text, fallback_mode="no_fallback", parsing_timeout=None)
        if expressions:
            return list(expressions)
    return []


if __name__ == "__main__":
    main()
