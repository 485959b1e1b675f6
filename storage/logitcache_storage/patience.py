"""Waiting for a store that does not answer just now."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from logitcache_storage.errors import StoreUnavailableError

STORE_PATIENCE_SECONDS = 900.0
"""Builds and training runs wait so long for a store that is away: less than ranks wait for each other (30 minutes)."""

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0

_Result = TypeVar("_Result")


def patiently(
    action: Callable[[], _Result], *, seconds: float, on_pause: Callable[[StoreUnavailableError], None] | None = None
) -> _Result:
    """What `action` returns, repeated with pauses that double while the store is unavailable.

    Args:
        action: may be repeated; of two that both get through, the second changes nothing.
        seconds: after which no other try begins. What the client waits by itself counts.
        on_pause: told of each failure that is not the last.

    Raises:
        StoreUnavailableError: it still was after so long.
    """
    end, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except StoreUnavailableError as e:
            if time.monotonic() + pause > end:
                raise
            if on_pause is not None:
                on_pause(e)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
