"""Which fields of a record become text, and how: the first record of a corpus decides for all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from logitcache_pipeline.corpus import Record
from logitcache_storage.errors import CorpusError


@dataclass(frozen=True)
class RecordShape:
    """A conversation, a prompt with its response, or plain text, and the fields it stands in."""

    kind: Literal["messages", "pair", "text"]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The fields that become text; all others are carried along as columns."""
        return (*self.fields, *self.optional)


RECORD_SHAPES = (
    RecordShape("messages", ("messages",)),
    RecordShape("pair", ("prompt", "completion")),
    RecordShape("pair", ("prompt", "response")),
    RecordShape("pair", ("instruction", "output"), optional=("input",)),
    RecordShape("pair", ("question", "answer")),
    RecordShape("text", ("text",)),
)
"""The shapes that are recognised, in this order."""


def record_shape(
    fields: Collection[str],
    *,
    source_id: str,
    prompt_field: str | None = None,
    response_field: str | None = None,
) -> RecordShape:
    """The shape of a record with these fields; the field names, where given, leave no other choice.

    Raises:
        CorpusError: there is none for them.
    """
    shapes: tuple[RecordShape, ...] = RECORD_SHAPES
    if prompt_field is not None and response_field is not None:
        shapes = (RecordShape("pair", (prompt_field, response_field)),)
    for shape in shapes:
        if all(name in fields for name in shape.fields):
            return shape
    raise CorpusError(
        f"{source_id}: found the fields {', '.join(sorted(fields)) or '(none)'},"
        f" expected {', '.join('+'.join(shape.fields) for shape in shapes)};"
        " name the fields with --prompt-field and --response-field"
    )


def text_of(record: Record, name: str) -> str:
    """A field of the record that must be text.

    Raises:
        CorpusError: it is something else.
    """
    value = record.data[name]
    if not isinstance(value, str):
        raise CorpusError(
            f"{record.source_id}: field {name!r} must be text, found {type(value).__name__}"
            f" {str(value)[:40]!r}; convert it to text in the corpus"
        )
    return value


def prompt_and_response(record: Record, shape: RecordShape) -> tuple[str, str]:
    """The two texts of a "pair" record; an optional field, if not empty, is the last line of the prompt."""
    prompt, response = (text_of(record, name) for name in shape.fields)
    more = [text_of(record, name) for name in shape.optional if name in record.data]
    return "\n".join([prompt, *filter(None, more)]), response
