"""`logitcache serve`: look at a cache in a browser."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from logitcache_storage.command import Command
from logitcache_storage.commands.arguments import add_cache_argument
from logitcache_storage.commands.second_store import add_second_options, second_options

DEFAULT_PORT = 8765


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache serve`."""
    parser.epilog = (
        "Reads the cache and never writes to it. Only this machine can open the pages, unless --host says otherwise;"
        " then whoever has the address that is printed, which holds a token, can. From another machine, without"
        " --host: ssh -L 8765:localhost:8765 MACHINE"
    )
    add_cache_argument(parser)
    parser.add_argument(
        "url_b",
        metavar="URL_B",
        nargs="?",
        help="a second cache of the same corpus, e.g. a student's, to set beside the first",
    )
    add_second_options(parser, "--storage-options-b", of="URL_B")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1)")
    parser.add_argument(
        "--port", metavar="N", type=_port, default=DEFAULT_PORT, help=f"default {DEFAULT_PORT}; 0 for any free one"
    )


def run(args: Namespace) -> int:
    """Serve until interrupted."""
    from logitcache_storage.cache import Cache
    from logitcache_storage.compare import check_same_ids
    from logitcache_storage.web.server import bind, serve
    from logitcache_storage.web.site import Site

    with bind(args.host, args.port) as listener:
        first, second = Cache.open(args.url, args.storage_options), None
        if args.url_b is not None:
            options = second_options(args.url, args.storage_options, args.url_b, args.storage_options_b)
            second = Cache.open(args.url_b, options)
            check_same_ids(first, second)
        serve(Site(first, second), listener, args.host)
    return 0


COMMAND = Command("look at a cache in a browser: samples, doubtful labels, targets", add_arguments, run)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return int(text)
