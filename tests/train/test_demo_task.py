"""The demo's corpus against an evaluator of the printed text that shares no code with the generator."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache_storage.errors import InputError
from logitcache_train.demo import task

RESULT = re.compile(r"(\d) ([-+*]) (\d) (?:=|gives|makes|get|->|yields) (\d)")


def answer_of_prompt(prompt: str) -> int:
    """Python evaluates the chain as one bracketed expression; modulo 7 only at the end."""
    first, start, *rest = prompt.removesuffix(" ?").split()
    assert first == "a"
    assert rest[0::3] == list("bcd")[: len(rest) // 3]
    expression = start
    for op, operand in zip(rest[1::3], rest[2::3], strict=True):
        expression = f"({expression}) {op} {operand}"
    return eval(expression) % 7


def test_answers_are_those_of_the_prompt_text() -> None:
    for record in task.CORPUS.records(500, seed=3):
        assert int(record["answer"]) == answer_of_prompt(record["prompt"])


@given(seed=st.integers(0, 10_000), terse=st.sampled_from([0.0, 0.5, 1.0]))
def test_flawless_demonstrations_end_in_the_answer(seed: int, terse: float) -> None:
    for record in task.Author(terse=terse, num_operations=(1, 2, 3)).records(5, seed=seed):
        assert re.findall(r"\d+", record["response"])[-1] == record["answer"]


def test_a_wrong_step_is_carried_on() -> None:
    for record in task.CORPUS.records(300, seed=5):
        steps = RESULT.findall(record["response"])
        assert len(steps) == record["prompt"].count(" ") // 3
        for (*_, result), (x, *_) in itertools.pairwise(steps):
            assert x == result
        assert re.findall(r"\d", record["response"])[-1] == steps[-1][3]


@pytest.mark.parametrize(("author", "rate"), [(task.TEACHER, 0.05), (task.BASE, 0.1), (task.CORPUS, 0.3)])
def test_share_of_wrong_steps(author: task.Author, rate: float) -> None:
    steps = [s for r in author.records(2000, seed=7) for s in RESULT.findall(r["response"])]
    wrong = sum(eval(f"{x} {op} {y}") % 7 != int(result) for x, op, y, result in steps)
    # Five standard deviations of a binomial.
    assert abs(wrong / len(steps) - rate) < 5 * (rate * (1 - rate) / len(steps)) ** 0.5


def test_shares_of_operations_and_styles() -> None:
    records = task.BASE.records(2000, seed=1)
    prompts = "".join(r["prompt"] for r in records)
    products = prompts.count("*") / len(re.findall(r"[-+*]", prompts))
    assert products == pytest.approx(0.2 / 8.2, abs=0.012)
    assert sum("|" in r["response"] for r in records) / len(records) == pytest.approx(0.1, abs=0.034)
    assert all("|" in r["response"] for r in task.UNSEEN_STYLE_CORPUS.records(50, seed=1))
    assert not any("|" in r["response"] for r in task.TEACHER.records(200, seed=1))


def test_records_are_a_pure_function_of_the_seed() -> None:
    assert task.CORPUS.records(20, seed=4) == task.CORPUS.records(20, seed=4)
    assert task.CORPUS.records(20, seed=4) != task.CORPUS.records(20, seed=5)
    assert task.CORPUS.records(20, seed=4) == task.CORPUS.records(30, seed=4)[:20]


def test_excluded_prompts_do_not_occur() -> None:
    short = task.Author(num_operations=(1,))
    taken = {r["prompt"] for r in short.records(100, seed=0)}
    fresh = short.records(200, seed=0, exclude=taken)
    assert len(fresh) == 200
    assert not taken & {r["prompt"] for r in fresh}


def test_held_out_problems_have_three_operations() -> None:
    for record in task.HELD_OUT.records(50, seed=0):
        assert len(record["prompt"].split()) == 2 + 3 * 3 + 1


def test_vocabulary_holds_every_word_and_the_longest_response() -> None:
    words = set(task.vocabulary())
    for author in (task.CORPUS, task.UNSEEN_STYLE_CORPUS):
        records = author.records(500, seed=2)
        assert words >= {word for r in records for word in f"{r['prompt']} {r['response']}".split()}
        assert max(len(r["response"].split()) + 1 for r in records) <= task.MAX_RESPONSE_TOKENS


def test_jsonl_round_trip(tmp_path) -> None:
    records = task.CORPUS.records(3, seed=0)
    task.write_jsonl(tmp_path / "train.jsonl", records)
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == records


@pytest.mark.parametrize(
    "wrong", [{"wrong_steps": 1.5}, {"terse": -0.1}, {"num_operations": ()}, {"num_operations": (4,)}]
)
def test_impossible_authors_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        task.Author(**wrong)
