"""The target explorer: what an objective would teach at one position, and how that moves with its parameters.

The mathematics are those of the losses: `logitcache_train.explorer`, found as a hook, because this package knows no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from logitcache_storage.cli import find_entry_points
from logitcache_storage.errors import CorruptionError, InputError, LogitCacheError
from logitcache_storage.inspect.data import token_data
from logitcache_storage.inspect.html import Series, distribution
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.visible import printable
from logitcache_storage.web.page import Page, Query, render, site_of
from logitcache_storage.web.site import Place, Site, sample_name

HOOKS = "logitcache.hooks"
REMEDY = 'The explorer computes with the losses themselves. Install what that takes: pip install "logitcache[train]"'

DEFAULT_OBJECTIVE = "target_sft"
TOKENS_BEFORE = 40
"""Of the text before the position."""
SLIDER_STEPS = 200
SIDES = {"first": "the first cache", "second": "the second cache"}
"""Where a distribution comes from; names in the URL."""


class Explorer(Protocol):
    """What `logitcache_train.explorer` offers."""

    def objectives(self) -> list[dict[str, Any]]:
        """The table of objectives."""
        ...

    def explore(
        self,
        name: str,
        parameters: Mapping[str, float],
        label: int,
        student: TopKLogProbs,
        caches: Mapping[str, TopKLogProbs],
        *,
        vocab_size: int,
        p_label: float | None,
        columns: Mapping[str, float],
        extrapolate: bool,
    ) -> dict[str, Any]:
        """Student, caches, residual, target and gradient at one position."""
        ...


@dataclass(frozen=True)
class Control:
    """A number that can be moved."""

    name: str
    title: str
    meaning: str
    value: float
    low: float
    high: float
    """Of the slider; a number that is typed may go beyond, as far as the objective lets it."""
    step: float
    given: str
    """What stands in the URL; empty where nothing does."""


@dataclass(frozen=True)
class Setting:
    """A position, an objective, and where the student comes from: everything the URL says."""

    place: Place
    other: Place | None
    """The same sample in the second cache."""
    row: int
    objective: dict[str, Any]
    sides: dict[str, str]
    """For `student` and each role, a name of `SIDES`."""
    parameters: dict[str, float]
    columns: dict[str, float]
    p_label: float | None
    second_problem: str
    """Why the second cache has nothing to say here, where it should."""

    @property
    def label(self) -> int:
        """The observed token."""
        return int(self.place.sample.labels[self.row])

    @property
    def beyond(self) -> list[str]:
        """Parameters outside their range that an objective takes there where it is told to extrapolate."""
        return [
            about["name"]
            for about in self.objective["parameters"]
            if about["extrapolates"] and not about["low"] <= self.parameters[about["name"]] <= about["high"]
        ]

    def side(self, name: str) -> TopKLogProbs:
        """The position in the cache that plays this part."""
        place = self.other if self.sides[name] == "second" else self.place
        assert place is not None
        return place.sample.topk[self.row : self.row + 1]


def show(request: Request) -> Response:
    """The page: position, controls, and what follows from them."""
    site = site_of(request)
    try:
        explorer = load_explorer()
    except LogitCacheError as e:
        return render(request, "explorer_missing.html", title="Target explorer", problem=str(e), remedy=REMEDY)
    try:
        setting = read_setting(request, explorer)
    except CorruptionError as e:
        return render(request, "explorer_damaged.html", title="Target explorer", problem=str(e))
    try:
        found, problem = evaluate(site, explorer, setting), ""
    except InputError as e:
        found, problem = None, str(e)
    sample = setting.place.sample
    position = int(sample.target_positions[setting.row])
    before = sample.input_ids[max(0, position - TOKENS_BEFORE) : position]
    return render(
        request,
        "explorer.html",
        title="Target explorer",
        setting=setting,
        name=sample_name(setting.place.index, sample.key),
        num_rows=len(sample.target_positions),
        position=position,
        before=printable(site.cache.vocabulary.decode(before.tolist())),
        is_cut=position > TOKENS_BEFORE,
        label=token_data(site.cache.vocabulary, setting.label),
        objectives=explorer.objectives(),
        roles=[role for role in setting.sides if role != "student"],
        titles=SIDES,
        controls=controls(request, setting, None if found is None else found["p_label"]),
        found=found,
        table=Markup() if found is None else found["table"],
        problem=problem,
    )


def show_target(request: Request) -> Response:
    """What follows from the URL alone, as JSON: numbers, and the table as it stands in the page."""
    try:
        explorer = load_explorer()
        return JSONResponse(evaluate(site_of(request), explorer, read_setting(request, explorer)))
    except HTTPException as e:
        return JSONResponse({"problem": e.detail}, e.status_code)
    except LogitCacheError as e:
        return JSONResponse({"problem": str(e)}, 400 if isinstance(e, InputError) else 500)


def load_explorer() -> Explorer:
    """The mathematics.

    Raises:
        LogitCacheError: they are not installed.
    """
    hook = find_entry_points(HOOKS).get("explore")
    if hook is None:
        raise LogitCacheError("logitcache_train is not installed")
    try:
        found: Explorer = hook.load()
    except ModuleNotFoundError as e:
        raise LogitCacheError(f"the package {e.name!r} is not installed") from e
    return found


def read_setting(request: Request, explorer: Explorer) -> Setting:
    """What the URL asks for; what it does not say is the first sample's most surprising position and `target_sft`.

    Raises:
        HTTPException: 404, there is no such sample.
        InputError: another value is wrong.
        CorruptionError: the sample is damaged.
    """
    site, query = site_of(request), Query(request)
    if not len(site.cache):
        raise HTTPException(404, "the cache has no committed sample yet")
    try:
        place = site.first.place(site.first.find(query.text("sample") or "0"))
    except InputError as e:
        raise HTTPException(404, str(e)) from e
    try:
        other, problem = site.counterpart(place), ""
    except LogitCacheError as e:  # what the first cache says is there all the same
        other, problem = None, str(e)
    topk = place.sample.topk
    row = query.optional_integer("row", high=len(topk) - 1)
    table = {row["name"]: row for row in explorer.objectives()}
    objective = table[query.choice("objective", list(table), DEFAULT_OBJECTIVE)]
    there = ["first"] if other is None else ["first", "second"]
    defaults = {"student": there[-1], "teacher": "first", "reference": there[-1]}
    roles = dict.fromkeys(["student", "teacher", *objective["roles"]])
    p_label = query.number("p_label", 0.0, low=-1e9, high=1e9) if query.text("p_label") else None
    return Setting(
        place=place,
        other=other,
        row=int(topk.label_log_prob.argmin()) if row is None else row,
        objective=objective,
        sides={role: query.choice(role, there, defaults[role]) for role in roles},
        parameters={
            about["name"]: query.number(about["name"], about["default"], low=-1e9, high=1e9)
            for about in objective["parameters"]
        },
        columns={name: query.number(name, 1.0, low=-1e9, high=1e9) for name in objective["columns"]},
        p_label=p_label,
        second_problem=problem,
    )


def evaluate(site: Site, explorer: Explorer, setting: Setting) -> dict[str, Any]:
    """The numbers of a setting, with `table`, their HTML.

    Raises:
        InputError: the objective refuses a value.
    """
    caches = [site.cache] if site.second is None else [site.cache, site.second.cache]
    roles = [role for role in setting.sides if role != "student"]
    found = explorer.explore(
        setting.objective["name"],
        setting.parameters,
        setting.label,
        setting.side("student"),
        {role: setting.side(role) for role in roles},
        vocab_size=max(cache.identity.vocab_size for cache in caches),
        p_label=setting.p_label,
        columns=setting.columns,
        extrapolate=bool(setting.beyond),
    )
    for outcome in found["outcomes"]:
        outcome["is_label"] = outcome["label"] == 1
        if outcome["token"] is not None:
            outcome["token"] = token_data(site.cache.vocabulary, outcome["token"])
    series = [
        Series("label", "label", "label"),
        Series("student", "student p", "second"),
        *(Series(role, role, "first") for role in roles if role in found["outcomes"][0]),
        *([Series("residual", "residual", "residual")] if found["outcomes"][0]["residual"] is not None else []),
        Series("target", "target Q", "target"),
        Series("gradient", "gradient p - Q", "gradient", is_signed=True),
    ]
    return {**found, "table": distribution(found["outcomes"], series, _in_words(found, setting.beyond))}


def controls(request: Request, setting: Setting, p_label: float | None) -> list[Control]:
    """What can be moved: the label's probability, the parameters and the columns of the objective."""
    given = request.query_params
    meaning = "the student's probability of the label; the other tokens keep their ratios"
    found = [
        _control("p_label", "p(label)", meaning, p_label if p_label is not None else 0.5, 0.001, 0.999, given, 0.001)
    ]
    for about in setting.objective["parameters"]:
        name, default = about["name"], about["default"]
        low = about["low"] if about["low"] is not None else -4 * abs(default)
        high = about["high"] if about["high"] is not None else max(1.0, 4 * default)
        step = 1.0 if about["integer"] else (high - low) / SLIDER_STEPS
        found.append(_control(name, name, about["meaning"], setting.parameters[name], low, high, given, step))
    for name, value in setting.columns.items():
        found.append(_control(name, name, f"the column {name!r} of the corpus", value, 0.0, 1.0, given, 0.05))
    return found


def _control(
    name: str, title: str, meaning: str, value: float, low: float, high: float, given: Mapping[str, str], step: float
) -> Control:
    return Control(name, title, meaning, value, low, high, step, given.get(name, ""))


def _in_words(found: Mapping[str, Any], beyond: Sequence[str]) -> str:
    parts = [f"{value:+.4g} {atom}" for atom, value in found["coefficients"].items() if abs(value) > 1e-9]
    mixture = " ".join(f"{part[0]} {part[1:]}" for part in parts).removeprefix("+ ")
    rest = "" if found["gamma"] < 1 - 1e-9 else ", so that there is no residual"
    needs = f"; {', '.join(beyond)} beyond its range, which training takes with --extrapolate" if beyond else ""
    return f"Q = {mixture}; the label's weight gamma is {found['gamma']:.4g}{rest}{needs}"


PAGE = Page("explorer", "Target explorer", (Route("/explorer", show), Route("/explorer/target", show_target)))
