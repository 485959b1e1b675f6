"""Plots: true to their numbers, harmless in a page, equal for equal values."""

import io
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest

image = pytest.importorskip("matplotlib.image", reason="pip install 'logitcache[web]'")

from logitcache_storage.inspect.figures import BAR, Bar, histogram, png, svg  # noqa: E402

HOSTILE = '<script>alert(1)</script> $x_1$ & "quotes" \' %'
COUNTS = (5, 0, 40, 20, 1)
BARS = [Bar(f"{i} to {i + 1}", count, f"/samples?bin={i}&a=b") for i, count in enumerate(COUNTS)]


def drawn(name="entropy", bars=BARS, title="entropy", unit="nats"):
    return svg(histogram(title, unit, bars), name, f"{title}: a plot", bars)


def path_heights(root, fill):
    """Heights of the rectangles of a colour."""
    found = []
    for path in root.iter("path"):
        if path.get("fill") == fill:
            ys = [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]
            found.append(max(ys) - min(ys))
    return found


def test_bars_are_as_high_as_their_counts():
    heights = path_heights(ElementTree.fromstring(drawn()), "var(--bar)")
    assert len(heights) == len(COUNTS)
    assert [h / max(heights) for h in heights] == pytest.approx([c / max(COUNTS) for c in COUNTS], abs=1e-5)


def test_every_bar_is_a_link_with_words():
    links = list(ElementTree.fromstring(drawn()).iter("a"))
    assert [link.get("href") for link in links] == [bar.href for bar in BARS]
    assert [link.get("aria-label") for link in links] == [
        "0 to 1: 5 tokens, 7.6%",
        "1 to 2: 0 tokens, 0.0%",
        "2 to 3: 40 tokens, 60.6%",
        "3 to 4: 20 tokens, 30.3%",
        "4 to 5: 1 tokens, 1.5%",
    ]
    assert [link.find("title").text for link in links] == [link.get("aria-label") for link in links]
    heights = path_heights(ElementTree.fromstring(drawn()), "none")
    assert heights.count(max(heights[2:])) >= len(BARS)  # all of equal height, whatever the count
    assert not list(ElementTree.fromstring(drawn(bars=[Bar("a", 1)])).iter("a"))


def test_it_holds_nothing_that_a_strict_policy_blocks():
    root = ElementTree.fromstring(drawn(title=HOSTILE, unit=HOSTILE, bars=[Bar(HOSTILE, 3, "/x")]))
    for element in root.iter():
        assert element.tag in {"svg", "defs", "g", "a", "path", "text", "title", "clipPath", "rect", "use"}
        assert not [name for name in element.attrib if name.startswith("on") or name in ("style", "target")]
    words = "".join(root.itertext())
    assert words.count('<script>alert(1)</script> $x_1$ & "quotes" \' %') == 4  # title, unit, bar, hint
    assert root.get("aria-label") == f"{HOSTILE}: a plot" and root.get("role") == "group"


def test_all_of_its_colours_are_the_page_s():
    fills = {e.get(name) for e in ElementTree.fromstring(drawn()).iter() for name in ("fill", "stroke")} - {None}
    assert fills == {"none", "currentColor", "var(--dim)", "var(--line)", "var(--bar)"}


def test_equal_values_give_equal_bytes_and_plots_of_a_page_share_no_identifier():
    assert drawn() == drawn()
    assert png(histogram("entropy", "nats", BARS)) == png(histogram("entropy", "nats", BARS))
    ids = [set(re.findall(r'\bid="([^"]+)"', drawn(name))) for name in ("entropy", "kept_mass")]
    assert ids[0] and not ids[0] & ids[1]
    for name, own in zip(("entropy", "kept_mass"), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", drawn(name))) <= own


def test_names_below_the_bars_do_not_overlap():
    many = [Bar(f"0.{i:03d} to 0.{i + 1:03d}", 1) for i in range(30)]
    places = [float(t.get("x")) for t in ElementTree.fromstring(drawn(bars=many)).iter("text") if " to " in t.text]
    # Of 14 characters, none wider than 0.62 of 7.5 points.
    assert len(places) >= 3 and min(b - a for a, b in itertools.pairwise(places)) > 14 * 0.62 * 7.5


def test_a_png_shows_the_same_bars_on_white():
    pixels = image.imread(io.BytesIO(png(histogram("entropy", "nats", BARS))))[..., :3]
    colour = [int(BAR[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    is_bar = (abs(pixels - colour) < 0.01).all(-1)
    by_column = is_bar.sum(0)
    edges = [i for i in range(1, len(by_column)) if (by_column[i] > 0) != (by_column[i - 1] > 0)]
    heights = [by_column[a:b].max() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert [h / max(heights) for h in heights] == pytest.approx([5 / 40, 1, 20 / 40, 1 / 40], abs=0.02)
    assert (pixels[0, 0] == 1).all()


def test_threads_draw_side_by_side():
    names = [f"plot{i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(drawn, names))
    assert [text.replace(name, "plot0") for name, text in zip(names, found, strict=True)] == [drawn("plot0")] * 8
