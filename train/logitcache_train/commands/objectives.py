"""`logitcache objectives`: the table of training objectives, one of them in full, or its curves as a picture."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache_storage.command import Command
from logitcache_storage.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from logitcache_storage.terminal import Facts
    from logitcache_train.objectives import Objective

FOOT = """\
The gradient at the logits is the sum of coefficient * (p - atom) over the
atoms of a row; p_label is the student's probability of the observed token.
logitcache objectives NAME shows one in full, --plot FILE draws what it teaches."""


def _add_arguments(parser: ArgumentParser) -> None:
    from logitcache_train.commands.train import parameter_names

    parser.add_argument(
        "name",
        nargs="?",
        help="show this objective in full: formula, source, coefficients, parameters, needs; or FILE.yaml,"
        " a configuration with a row of your own, whose own parameters are options, too",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw its induced target and gradient over p_y, as FILE.png, .svg or .pdf",
    )
    parser.add_argument("--extrapolate", action="store_true", help="let eta leave [0, 1]")
    group = parser.add_argument_group("parameters (defaults: their papers')")
    for name in parameter_names():
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), type=float, metavar="F")


def _run(args: Namespace) -> int:
    from logitcache_storage.terminal import facts_table, open_console, show
    from logitcache_train.commands.train import parameter_names
    from logitcache_train.custom import read_parameters
    from logitcache_train.objectives import OBJECTIVES

    values = {name: getattr(args, name) for name in parameter_names() if getattr(args, name) is not None}
    if args.name is None:
        given = [f"--{name}" for name in (*values, *(n for n in ("plot", "extrapolate") if getattr(args, n)))]
        if given := [*given, *args.rest]:
            raise InputError(f"{given[0]} is for one objective; say which, as in logitcache objectives target_sft")
        show(open_console(), _overview(list(OBJECTIVES.values())), FOOT)
        return 0
    row = _find(args.name)
    own, rest = read_parameters(row.parameters.keys() - set(parameter_names()), args.rest)
    if rest:
        known = ", ".join(f"--{name}" for name in row.parameters) or "none"
        raise InputError(f"unknown argument {rest[0]}; parameters of objective {row.name!r}: {known}")
    row = row.with_parameters(extrapolate=args.extrapolate, **values, **own)
    if args.plot is None:
        show(open_console(), row.name, facts_table(_facts(row)))
        return 0
    from logitcache_train.plot import draw_objective

    draw_objective(row, args.plot)
    print(f"written to {args.plot}")
    return 0


def _find(name: str) -> Objective:
    from logitcache_train.custom import read_objective
    from logitcache_train.objectives import objective

    return read_objective(Path(name)) if name.endswith((".yaml", ".yml")) else objective(name)


def _overview(rows: list[Objective]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("objective", "coefficient of each atom", "parameters", "needs"):
        table.add_column(heading, no_wrap=heading in ("objective", "parameters"))
    for row in rows:
        coefficients = "\n".join(f"{atom}: {text}" for atom, text in _coefficients(row))
        parameters = "\n".join(f"{name} {value:g}" for name, value in row.values.items())
        table.add_row(row.name, Text(coefficients), parameters, "\n".join(_needs(row)))
    return table


def _facts(row: Objective) -> Facts:
    """A row in full, with the values its parameters have."""
    facts = [("loss", row.formula), ("source", row.source), *_coefficients(row)]
    if row.pooled is not None:
        facts.append(("pooled", f"mean by the column {row.pool_by!r} of {_text(row.pooled)}"))
    facts.append(("needs", ", ".join(_needs(row)) or "nothing but the corpus"))
    optional = [f"{role} cache" for role in row.optional_roles] + [f"column {name}" for name in row.optional_columns]
    if optional:
        facts.append(("may use", ", ".join(optional)))
    for name, parameter in row.parameters.items():
        beyond = ", beyond with --extrapolate" if parameter.extrapolates else ""
        facts.append((f"--{name}", f"{row.values[name]:g}, in {parameter.range}{beyond}: {parameter.meaning}"))
    return facts


def _coefficients(row: Objective) -> Facts:
    from logitcache_train.objectives import ATOMS

    return [(atom, _text(getattr(row, atom))) for atom in ATOMS if row.has(atom)]


def _text(coefficient: object) -> str:
    """A number, an expression, or what a function says of itself."""
    from logitcache_train.expressions import Expression

    if isinstance(coefficient, int | float):
        return f"{coefficient:g}"
    return coefficient.text if isinstance(coefficient, Expression) else str(coefficient.__doc__ or "a function")


def _needs(row: Objective) -> list[str]:
    return [f"{role} cache" for role in row.roles] + [f"column {name}" for name in row.columns]


COMMAND = Command(
    summary="list the training objectives, show one (formula, source, parameters, needs), or draw what it teaches",
    add_arguments=_add_arguments,
    run=_run,
    takes_rest=True,
)
