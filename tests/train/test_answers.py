"""Records to problems, and responses to right or wrong."""

import gzip
import json

import pytest

from logitcache_storage.errors import CorpusError, InputError
from logitcache_train.answers import find_answer, is_correct, read_problems


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"prompt": "a", "answer": "5"}, "a", "5"),
        ({"prompt": "a", "response": "so it is 3 , then 4", "answer": 7}, "a", "7"),
        ({"prompt": "a", "completion": "1 + 1 = 2."}, "a", "2"),
        ({"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "How many?", "1,004"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2", "3"),
        ({"instruction": "Name it.", "output": "the red house"}, "Name it.", "the red house"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "is 9"}]}, "hi", "9"),
    ],
)
def test_records_become_problems(tmp_path, record, prompt, answer):
    [problem] = read_problems(write(tmp_path / "p.jsonl", record))
    assert (problem.prompt, problem.answer) == (prompt, answer)


def test_a_conversation_is_kept_up_to_its_last_turn(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "8"},
    ]
    [problem] = read_problems(write(tmp_path / "p.jsonl", {"messages": turns}))
    assert list(problem.messages) == turns[:-1] and problem.answer == "8"


def test_fields_and_limit_can_be_named(tmp_path):
    path = write(tmp_path / "p.jsonl", {"q": "a", "gold": "1"}, {"q": "b", "gold": "2"}, {"q": "c", "gold": "3"})
    found = read_problems(path, limit=2, prompt_field="q", answer_field="gold")
    assert [(p.prompt, p.answer) for p in found] == [("a", "1"), ("b", "2")]


def test_compressed_files_and_empty_lines_are_read(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as f:
        f.write('\n{"prompt": "a", "answer": "1"}\n\n')
    assert len(read_problems(str(tmp_path / "p.jsonl.gz"))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "1"}\n{"prompt"', "line 2: not valid JSON"),
        ("[1]\n", "line 1: expected a JSON object"),
        ('{"answer": "1"}\n', "line 1: no text in a field prompt or instruction or question; fields: answer;"),
        ('{"prompt": "a"}\n', "line 1: no text in a field answer or"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "must end with a turn of the assistant"),
        ('{"messages": [{"role": "user"}, 3]}\n', "a message must be an object with the texts role and content"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(CorpusError) as e:
        read_problems(str(tmp_path / "p.jsonl"))
    assert message in str(e.value) and "p.jsonl" in str(e.value)


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.jsonl: cannot be read"):
        read_problems(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"p.jsonl: no problems"):
        read_problems(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("the answer is 5", "5", True),
        ("the answer is 5 .", "5", True),
        ("5 is what I would say, but no: 6", "5", False),
        ("10-3 makes 7", "7", True),
        ("it is -3", "-3", True),
        ("so 5-3", "3", True),
        ("#### 72\nand 9 more", "72", True),
        ("#### 1,000", "1000", True),
        ("costs $1,000.00", "1000", True),
        ("0.50", ".5", True),
        ("72.", "72", True),
        ("about 71.5", "72", False),
        ("no number at all", "3", False),
        ("", "3", False),
        ("it is the red house.", "the red house", True),
        ("it is the red  house", "the red house", True),
        ("it is a house", "the red house", False),
        ("#### Paris", "Paris", True),
        ("", "Paris", False),
    ],
)
def test_right_and_wrong(response, answer, right):
    assert is_correct(response, answer) is right


def test_a_reference_says_its_answer_by_mark_then_number_then_all_of_it():
    assert find_answer("3 4 #### 5\n") == "5"
    assert find_answer("from 3 to 4, so 7.") == "7"
    assert find_answer(" New York ") == "New York"
