"""What the demo prints at its end: the table as it came out, and sentences that say no more than it does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from logitcache_storage.terminal import format_duration


@dataclass(frozen=True)
class Score:
    """How one model did on the held-out problems; accuracies in percent."""

    name: str
    average: float
    """Share of right answers among all samples (Average@n)."""
    standard_error: float
    """Of `average`, over problems, in points."""
    greedy: float
    learning_rate: float | None = None
    train_seconds: float | None = None
    """Wall-clock seconds of the whole `logitcache train`; None where nothing was trained from the cache."""


def score_table(scores: Sequence[Score], *, num_samples: int, temperature: float) -> Table:
    """One row a model."""
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("model")
    for name in ("learning rate", f"Average@{num_samples}, T={temperature:g}", "greedy", "train seconds"):
        table.add_column(name, justify="right")
    for s in scores:
        table.add_row(
            s.name,
            "" if s.learning_rate is None else f"{s.learning_rate:g}",
            f"{s.average:.1f} +- {s.standard_error:.1f}",
            f"{s.greedy:.1f}",
            "" if s.train_seconds is None else f"{s.train_seconds:.0f}",
        )
    return table


def seconds_table(seconds: Mapping[str, float]) -> Table:
    """How long each part took, and all of them."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for title, value in seconds.items():
        table.add_row(title, format_duration(value))
    table.add_row("in all", format_duration(sum(seconds.values())))
    return table


def findings(base: Score, students: Sequence[Score]) -> list[str]:
    """What the numbers of this run say, in sentences; at least two students are needed."""
    best, second = sorted(students, key=lambda s: s.average, reverse=True)[:2]
    margin = best.average - second.average
    error = math.hypot(best.standard_error, second.standard_error)
    weight = "more than" if margin > 2 * error else "which is within"
    greedy = max(s.greedy for s in students)
    greediest = _names(s for s in students if s.greedy == greedy)
    sentences = [
        f"Highest student when sampled: {best.name} at {best.average:.1f}, {margin:.1f} points above {second.name},"
        f" {weight} two standard errors of the difference ({2 * error:.1f}).",
        f"Highest student when decoded greedily: {greediest} at {greedy:.1f}.",
    ]
    below = [s for s in students if s.average < base.average]
    if below:
        sentences.append(f"Below the base model when sampled ({base.average:.1f}): {_names(below)}.")
    target = next((s for s in students if s.name == "target_sft"), None)
    if target is not None:
        others = [f"{target.average - s.average:+.1f} against {s.name}" for s in students if s is not target]
        sentences.append(f"target_sft when sampled: {', '.join(others)} (points).")
    return sentences


def caveats(*, num_parameters: int, num_problems: int, unseen_style: bool) -> list[str]:
    """What the numbers do not say."""
    if unseen_style:
        teacher = "Here the corpus is in a style that it has never met; its own score above is in its own style."
    else:
        teacher = "'logitcache demo --unseen-style' shows a corpus in a style that it has never met."
    return [
        f"These are toys of {num_parameters / 1e6:.2f}M parameters, one seed, and one learning rate a method,"
        " fixed beforehand: no replication of the paper.",
        f"The errors come from sampling on {num_problems} problems; the spread between seeds is not in them.",
        f"The teacher must be competent on the prefixes in the corpus, or its targets mislead. {teacher}",
    ]


def _names(scores: Iterable[Score]) -> str:
    return ", ".join(s.name for s in scores)
