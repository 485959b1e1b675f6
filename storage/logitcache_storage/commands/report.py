"""`logitcache report`: a cache in one HTML file."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache report`."""
    parser.epilog = (
        "The file loads nothing, so it can be mailed, attached to an issue, or kept with an experiment. It holds text"
        " of the corpus. Where a shard is damaged it says so, and the command ends with status 1. Example: logitcache"
        " report s3://bucket/cache --output report.html"
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
    """Write the report, and say where it is; status 1 where a shard could not be read."""
    from logitcache_storage.cache import Cache
    from logitcache_storage.commands.outputs import read_statistics
    from logitcache_storage.inspect.overview import overview
    from logitcache_storage.inspect.report import plots, report
    from logitcache_storage.terminal import format_bytes

    _check_output(args.output, args.plots)
    cache = Cache.open(args.url, args.storage_options)
    table = read_statistics(cache)
    found = report(cache, table)
    document = found.html.encode("utf-8", "backslashreplace")
    _write(args.output, document)
    print(f"{args.output}: {format_bytes(len(document))}")
    if args.plots is not None:
        drawn = plots(overview(cache, table))
        for name, data in drawn.items():
            _write(args.plots / name, data)
        print(f"{args.plots}: {', '.join(drawn) or 'no plots, for there are no rows'}")
    for problem in found.problems:
        print(f"logitcache report: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


COMMAND = Command("write a cache as one HTML file: overview, doubtful labels, examples", add_arguments, run)


def _check_output(path: Path, plots: Path | None) -> None:
    from logitcache_storage.commands.outputs import check_file
    from logitcache_storage.errors import InputError

    check_file(path, "--output")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise InputError(f"--plots {plots} is a file; give the name of a folder, which is made where there is none")


def _write(path: Path, data: bytes) -> None:
    from logitcache_storage.commands.outputs import replaced

    with replaced(path) as part:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
