r"""Problems with checkable answers: how a record becomes a prompt, and when a response counts as right.

The prompt is what `logitcache build` puts before a response: through the tokenizer's chat template where there is one,
else the text and a newline. A text marks its answer by `####` before it or `\boxed{}` around it; the last mark counts.
Without one it is the text's last number, or, where the expected answer is no number, as many last words as that has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import fsspec

from logitcache_storage.errors import CorpusError, InputError

PROMPT_FIELDS = ("prompt", "instruction", "question")
ANSWER_FIELDS = ("answer", "completion", "response", "output")

_MARK = "####"
_BRACE = re.compile(r"\\f?boxed\s*\{|(?<!\\)[{}]")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"(?<!\d)-?(?:\d[\d,]*)?\.?\d+(?:/\d+)?")


@dataclass(frozen=True)
class Problem:
    """A prompt, and a text that holds the answer that is expected."""

    messages: tuple[Mapping[str, str], ...]
    """The conversation up to the answer; one turn of the user where the record has only a prompt."""
    reference: str
    """The record's own answer: a demonstration, or the bare result."""

    @property
    def prompt(self) -> str:
        """The text of the last turn, for tokenizers without a chat template."""
        return self.messages[-1]["content"]


def read_problems(
    path: str, *, limit: int | None = None, prompt_field: str | None = None, answer_field: str | None = None
) -> list[Problem]:
    """The problems of a JSON-lines file (or URL; .gz, .bz2 and .xz are read, too).

    A prompt is `messages` without the last turn, or the field `prompt`, `instruction` (with `input`) or `question`;
    the reference is `answer`, `completion`, `response` or `output`, or the last turn.

    Args:
        path: the file.
        limit: take the first so many; None for all.
        prompt_field: name of the prompt's field, if it is another.
        answer_field: name of the answer's field, if it is another.

    Raises:
        InputError: the file cannot be opened, or is empty.
        CorpusError: a line is no record with a prompt and an answer.
    """
    problems: list[Problem] = []
    try:
        with fsspec.open(path, "rt", compression="infer", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(problems) >= limit:
                    break
                if line.strip():
                    problems.append(_parse(line, f"{path}, line {number}", prompt_field, answer_field))
    except (OSError, UnicodeDecodeError, ImportError) as e:
        raise InputError(f"--data {path}: cannot be read: {e}") from e
    if not problems:
        raise InputError(f"--data {path}: no problems; expected one JSON object on each line")
    return problems


def find_marked(text: str) -> str | None:
    """What stands inside the last closed `\\boxed{}` or on the line behind the last `####`, whichever comes later."""
    box = _last_box(text)
    mark = text.rfind(_MARK)
    if box is not None and box.start > mark:
        return text[box].strip()
    return text[mark + len(_MARK) :].strip().split("\n")[0].strip() if mark >= 0 else None


def find_answer(reference: str) -> str:
    """What a reference says the answer is: what it marks, else its last number, or all of it."""
    marked = find_marked(reference)
    if marked is not None:
        return marked
    # The digits of a formula are no numbers of their own.
    numbers = _NUMBER.findall(reference) if "\\" not in reference else []
    return numbers[-1] if numbers else reference.strip()


def is_exact(response: str, reference: str) -> bool:
    """Whether the response's answer is the reference's, as numbers where both are, else word by word."""
    expected = normalise(find_answer(reference))
    found = find_marked(response)
    if found is None and isinstance(expected, Fraction):
        numbers = _NUMBER.findall(response)
        found = numbers[-1] if numbers else ""
    elif found is None:
        found = " ".join(response.split()[-max(len(str(expected).split()), 1) :])
    return normalise(found) == expected


def normalise(text: str) -> Fraction | str:
    """A number or fraction as such, whatever its commas, currency and trailing zeros; other text with single spaces."""
    plain = " ".join(_TEXT.sub(r"\1", text).replace("\\$", "$").replace("\\%", "%").split())
    plain = plain.removesuffix(".").strip("$ ")
    digits = plain.lstrip("$€£").replace(",", "").removesuffix("%")
    if re.fullmatch(r"-?\d*\.?\d+|-?\d+/\d+", digits):
        # A zero below the line, or more digits than Python converts.
        with suppress(ZeroDivisionError, ValueError):
            return Fraction(digits)
    return plain


def _last_box(text: str) -> slice | None:
    """The inside of the `\\boxed{}` that is closed last, in one pass, whatever braces a response leaves open."""
    opened: list[re.Match[str]] = []
    found = None
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            opened.append(match)
        elif opened and len((start := opened.pop())[0]) > 1:
            found = slice(start.end(), match.start())
    return found


def _parse(line: str, where: str, prompt_field: str | None, answer_field: str | None) -> Problem:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise CorpusError(f"{where}: not valid JSON: {e}; every line must hold one JSON object") from e
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected a JSON object, found {line.strip()[:60]!r}")
    if prompt_field is None and answer_field is None and isinstance(record.get("messages"), list):
        return _from_messages(record, where)
    prompt = _text(record, (prompt_field,) if prompt_field else PROMPT_FIELDS, where, "--prompt-field")
    if prompt_field is None and "instruction" in record and "prompt" not in record and record.get("input"):
        prompt = f"{prompt}\n{record['input']}"
    answer = _text(record, (answer_field,) if answer_field else ANSWER_FIELDS, where, "--answer-field")
    return Problem(({"role": "user", "content": prompt},), answer)


def _from_messages(record: Mapping[str, Any], where: str) -> Problem:
    messages = record["messages"]
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise CorpusError(
                f"{where}: a message must be an object with the texts role and content, found {message!r}"
            )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise CorpusError(f"{where}: messages must end with a turn of the assistant that holds the expected answer")
    answer = record.get("answer", messages[-1]["content"])
    return Problem(tuple(messages[:-1]), str(answer))


def _text(record: Mapping[str, Any], names: tuple[str, ...], where: str, option: str) -> str:
    name = next((name for name in names if record.get(name) is not None), None)
    value = record[name] if name else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        found = ", ".join(sorted(record)) or "none"
        raise CorpusError(f"{where}: no text in a field {' or '.join(names)}; fields: {found}; name it with {option}")
    return value
