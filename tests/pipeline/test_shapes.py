"""Which fields of a record become text."""

from __future__ import annotations

import pytest

from logitcache_pipeline.corpus import Record
from logitcache_pipeline.shapes import RECORD_SHAPES, prompt_and_response, record_shape
from logitcache_storage.errors import CorpusError


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("messages prompt completion text", ("messages",)),
        ("prompt response completion", ("prompt", "completion")),
        ("prompt response output instruction", ("prompt", "response")),
        ("instruction input output question answer", ("instruction", "output")),
        ("instruction output text", ("instruction", "output")),
        ("question answer text", ("question", "answer")),
        ("prompt answer text", ("text",)),
    ],
)
def test_the_first_known_shape_wins(fields, expected):
    assert record_shape(fields.split(), source_id="c:1").fields == expected


def test_named_fields_override_every_shape():
    shape = record_shape(["messages", "q", "a"], source_id="c:1", prompt_field="q", response_field="a")
    assert (shape.kind, shape.text_fields) == ("pair", ("q", "a"))
    with pytest.raises(CorpusError, match=r"c:1: found the fields a, messages, expected q\+a"):
        record_shape(["messages", "a"], source_id="c:1", prompt_field="q", response_field="a")


def test_no_shape_is_refused_with_the_known_ones():
    with pytest.raises(CorpusError, match=r"c:7: found the fields body, title, expected messages, prompt\+completion"):
        record_shape({"title": 1, "body": 2}, source_id="c:7")
    with pytest.raises(CorpusError, match=r"c:7: found the fields \(none\)"):
        record_shape({}, source_id="c:7")


def test_the_input_of_an_instruction_is_its_last_line():
    shape = RECORD_SHAPES[3]
    data = {"instruction": "Add.", "output": "3"}
    assert prompt_and_response(Record("c:1", data), shape) == ("Add.", "3")
    assert prompt_and_response(Record("c:1", {**data, "input": ""}), shape) == ("Add.", "3")
    assert prompt_and_response(Record("c:1", {**data, "input": "1 + 2"}), shape) == ("Add.\n1 + 2", "3")
    with pytest.raises(CorpusError, match=r"c:1: field 'input' must be text, found list"):
        prompt_and_response(Record("c:1", {**data, "input": [1]}), shape)
