"""Coefficients as text: arithmetic over what a coefficient may look at.

    1 - max(p_label, floor)          p_label ** alpha          p_label > threshold

A text is parsed by `ast` and turned into calls of the functions below; nothing of it is ever executed as Python,
and whatever is not listed here is refused by name. Every number becomes a tensor, so that a division by zero gives
an infinite coefficient, which the loss refuses by row, and no exception of its own.

This file imports no torch: the functions use the tensors' own methods.
"""

from __future__ import annotations

import ast
import functools
import keyword
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from logitcache_storage.errors import InputError

VALUES = {
    "p_label": "the student's probability of the observed token y",
    "log_p_label": "its logarithm",
    "p_rest": "1 - p_label, right also where p_label rounds to 1",
    "log_teacher_label": "log-prob of y in the teacher cache",
    "log_reference_label": "log-prob of y in the reference cache",
    "pooled": "the mean of the row's `pooled` over a sequence",
}
"""Names with a value at each position."""

LABEL_ROLES = {"log_teacher_label": "teacher", "log_reference_label": "reference"}
"""Names that read a cache, which must then be given."""

READERS = {
    "column": "a per-position column by its name in quotes, as in column('critical')",
    "top_k_entropy": "the entropy of the student's top k over log k, k a whole number, as in top_k_entropy(20)",
}
"""Functions that read what belongs to a position."""

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}

COMPARISONS: dict[type, Callable[..., Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _min(*values: Any) -> Any:
    return functools.reduce(lambda a, b: a.minimum(b), values)


def _max(*values: Any) -> Any:
    return functools.reduce(lambda a, b: a.maximum(b), values)


def _clamp(value: Any, low: Any, high: Any) -> Any:
    return value.maximum(low).minimum(high)


FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int | None]] = {
    "min": (_min, 2, None),
    "max": (_max, 2, None),
    "clamp": (_clamp, 3, 3),
    "exp": (operator.methodcaller("exp"), 1, 1),
    "log": (operator.methodcaller("log"), 1, 1),
    "abs": (operator.methodcaller("abs"), 1, 1),
}
"""Each function with its least and its largest number of arguments; clamp(x, low, high)."""

MAX_LENGTH = 1000

MAX_DEPTH = 100
"""Of operations within operations, and of terms of one sum."""

RESERVED = frozenset((*VALUES, *READERS, *FUNCTIONS))
"""Names that a parameter cannot have."""


@dataclass(frozen=True)
class Expression:
    """A coefficient as text; call it as the functions of the table: `expression(at, par)`."""

    text: str
    value: Callable[[Any, Any], Any] = field(repr=False, compare=False)
    label_roles: tuple[str, ...] = ()
    """Caches of which it reads the label's log-prob."""
    columns: tuple[str, ...] = ()
    """Columns that it reads."""
    is_pooled: bool = False
    """Whether it reads the row's pooled statistic."""

    def __call__(self, at: Any, par: Any) -> Any:
        """Its value at some positions, [N] or a scalar tensor."""
        return self.value(at, par)

    def __str__(self) -> str:
        return self.text


def parse_expression(text: str, parameters: Mapping[str, bool], *, what: str) -> Expression:
    """The expression behind a text.

    Args:
        text: at most `MAX_LENGTH` characters.
        parameters: the row's parameters, and whether each is a whole number.
        what: names the coefficient in errors.

    Raises:
        InputError: no arithmetic, or a name, a function or an operation that is not one of those above.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"{what} has {len(text)} characters, expected at most {MAX_LENGTH}")
    builder = _Builder(parameters, what)
    try:
        value = builder.build(ast.parse(text.strip(), mode="eval").body)
    except InputError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:  # all of them are the parser's
        raise InputError(f"{what}: {text!r} is no arithmetic expression ({e}), such as 1 - p_label") from e
    return Expression(text.strip(), value, tuple(builder.roles), tuple(builder.columns), builder.is_pooled)


class _Builder:
    """Turns a syntax tree into a function of (at, par), and notes what it reads."""

    def __init__(self, parameters: Mapping[str, bool], what: str) -> None:
        self._parameters, self._what, self._depth = parameters, what, 0
        self.roles: dict[str, None] = {}
        self.columns: dict[str, None] = {}
        self.is_pooled = False

    def build(self, node: ast.AST) -> Callable[[Any, Any], Any]:
        """The function of one node and those below it."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InputError(f"{self._what}: more than {MAX_DEPTH} operations are nested")
        value = self._build(node)
        self._depth -= 1
        return value

    def _build(self, node: ast.AST) -> Callable[[Any, Any], Any]:
        match node:
            case ast.Constant(value=bool()):
                raise self._refuse(node)
            case ast.Constant(value=int() | float() as number):
                return functools.partial(_number, self._float(number))
            case ast.Name(id=name):
                return self._name(name)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return functools.partial(_apply, OPERATORS[type(op)], (self.build(operand),))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return functools.partial(_apply, OPERATORS[type(op)], (self.build(left), self.build(right)))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
                return functools.partial(_compare, COMPARISONS[type(op)], self.build(left), self.build(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._call(name, args)
        raise self._refuse(node)

    def _name(self, name: str) -> Callable[[Any, Any], Any]:
        if name in self._parameters:
            return functools.partial(_parameter, name)
        if name not in VALUES:
            raise self._unknown(f"the name {name!r}")
        if name in LABEL_ROLES:
            self.roles[LABEL_ROLES[name]] = None
            return functools.partial(_label_log_prob, LABEL_ROLES[name])
        self.is_pooled |= name == "pooled"
        return functools.partial(_value, name)

    def _call(self, name: str, args: list[ast.expr]) -> Callable[[Any, Any], Any]:
        if name in READERS:
            return self._read(name, args)
        if name not in FUNCTIONS:
            raise self._unknown(f"the function {name!r}")
        function, least, most = FUNCTIONS[name]
        if not least <= len(args) <= (most or len(args)):
            raise InputError(
                f"{self._what}: {name} takes {least} argument{'s' * (least > 1)}{'' if most else ' or more'},"
                f" got {len(args)}"
            )
        return functools.partial(_apply, function, tuple(self.build(arg) for arg in args))

    def _read(self, name: str, args: list[ast.expr]) -> Callable[[Any, Any], Any]:
        match name, args:
            case "top_k_entropy", [ast.Constant(value=int() as k)] if k is not True and k >= 1:
                return functools.partial(_top_k_entropy, k)
            case "top_k_entropy", [ast.Name(id=parameter)] if self._parameters.get(parameter):
                return functools.partial(_top_k_entropy, parameter)
            case "column", [ast.Constant(value=str() as column)]:
                self.columns[column] = None
                return functools.partial(_column, column)
        raise InputError(f"{self._what}: {name} is {READERS[name]}; got {name}({', '.join(map(ast.unparse, args))})")

    def _float(self, number: int | float) -> float:
        try:
            return float(number)
        except OverflowError:
            raise InputError(f"{self._what}: a number is larger than 1e308") from None

    def _refuse(self, node: ast.AST) -> InputError:
        return self._unknown(f"{ast.unparse(node)!r}")

    def _unknown(self, found: str) -> InputError:
        names = ", ".join((*self._parameters, *VALUES))
        functions = ", ".join((*FUNCTIONS, *READERS))
        return InputError(
            f"{self._what}: {found} cannot be used; there are numbers, + - * / **, comparisons of two values, the"
            f" names {names}, and the functions {functions}"
        )


def check_parameter_name(name: Any, *, what: str) -> None:
    """Refuse a name that expressions cannot use.

    Raises:
        InputError: it is no identifier, or has another meaning.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
        reserved = ", ".join(sorted(RESERVED))
        raise InputError(f"{what}: a parameter's name must be a word other than {reserved}, got {name!r}")


def _number(number: float, at: Any, par: Any) -> Any:
    return at.log_p_label.new_full((), number)


def _parameter(name: str, at: Any, par: Any) -> Any:
    return at.log_p_label.new_full((), getattr(par, name))


def _value(name: str, at: Any, par: Any) -> Any:
    return getattr(at, name)


def _label_log_prob(role: str, at: Any, par: Any) -> Any:
    return at.label_log_prob(role)


def _column(name: str, at: Any, par: Any) -> Any:
    return at.column(name)


def _top_k_entropy(k: int | str, at: Any, par: Any) -> Any:
    return at.top_k_entropy(getattr(par, k) if isinstance(k, str) else k)


def _apply(function: Callable[..., Any], args: tuple[Callable[[Any, Any], Any], ...], at: Any, par: Any) -> Any:
    return function(*(arg(at, par) for arg in args))


def _compare(
    holds: Callable[..., Any], left: Callable[[Any, Any], Any], right: Callable[[Any, Any], Any], at: Any, par: Any
) -> Any:
    """1 where it holds, 0 where it does not; what is compared with a NaN is NaN, for the loss to refuse."""
    a, b = left(at, par), right(at, par)
    return holds(a, b).to(a.dtype).masked_fill((a != a) | (b != b), math.nan)
