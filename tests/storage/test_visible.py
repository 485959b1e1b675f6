"""Nothing of a corpus acts on the terminal, and what is shown can be told apart."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache_storage.visible import LEFT_TO_RIGHT_MARK, printable, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b" the", "␣the"),
        (b"\n\t\r", r"\n\t\r"),
        (b"\\n", r"\\n"),
        (b"\x1b[31m", r"\x1b[31m"),
        (b"\x9b31m", r"\x9b31m"),
        ("\x9b31m", r"\x9b31m"),
        (b"\xe2\x98", r"\xe2\x98"),
        ("☃".encode(), "☃"),
        ("\u202eevil", r"\u202eevil"),
        ("a\u00a0b", r"a\xa0b"),
        ("\U000e0041", r"\U000e0041"),
        ("\u0301", "◌\u0301"),
        ("שלום", "שלום" + LEFT_TO_RIGHT_MARK),
        ("[red]", "[red]"),
        ("", ""),
    ],
)
def test_tokens(text, shown):
    assert visible(text) == shown


@given(st.one_of(st.binary(), st.text()))
def test_visible_prints_nothing_that_acts(text):
    shown = visible(text).removesuffix(LEFT_TO_RIGHT_MARK)
    assert all(c.isprintable() for c in shown) and " " not in shown


@given(st.lists(st.binary(max_size=4), min_size=2, max_size=2, unique=True))
def test_different_bytes_look_different_where_they_are_ascii(pair):
    a, b = (bytes(c & 0x7F for c in data) for data in pair)
    assert (visible(a) == visible(b)) == (a == b)


@given(st.text())
def test_running_text_keeps_its_lines_and_loses_what_acts(text):
    shown = printable(text)
    assert shown.count("\n") == text.count("\n")
    allowed = {"Cf": "\u200c\u200d", "Cc": "\n\t"}
    for c in shown:
        category = unicodedata.category(c)
        assert category not in ("Cs", "Co", "Cn", "Zl", "Zp") and c in allowed.get(category, c)


def test_running_text_keeps_joined_emoji_and_wide_spaces():
    family = "👨\u200d👩\u200d👧 a\u3000b\u00a0c"
    assert printable(family) == family
