"""What token ids look like."""

from __future__ import annotations

import pyarrow as pa

from logitcache_storage.vocabulary import VOCABULARY_SCHEMA, Vocabulary


def test_bytes_that_are_characters_only_together() -> None:
    word = "ü".encode()
    text = [word[:1], word[1:], b"x", b"</s>"]
    table = pa.table({"token": ["a", "b", "x", "</s>"], "text": text, "special": [False, False, False, True]})
    vocabulary = Vocabulary(table.cast(VOCABULARY_SCHEMA))
    assert len(vocabulary) == 4
    assert vocabulary.decode([0, 1, 2]) == "üx"
    assert vocabulary.decode([0, 2]) == "\ufffdx"
    assert vocabulary.decode([]) == ""
    assert [vocabulary.is_special(i) for i in (-1, 0, 3, 4)] == [False, False, True, False]
    assert (vocabulary.text(3), vocabulary.text(4), vocabulary.text(-1)) == (b"</s>", b"<|id 4|>", b"<|id -1|>")
