"""The table of training objectives: each is a row of coefficients over a few atoms, and nothing else.

    g = sum_j c_j (p - atom_j)     the loss's gradient at the logits; coefficients and atoms are detached
    Q = p - g                      the target the student is driven towards

The atoms are distributions over the vocabulary: `label` (one-hot at the observed token y), `cached` (a
teacher or a reference, from a cache), `guided` (proportional to p^(1-eta) cached^eta), `uniform`, `sharpened`
(softmax(z / beta)), and the student itself, which takes the remainder 1 - sum_j c_j and pulls nowhere.
`train/OBJECTIVES.md` has the mathematics; the view is that of "A Unifying Lens on Supervised Fine-Tuning
Through Target Distribution Design" (Xie et al. 2026, arXiv 2606.11189).

A coefficient is a number, an arithmetic expression over what `expressions.py` lists, or a Python function
`(at, par)` of some target positions (`positions.Positions`) and of the row's parameters. This file imports no
torch: functions use the tensors' own methods.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from logitcache_storage.errors import InputError
from logitcache_train.expressions import check_parameter_name, parse_expression

ROLES = ("teacher", "reference")
"""What a cache can be to a training run."""

ATOMS = ("label", "cached", "guided", "uniform", "sharpened")
"""The atoms that have a coefficient, in the order of the table's columns."""

Coefficient = float | str | Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Parameter:
    """A number a user may set: its default, its closed range, and what it is."""

    default: float
    low: float
    high: float
    meaning: str
    integer: bool = False
    extrapolates: bool = False
    """Whether `extrapolate` lifts the range, because the mathematics goes on beyond it."""

    def check(self, value: Any, *, what: str, extrapolate: bool = False) -> float:
        """The value as a number, or an `InputError` that names `what` and the range."""
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        inside = number and (self.low <= value <= self.high or (extrapolate and self.extrapolates))
        if not inside or (self.integer and value != int(value)):
            kind = "an integer" if self.integer else "a number"
            beyond = "; extrapolate=True (--extrapolate) lifts the range" if number and self.extrapolates else ""
            raise InputError(f"{what} must be {kind} in {self.range}, got {value!r}; it is {self.meaning}{beyond}")
        return int(value) if self.integer else float(value)

    @property
    def range(self) -> str:
        """The closed range as text, e.g. `[0, 1]` or `[0, inf)`."""
        low = "(-inf" if self.low == -math.inf else f"[{self.low:g}"
        return f"{low}, inf)" if self.high == math.inf else f"{low}, {self.high:g}]"


@dataclass(frozen=True, eq=False)
class Objective:
    """One row of the table, with the values of its parameters.

    A new objective is a new row: give the coefficients of its atoms, the role of the cache behind `cached`
    and `guided` if it has one of them, and its parameters. `OBJECTIVES[row.name] = row` makes it known.
    Coefficients given as text become `Expression`s, and the roles and columns they read are declared by that.
    """

    name: str
    formula: str
    """The loss as it is usually written; sg() is stop-gradient."""
    source: str
    label: Coefficient = 0.0
    cached: Coefficient = 0.0
    guided: Coefficient = 0.0
    uniform: Coefficient = 0.0
    sharpened: Coefficient = 0.0
    role: str | None = None
    """The cache behind the atoms `cached` and `guided`: `teacher` or `reference`."""
    label_roles: tuple[str, ...] = ()
    """Caches of which a coefficient reads the label's log-prob."""
    optional_roles: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """Per-position columns that a coefficient reads."""
    optional_columns: tuple[str, ...] = ()
    pooled: str | Callable[[Any, Any], Any] | None = None
    """A per-position statistic whose mean over positions of equal `pool_by` is `at.pooled`."""
    pool_by: str = "sequence"
    """The column that says which positions belong together; where it is not given each stands alone."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    """Values of the parameters; those not given take their default."""
    extrapolate: bool = False
    """Whether values may lie outside the range of parameters that extrapolate (`eta`)."""

    def __post_init__(self) -> None:
        where = f"objective {self.name!r}"
        if unknown := sorted(self.values.keys() - self.parameters.keys()):
            known = ", ".join(self.parameters) or "none"
            raise InputError(f"{where} has no parameter {unknown[0]!r}; its parameters: {known}")
        if self.extrapolate and not any(parameter.extrapolates for parameter in self.parameters.values()):
            raise InputError(f"{where} has no parameter that extrapolates; leave extrapolate out")
        values = {}
        for name, parameter in self.parameters.items():
            check_parameter_name(name, what=where)
            value = self.values.get(name, parameter.default)
            values[name] = parameter.check(value, what=f"{name} of {where}", extrapolate=self.extrapolate)
        object.__setattr__(self, "values", values)
        self._parse_expressions(where)
        for atom, needed in (("guided", "eta"), ("sharpened", "beta")):
            if self.has(atom) and needed not in values:
                raise InputError(f"{where} uses the atom {atom!r} and must have a parameter {needed!r}")
        if (self.has("cached") or self.has("guided")) and self.role is None:
            raise InputError(f"{where} uses a cached distribution and must say whose, e.g. role='teacher'")
        if self.pooled is not None and self.pool_by not in (*self.columns, *self.optional_columns):
            raise InputError(f"{where} pools by the column {self.pool_by!r} and must declare it in its columns")

    def _parse_expressions(self, where: str) -> None:
        whole = {name: parameter.integer for name, parameter in self.parameters.items()}
        for name in (*ATOMS, "pooled"):
            if isinstance(text := getattr(self, name), str):
                expression = parse_expression(text, whole, what=f"{name} of {where}")
                object.__setattr__(self, name, expression)
                object.__setattr__(self, "label_roles", _union(self.label_roles, expression.label_roles))
                object.__setattr__(self, "columns", _union(self.columns, expression.columns))
                if expression.is_pooled and (self.pooled is None or name == "pooled"):
                    raise InputError(f"{name} of {where} reads 'pooled', and the row does not say what is pooled")

    def with_parameters(self, *, extrapolate: bool | None = None, **parameters: float) -> Objective:
        """The same row with other values; `extrapolate` as it was where not given.

        Raises:
            InputError: an unknown parameter, or a value outside its range.
        """
        beyond = self.extrapolate if extrapolate is None else extrapolate
        return dataclasses.replace(self, values={**self.values, **parameters}, extrapolate=beyond)

    def has(self, atom: str) -> bool:
        """Whether the row has a coefficient for this atom."""
        coefficient = getattr(self, atom)
        return callable(coefficient) or coefficient != 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Every cache role that must be given."""
        first = () if self.role is None else (self.role,)
        return first + tuple(role for role in self.label_roles if role != self.role)

    @property
    def par(self) -> SimpleNamespace:
        """The values as attributes: the second argument of coefficients."""
        return SimpleNamespace(**self.values)


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def objective(name: str, *, extrapolate: bool = False, **parameters: float) -> Objective:
    """The objective of this name, with these parameters and the defaults for the others.

    `extrapolate` lets `eta` leave [0, 1]: beyond 1 the residual goes on past the teacher, away from the student;
    below 0, away from the teacher. Tokens that then have infinite weight are an error of the loss, by row.

    Raises:
        InputError: an unknown name or parameter, or a value outside its range.
    """
    if name not in OBJECTIVES:
        raise InputError(f"unknown objective {name!r}; choose from {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name].with_parameters(extrapolate=extrapolate, **parameters)


def _log_ratio_to_reference(at: Any, par: Any) -> Any:
    """log q_y - log reference_y."""
    log_q = at.label_log_prob("teacher") if at.has_cache("teacher") else at.log_p_label
    return log_q - at.label_log_prob("reference")


KL_WEIGHT = Parameter(0.1, 0, math.inf, "the weight lambda of the KL term")
ETA = Parameter(0.5, 0, 1, "the teacher's say in the residual; 0 is the student's own", extrapolates=True)
BETA = Parameter(0.7, 1e-3, math.inf, "the temperature of the sharpened student")

_TABLE = (
    Objective(
        "sft", "-log p_y",
        "maximum likelihood",
        label=1.0,
    ),
    Objective(
        "dft", "-sg(p_y) log p_y",
        "Wu et al. 2025, arXiv 2508.05629",
        label="p_label",
    ),
    Objective(
        "prob_power", "(1 - p_y^alpha) / alpha",
        "Li et al. 2025, arXiv 2510.00526",
        label="exp(alpha * log_p_label)",
        parameters={"alpha": Parameter(1.0, 0, math.inf, "the power; 0 is sft, 1 is dft")},
    ),
    Objective(
        "profit", "-1[p_y > threshold] log p_y",
        "Liu et al. 2026, arXiv 2601.09195",
        label="p_label > threshold",
        parameters={"threshold": Parameter(0.1, 0, 1, "the p_y at or below which a label is left out")},
    ),
    Objective(
        "eaft", "-sg(H_k / log k) log p_y, H_k the entropy of the renormalised top-k of p",
        "EAFT 2026, arXiv 2601.02151",
        label="top_k_entropy(entropy_k)",
        parameters={"entropy_k": Parameter(20, 2, math.inf, "how many tokens H_k looks at", integer=True)},
    ),
    Objective(
        "iw_sft", "-w log p_y, w = clip(exp(mean over a sequence of log q_y - log reference_y)); "
        "q is the teacher cache if given, else sg(p)",
        "Qin and Springenberg 2025, arXiv 2507.12856",
        label="clamp(exp(pooled), clip_low, clip_high)",
        label_roles=("reference",), optional_roles=("teacher",), optional_columns=("sequence",),
        pooled=_log_ratio_to_reference,
        parameters={
            "clip_low": Parameter(0.2, 0, 1, "the smallest weight"),
            "clip_high": Parameter(1.8, 1, math.inf, "the largest weight"),
        },
    ),
    Objective(
        "critical_tokens", "-c log p_y, c the column 'critical' (0 or 1)",
        "Ruan et al. 2025, arXiv 2510.10974",
        label="column('critical')",
    ),
    Objective(
        "label_smoothing", "-(1 - smoothing) log p_y - smoothing / V sum_a log p_a",
        "Szegedy et al. 2016, arXiv 1512.00567",
        label="1 - smoothing",
        uniform="smoothing",
        parameters={"smoothing": Parameter(0.1, 0, 1, "the share of the uniform distribution")},
    ),
    Objective(
        "kl_sft", "-log p_y + weight KL(reference, p)",
        "maximum likelihood, held to a frozen reference",
        label=1.0,
        cached="weight",
        role="reference",
        parameters={"weight": KL_WEIGHT},
    ),
    Objective(
        "asft", "-sg(p_y) log p_y + weight KL(reference, p)",
        "Zhu et al. 2025, arXiv 2509.23753",
        label="p_label",
        cached="weight",
        role="reference",
        parameters={"weight": KL_WEIGHT},
    ),
    Objective(
        "psft", "-min(r, clip(r, 1 - clip_low, 1 + clip_high)), r = p_y / reference_y",
        "Zhu et al. 2025, arXiv 2508.17784",
        # The gradient is that of -r up to 1 + clip_high and zero above; min keeps the zero from meeting an infinite r.
        label="exp(min(log_p_label - log_reference_label, log(1 + clip_high)))"
        " * (log_p_label - log_reference_label <= log(1 + clip_high))",
        parameters={
            "clip_low": Parameter(0.2, 0, 1, "the lower clip, on which the gradient does not depend"),
            "clip_high": Parameter(0.28, 0, math.inf, "the upper clip: labels with r above it are left out"),
        },
    ),
    Objective(
        "gem", "-log p_y + sum_a sg(softmax(z / beta)_a) log p_a",
        "Li et al. 2024, arXiv 2408.16673",
        label=1.0,
        sharpened=-1.0,
        parameters={"beta": BETA},
    ),
    Objective(
        "kd", "-sum_a teacher_a log p_a",
        "Hinton et al. 2015, arXiv 1503.02531",
        cached=1.0,
        role="teacher",
    ),
    Objective(
        "kd_hybrid", "-(1 - weight) log p_y - weight sum_a teacher_a log p_a",
        "Hinton et al. 2015, arXiv 1503.02531",
        label="1 - weight",
        cached="weight",
        role="teacher",
        parameters={"weight": Parameter(0.5, 0, 1, "the share of the teacher")},
    ),
    Objective(
        "target_sft", "-sum_a sg(Q_a) log p_a, Q = p_y label + (1 - p_y) guided",
        "Xie et al. 2026, arXiv 2606.11189",
        label="p_label",
        guided="p_rest",
        role="teacher",
        parameters={"eta": ETA},
    ),
)  # fmt: skip

OBJECTIVES: dict[str, Objective] = {row.name: row for row in _TABLE}
"""Every known objective by name, with default parameters; look one up with `objective(name)`."""
