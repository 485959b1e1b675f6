"""Conversations through chat templates: which characters are the assistant's."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from logitcache_pipeline.chat import ChatTemplate, parse_messages
from logitcache_storage.errors import CorpusError

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<e>"
    "{% endgeneration %}\n{% else %}{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}"
)
STABLE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNSTABLE = (  # only the last turn keeps its thoughts, as some reasoning models' templates do
    "{% for m in messages %}[{{ m.role }}]{% if not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>hm</think>hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "A:bye 😀"},
]


def template(source: str, **settings) -> ChatTemplate:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>")),
        bos_token="<s>",
        name_or_path="tiny",
    )
    tokenizer.chat_template = source
    return ChatTemplate.of(tokenizer, **{"today": "2024-07-26", **settings})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (MARKED, ["<think>hm</think>hello<e>", "A:bye 😀<e>"]),
        (STABLE, ["<think>hm</think>hello[/]\n", "A:bye 😀[/]\n"]),
    ],
)
def test_spans_hold_what_the_assistant_wrote(source, expected):
    text, spans = template(source).conversation(TALK, source_id="c:1")
    assert [text[a:b] for a, b in spans] == expected
    assert text.startswith("<s>")
    assert "be brief" in text


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(
        CorpusError, match=r"c:1, message 3: the chat template of 'tiny' is not prefix-stable.*generation"
    ):
        template(UNSTABLE).conversation(TALK, source_id="c:1")
    text, spans = template(UNSTABLE).conversation(TALK[:3], source_id="c:1")
    assert text[slice(*spans[0])] == TALK[2]["content"]


def test_a_generation_prompt_that_the_conversation_does_not_show_is_refused():
    source = STABLE.replace("[assistant]{%", "[assistant]<think>{%")
    with pytest.raises(CorpusError, match="not prefix-stable: the conversation before this turn"):
        template(source).conversation([TALK[1], {"role": "assistant", "content": "hello"}], source_id="c:1")


def test_a_template_that_fails_names_the_record():
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        CorpusError, match=r"c:9: the chat template of 'tiny' fails.*TemplateError: roles must alternate"
    ):
        template(source).conversation(TALK, source_id="c:9")


def test_the_date_is_pinned():
    source = "{% set d = strftime_now(\"%d %b %Y\") %}{{ d }} {{ strftime_now( '%Y' ) }}" + STABLE
    assert template(source).conversation(TALK, source_id="c:1")[0].startswith("26 Jul 2024 2024<s>")
    assert template(source, today="1999-01-02").conversation(TALK, source_id="c:1")[0].startswith("02 Jan 1999 1999")
    with pytest.raises(CorpusError, match=r"'tiny' asks for today's date with a computed format"):
        template("{% set f = '%Y' %}{{ strftime_now(f) }}")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("hi", "must be a list of messages, found str"),
        ([{"role": "user", "content": "a"}, "b"], "message 2 must be an object"),
        ([{"content": "a"}], "message 1 must be an object with 'role' and 'content'"),
        ([{"role": "user", "content": 3}], "content of message 1 must be text, found int"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, found):
    with pytest.raises(CorpusError, match=rf"c:4: .*{found}"):
        parse_messages(messages, source_id="c:4")
