"""What several commands that write files have in common: files checked in time, statistics read with progress."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitcache_storage.cache import Cache
    from logitcache_storage.sample_statistics import SampleTable


def check_file(path: Path, option: str) -> None:
    """Refuse what cannot be written before anything is read.

    Raises:
        InputError: it is a folder, or there is no folder for it.
    """
    from logitcache_storage.errors import InputError

    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.absolute().parent}; make it, or choose another")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file that takes the place of `path` when the block has ended well; else nothing is left of it.

    A link, a pipe or a device (/dev/stdout) stays what it is, and is written to.

    Raises:
        InputError: it cannot be written.
    """
    from logitcache_storage.errors import InputError

    is_plain = not path.is_symlink() and (path.is_file() or not path.exists())
    part = path.with_name(f".{path.name}.{os.getpid()}") if is_plain else path
    try:
        yield part
        if is_plain:
            part.replace(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from e
    finally:
        if is_plain:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def read_statistics(cache: Cache) -> SampleTable:
    """Of all samples, as `sample_statistics.load_statistics` does, with progress."""
    from logitcache_storage.progress import progress
    from logitcache_storage.sample_statistics import load_statistics
    from logitcache_storage.stats import total

    with progress("reading statistics", total=total(cache.shards).num_rows, unit="rows") as meter:
        return load_statistics(cache, progress=lambda done, _: meter.advance(done - meter.completed))
