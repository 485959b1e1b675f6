"""`logitcache objectives`: the table of training objectives, or one of them in full."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command

if TYPE_CHECKING:
    from logitcache_train.objectives import Objective


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this objective in full: formula, source, parameters, needs")


def _run(args: Namespace) -> int:
    from rich.console import Console

    from logitcache_train.objectives import OBJECTIVES, objective

    console = Console(highlight=False)
    if args.name is None:
        console.print(_overview(list(OBJECTIVES.values())))
        console.print("logitcache objectives NAME shows one in full.")
    else:
        for line in _describe(objective(args.name)):
            console.print(line, markup=False, soft_wrap=True)
    return 0


def _overview(rows: list[Objective]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from logitcache_train.objectives import ATOMS

    table = Table("objective", "loss", "atoms", "parameters", "needs")
    for row in rows:
        parameters = "\n".join(f"{name}={value:g}" for name, value in row.values.items())
        atoms = "\n".join(filter(row.has, ATOMS))
        table.add_row(row.name, Text(row.formula), atoms, parameters, "\n".join(_needs(row)))
    return table


def _describe(row: Objective) -> list[str]:
    from logitcache_train.objectives import ATOMS

    lines = [
        row.name,
        f"  loss        {row.formula}",
        f"  source      {row.source}",
        f"  atoms       {', '.join(filter(row.has, ATOMS))}",
        f"  needs       {', '.join(_needs(row)) or 'nothing but the corpus'}",
    ]
    if optional := _optional(row):
        lines.append(f"  may use     {', '.join(optional)}")
    for name, parameter in row.parameters.items():
        lines.append(f"  --{name} {parameter.default:g}  in {parameter.range}: {parameter.meaning}")
    return lines


def _needs(row: Objective) -> list[str]:
    return [f"{role} cache" for role in row.roles] + [f"column {name}" for name in row.columns]


def _optional(row: Objective) -> list[str]:
    return [f"{role} cache" for role in row.optional_roles] + [f"column {name}" for name in row.optional_columns]


COMMAND = Command(
    summary="list the training objectives, or show one: formula, source, parameters, what it needs",
    add_arguments=_add_arguments,
    run=_run,
)
