"""Records to problems, and responses to right or wrong as numbers and words."""

import gzip
import json

import pytest

from logitcache_storage.errors import CorpusError, InputError
from logitcache_train.answers import find_answer, find_marked, is_exact, read_problems


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "prompt", "reference"),
    [
        ({"prompt": "a", "answer": "5"}, "a", "5"),
        ({"prompt": "a", "response": "so it is 3 , then 4", "answer": 7}, "a", "7"),
        ({"prompt": "a", "completion": "1 + 1 = 2."}, "a", "1 + 1 = 2."),
        ({"question": "How many?", "answer": "2+2=4\n#### 1,004"}, "How many?", "2+2=4\n#### 1,004"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2", "3"),
        ({"instruction": "Name it.", "output": "the red house"}, "Name it.", "the red house"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "is 9"}]}, "hi", "is 9"),
    ],
)
def test_records_become_problems(tmp_path, record, prompt, reference):
    [problem] = read_problems(write(tmp_path / "p.jsonl", record))
    assert (problem.prompt, problem.reference) == (prompt, reference)


def test_a_conversation_is_kept_up_to_its_last_turn(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "8"},
    ]
    [problem] = read_problems(write(tmp_path / "p.jsonl", {"messages": turns}))
    assert list(problem.messages) == turns[:-1] and problem.reference == "8"


def test_fields_and_limit_can_be_named(tmp_path):
    path = write(tmp_path / "p.jsonl", {"q": "a", "gold": "1"}, {"q": "b", "gold": "2"}, {"q": "c", "gold": "3"})
    found = read_problems(path, limit=2, prompt_field="q", answer_field="gold")
    assert [(p.prompt, p.reference) for p in found] == [("a", "1"), ("b", "2")]


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
    ("response", "reference", "right"),
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
        # Marks and boxes.
        (r"so \boxed{72}, as 3 of 4 say", "#### 72", True),
        (r"\boxed{\$1,000}", "it costs 1000", True),
        (r"\boxed{50\%}", "50%", True),
        (r"first \boxed{3}, no, \boxed{4}", "4", True),
        (r"\boxed{3} #### 4", "4", True),
        (r"#### 3 \boxed{4}", r"\boxed{4}", True),
        (r"\boxed{\text{Paris}}", "Paris", True),
        (r"\boxed{A}", "A", True),
        (r"\boxed{A}", "B", False),
        # Fractions are one number, and so is neither of their parts.
        ("it is 3/4", "3/4", True),
        ("it is 0.75", "3/4", True),
        ("it is 4", "3/4", False),
        ("48/2", "24", True),
        ("5/0", "5", False),
        # The digits of a formula are no answers.
        ("so 2", r"\frac{1}{2}", False),
        (r"$\frac{1}{2}$", r"$\frac{1}{2}$", True),
    ],
)
def test_right_and_wrong(response, reference, right):
    assert is_exact(response, reference) is right


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("no mark", None),
        ("#### 5 \nmore", "5"),
        ("####", ""),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {a} \fboxed{b}", "b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ \boxed{7} and \boxed{8", "7"),
        (r"\boxed{never closed", None),
        (r"}}} \boxed{7} }", "7"),
    ],
)
def test_marks_are_found_whatever_braces_stand_around_them(text, marked):
    assert find_marked(text) == marked


def test_long_and_hostile_responses_take_no_time():
    """200,000 characters each; anything quadratic would take minutes."""
    for piece in ("{", r"\boxed{", "1", "1,", ".", "-", "#", "$", " ", "}", "1/"):
        text = piece * (200_000 // len(piece))
        assert not is_exact(text, "#### 5")
        assert not is_exact(text, "Paris")
    assert is_exact("9" * 5000, "9" * 5000) and not is_exact("9" * 5000, "9" * 5001)


def test_a_reference_says_its_answer_by_mark_then_number_then_all_of_it():
    assert find_answer("3 4 #### 5\n") == "5"
    assert find_answer(r"3 \boxed{4}, 5") == "4"
    assert find_answer("from 3 to 4, so 7.") == "7"
    assert find_answer(r"\sqrt{2}") == r"\sqrt{2}"
    assert find_answer(" New York ") == "New York"
