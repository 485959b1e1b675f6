"""What each token id looks like, kept with the cache so that looking at it needs no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

VOCABULARY_SCHEMA = pa.schema(
    [
        pa.field("token", pa.string(), nullable=False),  # as the tokenizer spells it
        pa.field("text", pa.binary(), nullable=False),  # the bytes it stands for; not always valid UTF-8 on its own
        pa.field("special", pa.bool_(), nullable=False),
    ]
)
"""One row per token id, in order of id."""


class Vocabulary:
    """Token ids to the bytes they stand for."""

    def __init__(self, table: pa.Table) -> None:
        self._text: list[bytes] = table.column("text").to_pylist()
        self._special: list[bool] = table.column("special").to_pylist()

    def __len__(self) -> int:
        return len(self._text)

    def text(self, token_id: int) -> bytes:
        """The bytes of one token; a padded id that no token has is shown as `<|id 5|>`."""
        if 0 <= token_id < len(self._text):
            return self._text[token_id]
        return f"<|id {token_id}|>".encode()

    def is_special(self, token_id: int) -> bool:
        """Whether the tokenizer treats this id as a special token."""
        return 0 <= token_id < len(self._special) and self._special[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of several tokens; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self.text(int(token_id)) for token_id in token_ids).decode("utf-8", "replace")
