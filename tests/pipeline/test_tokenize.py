"""Samples: the targets decode to the response, nothing else, and what is no sample is counted.

Oracles: decoding (what the targets say must be the response), transformers' own mask where it can be
trusted, and prefix differences of token ids where they are stable.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from logitcache_pipeline.corpus import Record, read_records
from logitcache_pipeline.tokenize import Excluded, TokenizedSample, TokenizeSettings, tokenize_records
from logitcache_storage.errors import CorpusError, InputError
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.record_json import to_json

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k-1000.jsonl"
TEXT = ["a b c\n\n  hello there\n\n\nhello  world\n hi", "the answer is 42 .\n#### 42", "one two three"] * 3
SPECIALS = ["<eos>", "<bos>", "<|u|>", "<|a|>"]

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>\n{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}\n{% else %}<|u|>\n{{ m.content }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>\n{% endif %}"
)
STABLE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there 😀"},
    {"role": "user", "content": "and\nnow ?"},
    {"role": "assistant", "content": "the answer is 42 ."},
]


def byte_level(*, post: str | None = None, template: str | None = None, eos: str | None = "<eos>"):
    """Byte-level BPE with merges over newlines, as in GPT-2; `post` is what it adds by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if post:
        specials = [(t, tokenizer.token_to_id(t)) for t in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=specials)
    return fast(tokenizer, template=template, eos=eos, bos_token="<bos>")


def sentencepiece_like():
    """A space before whatever begins a text, newlines as bytes: what Llama 2 does."""
    pieces = ["<unk>", "<eos>", "<bos>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehilnorstwx"]
    merges = [("h", "i"), ("▁", "a"), ("▁", "hi")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<eos>", "<bos>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return fast(tokenizer, bos_token="<bos>")


def word_level(*, template: str | None = None):
    """Words between spaces: newlines and spaces belong to no token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIALS]))
    return fast(tokenizer, template=template)


def fast(tokenizer, *, template=None, eos="<eos>", **tokens):
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, name_or_path="tiny", **tokens)
    made.chat_template = template
    return made


def run(tokenizer, *rows: dict, **options) -> list:
    records = [Record(f"c.jsonl:{i}", row) for i, row in enumerate(rows, start=1)]
    return list(tokenize_records(records, tokenizer, TokenizeSettings(**options)))


def decoded(tokenizer, sample: TokenizedSample) -> tuple[str, str]:
    """Text before the first target, and text of the targets."""
    ids, positions = sample.input_ids, sample.target_positions
    plain = {"clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids[: positions[0]], **plain), tokenizer.decode(ids[positions], **plain)


@pytest.fixture(scope="module")
def bpe():
    return byte_level()


TEXTS = st.text(st.sampled_from("ab \n4é😀.#"), max_size=12)


@given(prompt=TEXTS, response=TEXTS)
@hypothesis_settings(max_examples=150)
def test_the_targets_are_the_response_and_its_eos(bpe, prompt, response):
    (sample,) = run(bpe, {"prompt": prompt, "completion": response})
    if not response.strip():
        assert sample == Excluded("c.jsonl:1", "empty")
        return
    before, targets = decoded(bpe, sample)
    assert (before, targets) == (prompt + "\n", response + "<eos>")
    assert sample.input_ids.tolist()[: sample.target_positions[0]] == bpe(prompt + "\n")["input_ids"]
    assert sample.target_positions.tolist() == list(range(sample.target_positions[0], len(sample.input_ids)))
    assert sample.key == sample_key(sample.input_ids, sample.target_ranges)
    assert sample.input_ids.dtype == sample.target_ranges.dtype == sample.target_positions.dtype == np.int32


def test_the_test_tokenizer_does_merge_over_the_border(bpe):
    prompt, response, whole = (bpe(text)["input_ids"] for text in ("a\n", "\n\nhello", "a\n\n\nhello"))
    assert prompt + response != whole


@pytest.mark.parametrize(
    ("post", "begins"),
    [
        (None, ""),
        ("<bos> $A", "<bos>"),
        ("<bos> $A <eos>", "<bos>"),
        ("$A <eos>", ""),
        ("<bos> <bos> $A", "<bos><bos>"),
    ],
)
def test_whatever_the_tokenizer_adds_there_is_its_prefix_and_one_eos(post, begins):
    tokenizer = byte_level(post=post)
    (sample,) = run(tokenizer, {"question": "one two", "answer": "three"})
    assert decoded(tokenizer, sample) == (begins + "one two\n", "three<eos>")
    (sample,) = run(tokenizer, {"question": "one two", "answer": "three<eos>"})
    assert decoded(tokenizer, sample) == (begins + "one two\n", "three<eos>")
    (sample,) = run(tokenizer, {"text": "one two"})
    assert tokenizer.decode(sample.input_ids) == begins + "one two<eos>"
    assert sample.target_ranges.tolist() == [[1, len(sample.input_ids)]]


@pytest.mark.parametrize("response", ["hi there", " hi", "\nhi", "hi\n a", "é"])
def test_no_space_appears_between_prompt_and_response(response):
    tokenizer = sentencepiece_like()
    (sample,) = run(tokenizer, {"prompt": "hi a", "response": response})
    assert tokenizer.decode(sample.input_ids) == f"<bos> hi a\n{response}<eos>"
    targets = sample.input_ids[sample.target_positions]
    assert tokenizer.backend_tokenizer.decode(targets, skip_special_tokens=False).lstrip(" ") == (
        f"{response.lstrip(' ')}<eos>"
    )
    whole = tokenizer(f"hi a\n{response}")["input_ids"]  # this tokenizer merges nothing over the border
    assert sample.input_ids.tolist() == [*whole, tokenizer.eos_token_id]


def test_position_zero_is_never_a_target():
    words = word_level()
    (sample,) = run(words, {"prompt": "", "completion": "one two"})
    assert sample.target_ranges.tolist() == [[1, 3]]
    assert words.convert_ids_to_tokens(sample.input_ids) == ["one", "two", "<eos>"]


@pytest.mark.parametrize("template", [MARKED, STABLE])
@pytest.mark.parametrize("make", [byte_level, word_level])
def test_the_targets_of_a_conversation_are_the_assistants_turns(make, template):
    tokenizer = make(template=template)
    (sample,) = run(tokenizer, {"messages": TALK})
    assert len(sample.target_ranges) == 2
    for turn, (start, stop) in zip(TALK[1::2], sample.target_ranges, strict=True):
        closing = "" if template == MARKED or make is word_level else "\n"
        expected = turn["content"] + ("<eos>" if make is byte_level else " <eos>") + closing
        if make is word_level:
            expected = expected.replace("😀", "<unk>")
        assert tokenizer.decode(sample.input_ids[start:stop]) == expected
        assert tokenizer.decode(sample.input_ids[:start]).rstrip().endswith("<|a|>")
    assert sample.input_ids.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]


CONTENT = st.text(st.sampled_from("ab \n4é😀"), min_size=1, max_size=8)
CHATTY = {name: byte_level(template=template) for name, template in (("marked", MARKED), ("stable", STABLE))}


def talk(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns of user and assistant as messages."""
    roles = ("user", "assistant")
    return [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
@hypothesis_settings(max_examples=75)
def test_generation_markers_agree_with_transformers(turns):
    tokenizer = CHATTY["marked"]
    messages = talk(turns)
    (sample,) = run(tokenizer, {"messages": messages})
    oracle = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert sample.input_ids.tolist() == oracle["input_ids"]
    assert sample.target_positions.tolist() == np.flatnonzero(oracle["assistant_masks"]).tolist()


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
@hypothesis_settings(max_examples=75)
def test_prefix_difference_agrees_with_token_ids_where_they_are_stable(turns):
    tokenizer = CHATTY["stable"]
    messages = talk(turns)
    (sample,) = run(tokenizer, {"messages": messages})
    whole, expected = sample.input_ids.tolist(), []
    for i in range(1, len(messages), 2):
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)["input_ids"]
        through = tokenizer.apply_chat_template(messages[: i + 1])["input_ids"]
        assert whole[: len(through)] == through
        if whole[: len(before)] != before:  # the header's newline joined the turn's first characters in one token
            assert messages[i]["content"][0] in " \n"
            before = before[: next(j for j, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)]
        expected += range(len(before), len(through))
    assert sample.target_positions.tolist() == expected


def test_a_turn_whose_border_has_no_token_is_found():
    """Where the first character of a turn belongs to no token, transformers' mask has no target at all."""
    template = MARKED.replace("{% generation %}", "{% generation %} ").replace("<eos>{% endg", "<eos> {% endg")
    tokenizer = word_level(template=template)
    (sample,) = run(tokenizer, {"messages": TALK[2:]})
    assert decoded(tokenizer, sample)[1] == "the answer is 42 . <eos>"


def test_a_pair_goes_through_the_chat_template():
    tokenizer = byte_level(post="<bos> $A <eos>", template=STABLE)
    (pair,) = run(tokenizer, {"question": TALK[0]["content"], "answer": TALK[1]["content"]})
    (talk,) = run(tokenizer, {"messages": TALK[:2]})
    assert pair.key == talk.key
    assert decoded(tokenizer, pair) == ("<|u|>\nhello<eos>\n<|a|>\n", "hi there 😀<eos>\n")


def test_what_is_no_sample_is_told_apart(bpe):
    chat = byte_level(template=MARKED)
    assert [item.reason for item in run(bpe, {"text": ""}, {"text": " \n"})] == ["empty"] * 2
    assert run(chat, {"prompt": "p", "response": " "}) == [Excluded("c.jsonl:1", "empty")]
    found = run(chat, {"messages": []}, {"messages": TALK}, {"messages": TALK[:1]})
    assert found[0] == Excluded("c.jsonl:1", "empty")
    assert found[1].source_id == "c.jsonl:2"
    assert found[2] == Excluded("c.jsonl:3", "without_targets")


def test_too_long_records(bpe):
    pairs = [("a b c", "a b c d"), ("a" * 50, "b"), ("a", "b")]
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    whole = run(bpe, *rows)
    limit = len(whole[0].input_ids) - 2
    assert [s.truncated for s in whole] == [False] * 3
    cut, lost, short = run(bpe, *rows, max_length=limit)
    assert cut.truncated
    assert cut.input_ids.tolist() == whole[0].input_ids.tolist()[:limit]
    assert cut.target_positions.tolist() == whole[0].target_positions.tolist()[:-2]
    assert cut.key != whole[0].key
    assert lost == Excluded("c.jsonl:2", "without_targets")
    assert not short.truncated
    exact = run(bpe, *rows, max_length=limit + 2)[0]
    assert (exact.key, exact.truncated) == (whole[0].key, False)
    skipped = run(bpe, *rows, max_length=limit, overlong="skip")
    assert skipped[:2] == [Excluded("c.jsonl:1", "overlong"), Excluded("c.jsonl:2", "overlong")]
    assert skipped[2].key == short.key
    with pytest.raises(CorpusError, match=rf"c.jsonl:1: {limit + 2} tokens, at most {limit} allowed"):
        run(bpe, *rows, max_length=limit, overlong="refuse")


def test_other_fields_are_carried_along(bpe):
    (sample,) = run(bpe, {"instruction": "a", "input": "b", "output": "c", "weight": 0.5, "text": "t"})
    assert sample.columns == {"weight": 0.5, "text": "t"}
    assert decoded(bpe, sample) == ("a\nb\n", "c<eos>")


def test_batches_do_not_change_samples(bpe):
    rows = [{"prompt": f"a {i}", "response": "\n" * (i % 3) + f"b {i}" * (i % 4)} for i in range(600)]
    for item, row in zip(run(bpe, *rows), rows, strict=True):
        (alone,) = run(bpe, row)
        assert type(item) is type(alone)
        assert getattr(item, "key", None) == getattr(alone, "key", None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "response": 3}], r"c.jsonl:1: field 'response' must be text, found int"),
        ([{"text": "a"}, {"text": ["a"]}], r"c.jsonl:2: field 'text' must be text, found list"),
        (
            [{"text": "a"}, {"prompt": "a", "completion": "b"}],
            r"c.jsonl:2: .*shape prompt\+completion.*corpus is text",
        ),
        ([{"text": "a"}, {"txt": "a"}], r"c.jsonl:2: found the fields txt"),
        ([{"messages": TALK}], r"'tiny' has no chat template, and the corpus has 'messages'"),
    ],
)
def test_a_record_that_does_not_fit_is_named(bpe, rows, message):
    with pytest.raises(InputError, match=message):
        run(bpe, *rows)


def test_a_tokenizer_without_eos_is_refused_unless_a_template_ends_the_turns():
    with pytest.raises(InputError, match=r"the tokenizer 'tiny' has no EOS token"):
        run(byte_level(eos=None), {"prompt": "a", "response": "b"})
    assert run(byte_level(eos=None, template=STABLE), {"prompt": "a", "response": "b"})[0].num_targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"overlong": "drop"}, "overlong must be one of truncate, skip, refuse, got 'drop'"),
        ({"prompt_field": "q"}, "give both or neither"),
        ({"chat_date": "today"}, "chat_date must be a date"),
    ],
)
def test_settings_are_checked_when_made(options, message):
    with pytest.raises(InputError, match=message):
        TokenizeSettings(**options)


def test_settings_are_json():
    chosen = TokenizeSettings(max_length=99, overlong="skip")
    assert TokenizeSettings(**json.loads(json.dumps(to_json(chosen)))) == chosen


@pytest.mark.parametrize("ranges", [[[0, 2]], [[1, 1]], [[2, 6]], [[1, 3], [3, 4]], [[3, 4], [1, 2]], [1, 2], []])
def test_a_sample_with_impossible_targets_cannot_be_made(ranges):
    target_ranges = np.array(ranges, dtype=np.int32)
    with pytest.raises(InputError, match="c:1: target ranges must be"):
        TokenizedSample("00" * 16, "c:1", np.arange(5, dtype=np.int32), target_ranges)


@pytest.mark.skipif(not GSM8K.exists(), reason=f"needs the GSM8K file at {GSM8K}")
@pytest.mark.parametrize("template", [None, MARKED])
def test_gsm8k(template):
    tokenizer = byte_level(post="<bos> $A", template=template)
    samples = list(tokenize_records(read_records(str(GSM8K)), tokenizer, TokenizeSettings()))
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == len(rows) == 1000
    header = "<bos>{}\n" if template is None else "<|u|>\n{}<eos>\n<|a|>\n"
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True), start=1):
        assert sample.source_id == f"gsm8k-1000.jsonl:{number}"
        assert decoded(tokenizer, sample) == (header.format(row["question"]), row["answer"] + "<eos>")
