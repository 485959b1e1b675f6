"""The options of a command's second URL: those of the first where nothing else is said."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from logitcache_storage.commands.arguments import storage_options


def add_second_options(parser: ArgumentParser, flag: str, *, of: str) -> None:
    """`--storage-options-...` of the second URL, as a dict or None, under the flag's name."""
    parser.add_argument(
        flag,
        metavar="JSON",
        type=storage_options,
        help=f"the same for {of}, where it needs others (default: those above, where both URLs begin alike)",
    )


def second_options(
    first_url: str, first: dict[str, Any] | None, second_url: str, second: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What the second URL is opened with: one provider's options mean nothing to another."""
    if second is not None:
        return second
    return first if _scheme(first_url) == _scheme(second_url) else None


def _scheme(url: str) -> str:
    return url.split("://", 1)[0] if "://" in url else "file"
