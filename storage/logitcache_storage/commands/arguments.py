"""Arguments that commands share: the URL of a cache and how to reach it, numbers of things, ranges of rows."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import Any


def add_cache_argument(parser: ArgumentParser, *names: str, help: str = "where the cache is") -> None:
    """The URL of a cache, with `--storage-options`.

    Args:
        names: of the argument: positional `url` where none is given, or e.g. "--cache".
        help: what stands beside it.
    """
    text = f"{help}: a folder, or any URL that fsspec knows (s3://bucket/cache)"
    if names:
        parser.add_argument(*names, metavar="URL", required=True, help=text)
    else:
        parser.add_argument("url", metavar="URL", help=text)
    add_storage_options(parser)


def add_storage_options(parser: ArgumentParser) -> None:
    """`--storage-options JSON`, parsed to a dict or None."""
    parser.add_argument(
        "--storage-options",
        metavar="JSON",
        type=storage_options,
        help='options for the file system behind the URL, e.g. \'{"endpoint_url": "http://localhost:9000"}\';'
        " secrets are safer in the environment variables that it reads",
    )


def storage_options(text: str) -> dict[str, Any]:
    """A JSON object; its values are never repeated in an error."""
    try:
        value = json.loads(text)
    except ValueError as e:
        raise ArgumentTypeError(f"not JSON: {e}; write an object like '{{\"anon\": true}}'") from e
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"expected a JSON object like '{{\"anon\": true}}', found a {type(value).__name__}")
    return value


def count_of(noun: str) -> Callable[[str], int]:
    """The type of an argument that is a number of something, 0 or more; `noun` is the plural, for the error."""

    def count(text: str) -> int:
        if not text.isdecimal():
            raise ArgumentTypeError(f"expected a number of {noun}, 0 or more, found {text!r}")
        return int(text)

    return count


def row_range(text: str) -> slice:
    """`A:B`, `A:`, `:B` or `A` as a slice of rows counted from 0."""
    found = re.fullmatch(r"(\d*):(\d*)|(\d+)", text)
    if found is None:
        raise ArgumentTypeError(f"expected A:B with A and B counted from 0, found {text!r}")
    if found[3]:
        return slice(int(found[3]), int(found[3]) + 1)
    rows = slice(int(found[1] or 0), int(found[2]) if found[2] else None)
    if rows.stop is not None and rows.stop <= rows.start:
        raise ArgumentTypeError(f"{text!r} is empty: B must be above A")
    return rows
