"""`logitcache demo`: the main job from end to end, on a toy that is made on the spot."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from logitcache_storage.command import Command


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache demo`."""
    parser.epilog = "About five minutes on two cores; the exit status is that of the command that failed, if one did."
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where its files stay (default: demo); an earlier demo there is replaced,"
        " a folder with anything else in it is refused",
    )
    parser.add_argument("--seed", type=int, default=0, help="another corpus and other models (default: 0)")
    parser.add_argument(
        "--unseen-style",
        action="store_true",
        help="write the corpus in a style that the teacher has never met: where asking the teacher misleads",
    )


def run(args: Namespace) -> int:
    """Run the demo; a failing step leaves by its own error."""
    from logitcache_storage.terminal import open_console
    from logitcache_train.demo.driver import Demo, run_demo

    run_demo(Demo(args.output, seed=args.seed, unseen_style=args.unseen_style), open_console())
    return 0


COMMAND = Command("make a toy corpus and models, run every command on them, print the results", add_arguments, run)
