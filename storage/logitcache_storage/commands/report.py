"""`logitcache report`: a cache in one HTML file."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument

if TYPE_CHECKING:
    from logitcache_storage.cache import Cache
    from logitcache_storage.sample_statistics import SampleTable


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache report`."""
    parser.epilog = (
        "The file loads nothing, so it can be mailed, attached to an issue, or kept with an experiment. It holds text"
        " of the corpus. Example: logitcache report s3://bucket/cache --output report.html"
    )
    add_cache_argument(parser)
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        type=Path,
        required=True,
        help="the file to write; one that is there is replaced",
    )
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write the plots as PNG files, too, into this folder")


def run(args: Namespace) -> int:
    """Write the report, and say where it is."""
    from logitcache_storage.cache import Cache
    from logitcache_storage.inspect.overview import overview
    from logitcache_storage.inspect.report import plots, report
    from logitcache_storage.terminal import format_bytes

    _check_output(args.output, args.plots)
    cache = Cache.open(args.url, args.storage_options)
    table = _statistics(cache)
    document = report(cache, table).encode("utf-8", "backslashreplace")
    _write(args.output, document)
    print(f"{args.output}: {format_bytes(len(document))}")
    if args.plots is not None:
        drawn = plots(overview(cache, table))
        for name, data in drawn.items():
            _write(args.plots / name, data)
        print(f"{args.plots}: {', '.join(drawn) or 'no plots, for there are no rows'}")
    return 0


COMMAND = Command("write a cache as one HTML file: overview, doubtful labels, examples", add_arguments, run)


def _statistics(cache: Cache) -> SampleTable:
    from logitcache_storage.progress import progress
    from logitcache_storage.sample_statistics import load_statistics

    with progress("reading statistics", unit="rows") as meter:

        def note(done: int, total: int) -> None:
            meter.set_total(total)
            meter.advance(done - meter.completed)

        return load_statistics(cache, progress=note)


def _check_output(path: Path, plots: Path | None) -> None:
    """Refuse what cannot be written before anything is read."""
    from logitcache_storage.errors import InputError

    if path.is_dir():
        raise InputError(f"--output {path} is a folder; give the name of a file in it, e.g. {path / 'report.html'}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.absolute().parent}")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise InputError(f"--plots {plots} is a file; give the name of a folder, which is made where there is none")


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it; a file that is there is replaced at once."""
    from logitcache_storage.errors import InputError

    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from e
