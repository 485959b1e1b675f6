"""The table that says what each token id looks like, kept with the cache so that viewers need no tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyarrow as pa

from logitcache_storage.vocabulary import VOCABULARY_SCHEMA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def vocabulary_table(tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """One row per token id, in order of id: spelling, bytes, and whether it is special."""
    spelling = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    text_of = _byte_level(tokenizer) or _by_decoding(tokenizer)
    ids = range(max(spelling, default=-1) + 1)
    tokens = [spelling.get(i, "") for i in ids]
    added = tokenizer.added_tokens_decoder
    texts = [
        token.encode() if i in special or i in added else text_of(i, token)
        for i, token in zip(ids, tokens, strict=True)
    ]
    return pa.table({"token": tokens, "text": texts, "special": [i in special for i in ids]}, VOCABULARY_SCHEMA)


def _byte_level(tokenizer: PreTrainedTokenizerBase) -> Callable[[int, str], bytes] | None:
    """Byte-level BPE spells each byte as one character, so a token's bytes are exact even within a character."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    steps = (decoder or {}).get("decoders", [decoder or {}])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    byte_of = _byte_of_character()
    return lambda _, token: b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)


def _by_decoding(tokenizer: PreTrainedTokenizerBase) -> Callable[[int, str], bytes]:
    """What decoding shows of a token in the middle of a text: its space is part of it."""

    def decoded(*ids: int) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    anchor = next((i for i in range(len(tokenizer)) if decoded(i).strip().isalnum()), 0)
    before = decoded(anchor)

    def text_of(token_id: int, token: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        text = decoded(anchor, token_id)
        return (text.removeprefix(before) if text.startswith(before) else decoded(token_id)).encode()

    return text_of


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others are moved behind U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
