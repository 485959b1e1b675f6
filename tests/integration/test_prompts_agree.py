"""`evaluate` asks with the very tokens that `build` puts before a response, though the two share no code."""

import json

import pytest

from logitcache_pipeline.corpus import read_records
from logitcache_pipeline.tokenize import TokenizeSettings, tokenize_records
from logitcache_train.answers import read_problems
from logitcache_train.demo.models import build_tokenizer
from logitcache_train.generation import encode_prompts

CHAT = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'a ' or 'is ' }}{{ m['content'] }} ; {% endfor %}"
    "{% if add_generation_prompt %}is {% endif %}"
)
RECORDS = [
    {"prompt": "a 3 b + 5 ?", "response": "the answer is 1"},
    {"question": "a 4 b * 2 ?", "answer": "the answer is 1"},
    {"instruction": "a 4 ?", "input": "b * 2", "output": "the answer is 1"},
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "+".join(record))
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_the_prompt_is_what_the_teacher_saw_before_the_first_target(tmp_path, record, template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    path = str(tmp_path / "data.jsonl")
    [sample] = tokenize_records(read_records(path), tokenizer, TokenizeSettings())
    [prompt] = encode_prompts(tokenizer, read_problems(path))
    assert prompt == sample.input_ids[: sample.target_positions[0]].tolist()
