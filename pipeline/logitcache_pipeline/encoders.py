"""Records to token ids and target masks, one encoder per shape, a batch of records per call.

Shapes: L tokens of one record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from logitcache_pipeline.chat import ASSISTANT, ChatTemplate, Spans, parse_messages
from logitcache_pipeline.corpus import Record
from logitcache_pipeline.shapes import RecordShape, prompt_and_response, text_of
from logitcache_storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids [L] and whether each is a target [L]; position 0 may be marked, though nothing predicts it."""
Nothing = Literal["empty", "without_targets"]
"""Why a record has no tokens to learn from."""
Encoder = Callable[[Sequence[Record]], list[Encoded | Nothing]]


def encoder(shape: RecordShape, tokenizer: PreTrainedTokenizerBase, *, chat_date: str) -> Encoder:
    """The encoder for records of this shape; `chat_date` is the day (ISO) a chat template is told.

    Raises:
        InputError: the tokenizer lacks what the shape needs: an EOS token, a chat template, offsets.
        CorpusError: the chat template cannot be used; while encoding: a record cannot.
    """
    if shape.kind == "text":
        return _TextEncoder(shape, PlainTokens(tokenizer))
    if tokenizer.chat_template:
        return _ChatEncoder(shape, tokenizer, chat_date)
    if shape.kind == "pair":
        return _PairEncoder(shape, PlainTokens(tokenizer))
    raise InputError(
        f"the tokenizer {str(tokenizer.name_or_path)!r} has no chat template, and the corpus has 'messages';"
        " use a teacher with a chat template, or give the corpus a prompt and a response field"
    )


class PlainTokens:
    """A tokenizer without its own ideas of where a sample begins and ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {str(tokenizer.name_or_path)!r} has no EOS token, so no sample could end;"
                " set its eos_token (tokenizer_config.json) and save it again"
            )
        self._tokenizer = tokenizer
        self._eos = int(tokenizer.eos_token_id)
        probe, self._newline = self(["a", "\n"])
        with_specials = tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = [i for i in range(len(with_specials)) if probe and with_specials[i : i + len(probe)] == probe]
        self.prefix: list[int] = with_specials[: starts[0]] if starts else []
        """What the tokenizer puts before a text by itself."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added."""
        ids: list[list[int]] = _call(self._tokenizer, texts)["input_ids"] if texts else []
        return ids

    def after_newline(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it continues after a newline.

        SentencePiece tokenizers put a space before whatever begins a text; a response begins in the middle of
        one. Where the tokenizer joins the newline and the text, the text is tokenised alone.
        """
        size = len(self._newline)
        joined = self(["\n" + text for text in texts])
        found = [ids[size:] for ids in joined]
        alone = [i for i, ids in enumerate(joined) if ids[:size] != self._newline]
        for i, ids in zip(alone, self([texts[i] for i in alone]), strict=True):
            found[i] = ids
        return found

    def ended(self, ids: list[int]) -> list[int]:
        """The ids with one EOS at their end."""
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]


class _TextEncoder:
    def __init__(self, shape: RecordShape, tokens: PlainTokens) -> None:
        self._field, self._tokens = shape.fields[0], tokens

    def __call__(self, records: Sequence[Record]) -> list[Encoded | Nothing]:
        texts = [text_of(record, self._field) for record in records]
        return [
            _marked([], self._tokens.prefix + self._tokens.ended(ids)) if text.strip() else "empty"
            for text, ids in zip(texts, self._tokens(texts), strict=True)
        ]


class _PairEncoder:
    def __init__(self, shape: RecordShape, tokens: PlainTokens) -> None:
        self._shape, self._tokens = shape, tokens

    def __call__(self, records: Sequence[Record]) -> list[Encoded | Nothing]:
        pairs = [prompt_and_response(record, self._shape) for record in records]
        contexts = self._tokens([prompt + "\n" for prompt, _ in pairs])
        answers = self._tokens.after_newline([response for _, response in pairs])
        return [
            _marked(self._tokens.prefix + context, self._tokens.ended(answer)) if response.strip() else "empty"
            for (_, response), context, answer in zip(pairs, contexts, answers, strict=True)
        ]


class _ChatEncoder:
    def __init__(self, shape: RecordShape, tokenizer: PreTrainedTokenizerBase, chat_date: str) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {str(tokenizer.name_or_path)!r} does not tell which characters a token"
                " covers, and the assistant's turns are found by that;"
                " use its fast version (with a tokenizer.json)"
            )
        self._shape, self._tokenizer = shape, tokenizer
        self._template = ChatTemplate.of(tokenizer, today=chat_date)

    def __call__(self, records: Sequence[Record]) -> list[Encoded | Nothing]:
        rendered = [self._render(record) for record in records]
        texts = [item[0] for item in rendered if not isinstance(item, str)]
        found = _call(self._tokenizer, texts, return_offsets_mapping=True) if texts else {}
        tokens = zip(found.get("input_ids", []), found.get("offset_mapping", []), strict=True)
        return [item if isinstance(item, str) else _marked_spans(*next(tokens), item[1]) for item in rendered]

    def _render(self, record: Record) -> tuple[str, Spans] | Nothing:
        if self._shape.kind == "messages":
            messages = parse_messages(record.data["messages"], source_id=record.source_id)
            if not messages:
                return "empty"
            if all(message["role"] != ASSISTANT for message in messages):
                return "without_targets"
        else:
            prompt, response = prompt_and_response(record, self._shape)
            if not response.strip():
                return "empty"
            messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": response}]
        return self._template.conversation(messages, source_id=record.source_id)


def _call(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **kwargs: Any) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # what is too long is not the tokenizer's to say
        **kwargs,
    )


def _marked(context: list[int], targets: list[int]) -> Encoded:
    ids_L = np.array(context + targets, dtype=np.int32)
    return ids_L, np.arange(len(ids_L)) >= len(context)


def _marked_spans(ids: list[int], offsets: list[tuple[int, int]], spans: Spans) -> Encoded:
    """Tokens that share a character with a span are targets."""
    start_L, stop_L = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    is_target_L = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in spans:
        is_target_L |= (start_L < stop) & (stop_L > start) & (start < stop)
    return np.array(ids, dtype=np.int32), is_target_L
