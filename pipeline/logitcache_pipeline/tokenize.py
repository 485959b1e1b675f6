"""Records to samples: input ids and the ranges of their targets.

A target at position t is predicted by the model's output at t - 1, so position 0 is never one.
What a record becomes:

    messages; prompt and response where    the rendered conversation
    the tokenizer has a chat template      targets: the assistant's turns
    prompt and response without one        prefix, prompt + newline, response, EOS
                                           targets: the response and its EOS
    text                                   prefix, text, EOS
                                           targets: all but position 0

Prefix is what the tokenizer puts before a text by itself (BOS, mostly); what it puts behind one is dropped,
and one EOS is added unless the text already ends with it. Prompt + newline is tokenised alone, as it will
be for generation, and the response as it continues after a newline, so no token reaches over the border
between the two. A rendered conversation is tokenised whole, and a token that reaches over the border of a
turn of the assistant is a target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from logitcache_pipeline.corpus import Record
from logitcache_pipeline.encoders import Encoded, Nothing, encoder
from logitcache_pipeline.shapes import RecordShape, record_shape
from logitcache_storage.errors import CorpusError, InputError
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.samples import target_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["truncate", "skip", "refuse"]
Reason = Nothing | Literal["overlong", "in_cache"]

RECORDS_PER_CALL = 256


@dataclass(frozen=True)
class TokenizeSettings:
    """Every option that changes what a record becomes; part of a cache's identity."""

    max_length: int | None = None
    """Tokens a sample may have; None: any number."""
    overlong: Overlong = "truncate"
    """What happens to a longer one: its end is cut off, it is left out, or the run stops."""
    prompt_field: str | None = None
    response_field: str | None = None
    chat_date: str = "2024-07-26"
    """The day (ISO date) that chat templates which ask for the date are told."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length must be at least 2 (a context and a target), got {self.max_length}")
        if self.overlong not in get_args(Overlong):
            raise InputError(f"overlong must be one of {', '.join(get_args(Overlong))}, got {self.overlong!r}")
        if (self.prompt_field is None) != (self.response_field is None):
            raise InputError("prompt_field and response_field go together: give both or neither")
        try:
            date.fromisoformat(self.chat_date)
        except ValueError as e:
            raise InputError(f"chat_date must be a date such as 2024-07-26, got {self.chat_date!r}") from e

    def shape(self, fields: Collection[str], *, source_id: str) -> RecordShape:
        """The shape of a record with these fields, under these settings.

        Raises:
            CorpusError: it has none.
        """
        return record_shape(
            fields,
            source_id=source_id,
            prompt_field=self.prompt_field,
            response_field=self.response_field,
        )


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """A record as the teacher will see it: L tokens, R ranges of targets."""

    key: str
    """`logitcache_storage.fingerprints.sample_key` of ids and ranges."""
    source_id: str
    input_ids: npt.NDArray[np.int32]
    """[L] int32."""
    target_ranges: npt.NDArray[np.int32]
    """[R, 2] int32, half-open, ascending, apart from each other; 1 <= start < stop <= L."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The record's other fields, as they were read."""
    truncated: bool = False

    def __post_init__(self) -> None:
        length, flat = len(self.input_ids), self.target_ranges.reshape(-1)
        in_order = len(flat) > 0 and flat[0] >= 1 and flat[-1] <= length and (np.diff(flat) >= 1).all()
        if self.target_ranges.ndim != 2 or not in_order:
            raise InputError(
                f"{self.source_id}: target ranges must be [R, 2], ascending and apart, within 1..{length},"
                f" got {self.target_ranges.tolist()}"
            )

    @property
    def target_positions(self) -> npt.NDArray[np.int32]:
        """Where the target tokens stand, [M] int32, each at least 1."""
        return target_positions(self.target_ranges.reshape(-1))

    @property
    def num_targets(self) -> int:
        """M, the number of target tokens."""
        return int((self.target_ranges[:, 1] - self.target_ranges[:, 0]).sum())


@dataclass(frozen=True, slots=True)
class Excluded:
    """A record that is no sample, and why."""

    source_id: str
    reason: Reason


def tokenize_records(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings
) -> Iterator[TokenizedSample | Excluded]:
    """One item per record, in order. The first record decides the shape of all.

    Raises:
        InputError: the tokenizer lacks what the corpus needs (an EOS token, a chat template, offsets).
        CorpusError: a record of another shape, with a field of a wrong type, that the chat template cannot
            take, or that is too long where `overlong` is "refuse".
    """
    remaining, shape, encode = iter(records), None, None
    while batch := list(islice(remaining, RECORDS_PER_CALL)):
        if shape is None or encode is None:
            shape = settings.shape(batch[0].data, source_id=batch[0].source_id)
            encode = encoder(shape, tokenizer, chat_date=settings.chat_date)
        for record in batch:
            _check_shape(record, shape, settings)
        for record, encoded in zip(batch, encode(batch), strict=True):
            yield _sample(record, encoded, shape, settings)


def _check_shape(record: Record, shape: RecordShape, settings: TokenizeSettings) -> None:
    found = settings.shape(record.data, source_id=record.source_id)
    if found != shape:
        raise CorpusError(
            f"{record.source_id}: a record of the shape {'+'.join(found.fields)}, but the first record of the"
            f" corpus is {'+'.join(shape.fields)};"
            " name the fields with --prompt-field and --response-field, or split the corpus"
        )


def _sample(
    record: Record, encoded: Encoded | Nothing, shape: RecordShape, settings: TokenizeSettings
) -> TokenizedSample | Excluded:
    if isinstance(encoded, str):
        return Excluded(record.source_id, encoded)
    ids_L, is_target_L = encoded
    length, limit = len(ids_L), settings.max_length or len(ids_L)
    if length > limit and settings.overlong == "refuse":
        raise CorpusError(
            f"{record.source_id}: {length} tokens, at most {limit} allowed;"
            " raise --max-length, or choose to truncate or skip such records"
        )
    if length > limit and settings.overlong == "skip":
        return Excluded(record.source_id, "overlong")
    ids_L, target_ranges = ids_L[:limit], _target_ranges(is_target_L[:limit])
    if not len(target_ranges):
        return Excluded(record.source_id, "without_targets" if len(ids_L) else "empty")
    columns = {name: value for name, value in record.data.items() if name not in shape.text_fields}
    key = sample_key(ids_L, target_ranges)
    return TokenizedSample(key, record.source_id, ids_L, target_ranges, columns, truncated=length > limit)


def _target_ranges(is_target_L: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Half-open ranges [R, 2] of the targets, position 0 left out: nothing predicts it."""
    edges = np.flatnonzero(np.diff(is_target_L[1:], prepend=False, append=False)) + 1
    return edges.reshape(-1, 2).astype(np.int32)
