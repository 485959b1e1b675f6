"""The curves of an objective as a picture: induced target on the left, gradient on the right, SFT in grey."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from logitcache_storage.errors import InputError
from logitcache_train.curves import SITUATION, TOKENS, curves
from logitcache_train.objectives import Objective, objective

SUFFIXES = (".png", ".svg", ".pdf")

COLOURS = ("#1b2a49", "#d1495b", "#2a9d8f", "#e9a03b")
"""One for each of `TOKENS`."""

SFT_COLOUR = "#a0a0a0"

JUMP = 0.08
"""A step larger than this between two points is a jump (at a threshold or a clip) and leaves a gap in the line."""


def check_picture(path: Path) -> None:
    """Refuse a file that cannot become a picture, before anything is computed.

    Raises:
        InputError: no suffix of `SUFFIXES`, or no folder to write into.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.absolute().parent}")


def draw_objective(obj: Objective, path: Path) -> None:
    """Write the picture of an objective; its kind is that of the name's suffix.

    Raises:
        InputError: as in `check_picture`, or the file cannot be written.
    """
    check_picture(path)
    figure = make_figure(obj)
    try:
        figure.savefig(path, dpi=96)
    except OSError as e:
        raise InputError(f"--plot {path}: cannot be written: {e.strerror or e}") from e


def make_figure(obj: Objective) -> Figure:
    """The picture, 10 by 5 inches."""
    figure = Figure(figsize=(10, 5))
    formula = textwrap.wrap(obj.formula, 130)
    values = ", ".join(f"{name} = {value:g}" for name, value in obj.values.items())
    _write(figure, 0.96, f"{obj.name}   ({values})" if values else obj.name, size=12, weight="bold")
    _write(figure, 0.91, "\n".join(formula), size=9)
    own, sft = curves(obj), curves(objective("sft"))
    panels = figure.subplots(1, 2)
    _draw(panels[0], own.p_label_P, own.target_PV, sft.target_PV)
    _draw(panels[1], own.p_label_P, own.gradient_PV, sft.gradient_PV)
    panels[0].set_title("induced target Q", fontsize=10)
    panels[1].set_title("gradient at the logits, p - Q", fontsize=10)
    figure.subplots_adjust(left=0.06, right=0.98, wspace=0.16, bottom=0.24, top=0.80 - 0.035 * (len(formula) - 1))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="upper center", bbox_to_anchor=(0.5, 0.14), ncols=6, frameon=False, fontsize=8.5,
        columnspacing=1.4, handlelength=2.2,
    )  # fmt: skip
    _write(figure, 0.065, "\n".join(textwrap.wrap(SITUATION, 135)), size=7.5, color="#606060")
    return figure


def _write(figure: Figure, y: float, text: str, **style: Any) -> None:
    # Dollar signs would start a formula of matplotlib's own.
    figure.text(0.5, y, text.replace("$", r"\$"), ha="center", va="top", **style)


def _draw(panel: Any, x_P: Tensor, own_PV: Tensor, sft_PV: Tensor) -> None:
    jumps_P = ((own_PV[1:] - own_PV[:-1]).abs() > JUMP).any(-1).nonzero().flatten() + 1
    own_PV = own_PV.index_fill(0, jumps_P, float("nan"))
    panel.axhline(0, color="#d8d8d8", linewidth=0.8, zorder=0)
    for v, (token, colour) in enumerate(zip(TOKENS, COLOURS, strict=True)):
        style, width = ("-", 2.4) if v == 0 else ("--", 1.6)
        panel.plot(x_P, own_PV[:, v], style, color=colour, linewidth=width, label=token, zorder=3 if v == 0 else 2)
    for v, label in enumerate(("SFT: observed token", "SFT: others", None, None)):
        panel.plot(x_P, sft_PV[:, v], "--" if v else "-", color=SFT_COLOUR, linewidth=1, label=label, zorder=1)
    panel.set(xlabel="student's probability of the observed token, $p_y$", xlim=(0, 1))
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.06)
