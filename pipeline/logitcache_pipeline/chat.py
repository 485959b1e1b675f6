"""A conversation through a chat template: the text, and which characters of it the assistant wrote.

Both routes end in character spans, which `encoders.py` maps to tokens by their offsets. transformers' own
`return_assistant_tokens_mask` loses turns, or runs on to the end of the sample, where a span begins or ends
with a character that belongs to no token; and a difference of token ids finds a stable template unstable
where a token reaches over the border of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from logitcache_storage.errors import CorpusError

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]

ASSISTANT = "assistant"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and its variables, with the date pinned, so that no plan depends on it."""

    source: str
    variables: Mapping[str, str]
    tokenizer: str
    """Name of the tokenizer it came with, for errors."""

    @classmethod
    def of(cls, tokenizer: Any, *, today: str) -> ChatTemplate:
        """The template of a transformers tokenizer; `today` (ISO date) is what `strftime_now` answers.

        Raises:
            CorpusError: the template asks for the date in a way that cannot be pinned.
        """
        name = str(tokenizer.name_or_path)
        pinned = _TODAY.sub(
            lambda call: json.dumps(date.fromisoformat(today).strftime(call[2])),
            tokenizer.get_chat_template(),
        )
        if "strftime_now(" in pinned:
            raise CorpusError(
                f"the chat template of {name!r} asks for today's date with a computed format, so the same"
                " corpus would give other samples tomorrow; write the date or the format into the template"
            )
        return cls(pinned, dict(tokenizer.special_tokens_map), name)

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks what the assistant wrote with `{% generation %}`."""
        return bool(_GENERATION.search(self.source))

    def conversation(self, messages: Messages, *, source_id: str) -> tuple[str, Spans]:
        """The rendered conversation and the half-open character spans of its assistant turns.

        Spans come from the generation markers where the template has them. Elsewhere a turn is what the
        rendering through it adds to the rendering before it with the generation prompt; so whatever closes
        the turn belongs to it.

        Raises:
            CorpusError: the template fails on these messages, or it has no markers and is not prefix-stable.
        """
        text, spans = self._render(messages, source_id)
        if self.marks_generation:
            return text, spans
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before, _ = self._render(messages[:i], source_id, add_generation_prompt=True)
                through = text if i + 1 == len(messages) else self._render(messages[: i + 1], source_id)[0]
                self._check_stable(text, before, through, f"{source_id}, message {i + 1}")
                spans.append((len(before), len(through)))
        return text, spans

    def _render(self, messages: Messages, source_id: str, *, add_generation_prompt: bool = False) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as e:  # a template is a foreign program: it may fail with anything
            raise CorpusError(
                f"{source_id}: the chat template of {self.tokenizer!r} fails on these messages:"
                f" {type(e).__name__}: {e}; correct the record or the template"
            ) from e
        return texts[0], spans[0] if self.marks_generation else []

    def _check_stable(self, text: str, before: str, through: str, where: str) -> None:
        for part, prefix in (("before this turn", before), ("up to this turn", through)):
            if not text.startswith(prefix):
                at = next((i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), len(text))
                raise CorpusError(
                    f"{where}: the chat template of {self.tokenizer!r} is not prefix-stable: the conversation"
                    f" {part} renders as ...{prefix[max(at - 20, 0) : at + 20]!r}, the whole one as"
                    f" ...{text[max(at - 20, 0) : at + 20]!r}; put {{% generation %}} and"
                    " {% endgeneration %} around the assistant's words in the template"
                )


def parse_messages(value: Any, *, source_id: str) -> list[dict[str, Any]]:
    """The messages of a record, checked: a list of objects with a string `role` and perhaps a `content`.

    Raises:
        CorpusError: anything else, by the number of the message.
    """
    if not isinstance(value, list):
        raise CorpusError(f"{source_id}: 'messages' must be a list of messages, found {type(value).__name__}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CorpusError(
                f"{source_id}: message {number} must be an object with 'role' and 'content',"
                f" found {str(message)[:60]!r}"
            )
        if not isinstance(message.get("content", ""), str | list):
            raise CorpusError(
                f"{source_id}: the content of message {number} must be text, found {type(message['content']).__name__}"
            )
    return value
