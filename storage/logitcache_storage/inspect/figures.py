"""Plots: as SVG that stands in a page and takes its colours from there, or as PNG.

The SVG has no `style` attribute and no identifier that another plot of the page could have, so it holds under the
strict Content-Security-Policy of the web view; its colours are the custom properties of `web/static/colours.css`. Equal
values give equal bytes.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from logitcache_storage.terminal import format_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (4.6, 2.2)
"""Inches; a page scales it to the width that there is."""

PNG_DPI = 160

TICK_CHARACTERS = 62
"""Of names of bars that are written below them: so many fit side by side."""

INK, DIM, LINE, BAR = "#1b1f24", "#59636e", "#d5dae0", "#5b8def"
"""Colours of the PNG, each for one purpose, so that in the SVG each can become what the page says."""

PAGE_COLOURS = {
    INK: "currentColor",
    DIM: "var(--dim)",
    LINE: "var(--line)",
    BAR: "var(--bar)",
}

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "logitcache", "font.size": 8.5, "font.family": "sans-serif"}

_settings_lock = threading.Lock()
"""matplotlib's settings belong to the process."""


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram."""

    name: str
    """What is counted, e.g. "0.5 to 0.7"."""
    count: int
    href: str | None = None
    """Where it leads."""


def histogram(title: str, unit: str, bars: Sequence[Bar]) -> Figure:
    """Bars of equal width in the order given; a bar that leads somewhere does so over the whole height of the plot.

    Args:
        title: what the values are.
        unit: of the names below the bars; empty where they have none.
        bars: at least one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=SIZE, facecolor="none")
    axes = figure.add_axes((0.115, 0.18, 0.875, 0.7), facecolor="none")
    places = range(len(bars))
    axes.bar(places, [bar.count for bar in bars], width=0.86, color=BAR, linewidth=0, zorder=2)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    top = max(1, *(bar.count for bar in bars)) * 1.05
    axes.set_ylim(0, top)
    for place, bar in enumerate(bars):
        if bar.href is not None:
            hit = axes.bar(place, top, width=1.0, color="none", linewidth=0, zorder=3)[0]
            hit.set_url(bar.href)
            hit.set_gid(f"bar-{place}")
    width = 3 + max(len(bar.name) for bar in bars)
    step = max(1, -(-len(bars) * width // TICK_CHARACTERS))
    axes.set_xticks(list(places)[::step], [_verbatim(bar.name) for bar in bars][::step])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: format_count(count).replace(".0", "")))
    axes.grid(axis="y", color=LINE, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, colors=DIM, labelsize=7.5)
    axes.tick_params(axis="x", pad=6)  # the first name begins below the zero of the other axis
    axes.set_title(_verbatim(title), loc="left", color=INK, fontsize=9.5, pad=6)
    axes.set_xlabel(_verbatim(unit), color=DIM, fontsize=8, labelpad=2)
    return figure


def svg(figure: Figure, name: str, description: str, bars: Sequence[Bar] = ()) -> Markup:
    """The figure for a page that has the custom properties of `colours.css`.

    Args:
        figure: of this module.
        name: of the plot, a word; no other plot of the page has it.
        description: for those who do not see it.
        bars: of `histogram`, in its order, to be told when they are pointed at or come into focus.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    with _settings_lock, mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _make_plain(root, name)
    total = sum(bar.count for bar in bars)
    titles = {f"{name}-bar-{place}": _told(bar, total) for place, bar in enumerate(bars)}
    _tell(root, titles)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "class": "plot",
        "role": "group" if titles else "img",
        "aria-label": description,
    }
    # Inside HTML the parser knows the namespace of <svg>; prefixes would hide it.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with _settings_lock, mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _make_plain(root: ElementTree.Element, name: str) -> None:
    """No namespaces, no metadata, styles as attributes, colours of the page, identifiers that begin with the name."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    wanted = _referenced(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.text = element.text if element.text and element.text.strip() else None
        element.tail = None
        attributes = dict(element.attrib)
        for declaration in filter(None, attributes.pop("style", "").split(";")):
            key, value = declaration.split(":", 1)
            attributes[key.strip()] = value.strip()
        attributes.pop("font-family", None)
        attributes.pop("target", None)
        element.attrib = {
            key.replace(_XLINK, ""): _renamed(PAGE_COLOURS.get(value, value), name)
            for key, value in attributes.items()
            if key != "id" or value in wanted or value.startswith("bar-")
        }
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"


def _referenced(root: ElementTree.Element) -> set[str]:
    values = [value for element in root.iter() for value in element.attrib.values()]
    return {
        value.removeprefix("url(").strip("()#") for value in values if value.startswith(("#", "url(#"))
    } - PAGE_COLOURS.keys()


def _renamed(value: str, name: str) -> str:
    if value.startswith("url(#"):
        return value.replace("url(#", f"url(#{name}-")
    is_reference = value.startswith("#") and len(value) != len(INK)
    return f"#{name}-{value[1:]}" if is_reference else value


def _tell(root: ElementTree.Element, titles: dict[str, str]) -> None:
    """Give each bar that leads somewhere its words, on the link: a name for the keyboard, a hint for the mouse."""
    for group in root.iter("g"):
        words = titles.get(group.get("id", ""))
        link = next(group.iter("a"), None)
        if words is not None and link is not None:
            link.set("aria-label", words)
            link.set("pointer-events", "all")  # what is not painted would not be hit
            hint = ElementTree.Element("title")
            hint.text = words
            link.insert(0, hint)


def _told(bar: Bar, total: int) -> str:
    return f"{bar.name}: {bar.count:,} tokens, {bar.count / max(total, 1):.1%}"


def _verbatim(text: str) -> str:
    """Dollar signs would start a formula of matplotlib's own."""
    return text.replace("$", r"\$")
