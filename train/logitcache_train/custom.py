"""An objective of one's own from a YAML mapping: a row of the table in plain data.

objective:
  name: floored_target
  label: max(p_label, floor)
  guided: 1 - max(p_label, floor)
  role: teacher
  parameters: {eta: 0.5, floor: {default: 0.05, low: 0, high: 1, meaning: the least weight of the label}}
"""

from __future__ import annotations

import math
import re
from argparse import SUPPRESS, ArgumentError, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from logitcache_storage.errors import InputError
from logitcache_train.objectives import ATOMS, BETA, ETA, OBJECTIVES, ROLES, Objective, Parameter

KEYS = ("name", "formula", "source", *ATOMS, "role", "pooled", "parameters")

KNOWN = {"eta": ETA, "beta": BETA}
"""Parameters of atoms, which need no range of their own."""


def objective_from_mapping(mapping: Mapping[str, Any]) -> Objective:
    """The objective that a mapping of `KEYS` describes.

    Coefficients (`ATOMS`) are numbers or texts as in `expressions.py`; which caches and columns they read follows
    from them. `role` is the cache behind `cached` and `guided`. `pooled` is a text whose mean over a sequence (the
    column `sequence`, where it is given) coefficients read as `pooled`. A parameter is a number, its default, or a
    mapping with `default` and any of `low`, `high`, `meaning` and `integer`; `eta` and `beta` are those of `guided`
    and `sharpened`, with their ranges. `formula` and `source` are for people.

    Raises:
        InputError: an unknown key, a name that is taken, no coefficient, or one that is none.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"an objective must be a mapping with {', '.join(KEYS)}, got {mapping!r}")
    if unknown := [key for key in mapping if key not in KEYS]:
        rest = "; the student takes what the others leave of one" if unknown[0] == "student" else ""
        raise InputError(f"an objective has no key {unknown[0]!r}; its keys: {', '.join(KEYS)}{rest}")
    name = _name(mapping)
    where = f"objective {name!r}"
    atoms: dict[str, Any] = {
        atom: _coefficient(mapping[atom], f"{atom} of {where}") for atom in ATOMS if mapping.get(atom) is not None
    }
    if not atoms:
        raise InputError(f"{where} has no coefficient; give at least one of {', '.join(ATOMS)}")
    if mapping.get("role") not in (None, *ROLES):
        raise InputError(f"role of {where} must be {' or '.join(ROLES)}, got {mapping['role']!r}")
    if not isinstance(mapping.get("pooled", ""), str):
        raise InputError(f"pooled of {where} must be an expression, got {mapping['pooled']!r}")
    parameters = mapping.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"parameters of {where} must be a mapping of names, got {parameters!r}")
    return Objective(
        name=name,
        formula=str(mapping.get("formula") or _formula(atoms)),
        source=str(mapping.get("source") or "a row of one's own"),
        **atoms,
        role=mapping.get("role"),
        pooled=mapping.get("pooled"),
        optional_columns=("sequence",) if "pooled" in mapping else (),
        parameters={key: _parameter(key, value, where) for key, value in parameters.items()},
    )


def read_objective(path: Path) -> Objective:
    """The objective of a YAML file: the mapping under its key `objective`, as in a configuration of `train`.

    Raises:
        InputError: the file cannot be read, or holds no such mapping; or as in `objective_from_mapping`.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path}: cannot be read as YAML: {e}") from e
    if not isinstance(values, Mapping) or not isinstance(values.get("objective"), Mapping):
        raise InputError(f"{path}: expected a mapping under the key 'objective', such as 'label: p_label'")
    return objective_from_mapping(values["objective"])


def read_parameters(names: Iterable[str], words: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Numbers for parameters of these names from a command line, `--name VALUE`; and the words that are left.

    Raises:
        InputError: a value that is missing or no number.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, type=float, default=SUPPRESS)
    try:
        found, rest = parser.parse_known_args(words)
    except ArgumentError as e:
        raise InputError(str(e)) from e
    return vars(found), rest


def _name(mapping: Mapping[str, Any]) -> str:
    name = mapping.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError(f"an objective needs a name of letters, digits and underscores, got {name!r}")
    if name in OBJECTIVES:
        raise InputError(f"objective {name!r} is a row of the table already; give yours another name")
    return name


def _coefficient(value: Any, what: str) -> float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{what} must be a number or an expression such as 1 - p_label, got {value!r}")
    return float(value)


def _formula(atoms: Mapping[str, float | str]) -> str:
    """The gradient, where nobody said what the loss is."""
    terms = [f"({value})" if isinstance(value, str) else f"{value:g}" for value in atoms.values()]
    return "with the gradient " + " + ".join(f"{c} (p - {atom})" for c, atom in zip(terms, atoms, strict=True))


def _parameter(name: str, value: Any, where: str) -> Parameter:
    what = f"parameter {name!r} of {where}"
    known = KNOWN.get(name, Parameter(0, -math.inf, math.inf, f"a parameter of {where}"))
    given = value if isinstance(value, Mapping) else {"default": value}
    names = [f.name for f in fields(Parameter) if f.name != "extrapolates"]
    if unknown := [key for key in given if key not in names]:
        raise InputError(f"{what} has no {unknown[0]!r}; there are {', '.join(names)}")
    if given.get("default") is None:
        raise InputError(f"{what} needs a default")
    low, high = (_number(given.get(key, getattr(known, key)), f"{key} of {what}") for key in ("low", "high"))
    if not low <= high:
        raise InputError(f"{what} has the empty range from {low:g} to {high:g}")
    return Parameter(
        default=_number(given["default"], f"default of {what}"),
        low=low,
        high=high,
        meaning=str(given.get("meaning", known.meaning)),
        integer=given.get("integer", False) is True,
        extrapolates=known.extrapolates,
    )


def _number(value: Any, what: str) -> float:
    """YAML takes 1e-3 for a text; a number is meant."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be a number, got {value!r}") from None
