"""The vocabulary table: the bytes of the tokens, put one after the other, are the bytes of the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logitcache_pipeline.vocabulary import vocabulary_table
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA, Vocabulary


@pytest.fixture(scope="module")
def byte_level(teacher: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<über>"])
    return tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A space before whatever begins a text, what it does not know as bytes: what Llama 2 does."""
    pieces = ["<unk>", "<eos>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", ",", "▁a"]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=True)


def word_level() -> PreTrainedTokenizerFast:
    """Words by number, with a hole at 3."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "naïve": 2, "end": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@given(text=st.text(max_size=20))
@hypothesis_settings(max_examples=100, deadline=None)
def test_byte_level_tokens_are_exact_even_within_a_character(byte_level, text):
    table = _TABLES.setdefault(id(byte_level), vocabulary_table(byte_level))
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table.column("text")[i].as_py() for i in ids) == text.encode()


_TABLES: dict = {}


@pytest.mark.parametrize("text", [" a b, a", " é", " a😀,b"])
def test_sentencepiece_tokens_keep_their_space_and_their_bytes(text):
    tokenizer = sentencepiece_like()
    ids = tokenizer(text[1:], add_special_tokens=False)["input_ids"]
    assert Vocabulary(vocabulary_table(tokenizer)).decode(ids) == text


def test_one_row_per_id_with_spelling_and_specials(byte_level):
    table = vocabulary_table(byte_level)
    assert table.schema == VOCABULARY_SCHEMA
    assert table.num_rows == len(byte_level)
    assert table.column("token").to_pylist() == byte_level.convert_ids_to_tokens(range(len(byte_level)))
    special = [i for i, flag in enumerate(table.column("special").to_pylist()) if flag]
    assert special == [byte_level.eos_token_id]
    assert table.column("text")[len(byte_level) - 1].as_py() == "<über>".encode()
    assert table.column("text")[byte_level.eos_token_id].as_py() == b"<eos>"


def test_an_id_without_a_token_is_an_empty_row():
    table = vocabulary_table(word_level())
    assert table.column("token").to_pylist() == ["<unk>", "<eos>", "naïve", "", "end"]
    assert table.column("text")[2].as_py().strip() == "naïve".encode()
    assert table.column("text")[3].as_py() == b""
