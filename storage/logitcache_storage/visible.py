"""Text from a corpus, legible and harmless on a terminal: no control character of it is ever printed.

Two ways to show text. `visible` is for one token or name in a table: on one line, spaces and all. `printable`
is for running text: spaces, line breaks and joined emoji stay what they are.
"""

from __future__ import annotations

import unicodedata

LEFT_TO_RIGHT_MARK = "\u200e"
"""Put after right-to-left text, so that a terminal that reorders text leaves what follows in place."""

SPACE = "␣"

DOTTED_CIRCLE = "◌"
"""What Unicode shows combining marks on."""

_NAMED = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
_JOINERS = "\u200c\u200d"


def visible(text: bytes | str) -> str:
    r"""A token or name on one line, without ambiguity: ` a\n` becomes `␣a\n`, and a backslash `\\`.

    Bytes that are no valid UTF-8 become `\xe2`; control, format and unassigned characters, and white
    space other than a space, become `\x1b`, `\u202e`, ...
    """
    chars = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    shown = "".join({" ": SPACE, "\\": "\\\\"}.get(c) or _escape(c) for c in chars)
    if is_combining(chars):
        shown = DOTTED_CIRCLE + shown  # it would sit on whatever is printed before it
    return shown + _direction_mark(chars)


def is_combining(text: str) -> bool:
    """Whether it begins with a combining mark, such as an accent."""
    return unicodedata.category(text[:1] or " ").startswith("M")


def printable(text: str) -> str:
    """Running text: as it is but for what could act on the terminal; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c in _JOINERS or _is_space(c) else _escape(c) for c in text)


def _escape(char: str) -> str:
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's spelling of an invalid byte
        return f"\\x{code - 0xDC00:02x}"
    if char in _NAMED:
        return _NAMED[char]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_space(char: str) -> bool:
    return unicodedata.category(char) == "Zs"


def _direction_mark(chars: str) -> str:
    is_right_to_left = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in chars)
    return LEFT_TO_RIGHT_MARK if is_right_to_left else ""
