"""`logitcache evaluate` as users type it."""

import json
from pathlib import Path

import pytest

from logitcache_storage.cli import main


@pytest.fixture(scope="module")
def student(tmp_path_factory, make_llama, tokenizer):
    folder = tmp_path_factory.mktemp("student")
    make_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(student, tmp_path):
    data = tmp_path / "problems.jsonl"
    texts = ["a 3 b + 5", "c * 2", "d - 4 a", "2 + 2"]
    data.write_text("".join(json.dumps({"prompt": text, "answer": "#### 3"}) + "\n" for text in texts))
    return ["evaluate", "--model", str(student), "--data", str(data), "--samples", "3", "--max-new-tokens", "4"]


def report(words, capsys):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_as_json(words, capsys):
    found = report(words, capsys)
    assert (found["num_problems"], found["num_samples"], found["compare"]) == (4, 3, "exact")
    assert found["confidence_95"][0] <= found["average"] <= found["confidence_95"][1]
    assert found["greedy_confidence_95"][0] <= found["greedy"] <= found["greedy_confidence_95"][1]
    assert found["generated_tokens"] == pytest.approx(found["tokens_per_second"] * found["seconds"])
    assert {"standard_error", "greedy_standard_error", "cut_responses", "undecided_responses"} <= found.keys()


def test_a_table_for_people(words, capsys):
    assert main([*words, "--limit", "2", "--max-new-tokens", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Average@3" in shown and "2 of" in shown and "greedy" in shown
    assert "of 8 responses did not end within 1 tokens" in shown


def test_files_hold_the_numbers_and_every_response(words, tmp_path, capsys):
    output, details = tmp_path / "found.json", tmp_path / "details.jsonl"
    found = report([*words, "--output", str(output), "--details", str(details)], capsys)
    assert json.loads(output.read_text()) == found
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert [line["messages"][-1]["content"] for line in lines] == ["a 3 b + 5", "c * 2", "d - 4 a", "2 + 2"]
    assert all(line["reference"] == "#### 3" and len(line["samples"]) == 3 for line in lines)
    shares = [sum(s["right"] for s in line["samples"]) / 3 for line in lines]
    assert [line["share_right"] for line in lines] == shares
    assert found["average"] == pytest.approx(sum(shares) / 4)
    assert found["greedy"] == pytest.approx(sum(line["greedy"]["right"] for line in lines) / 4)


def test_the_seed_and_not_the_batch_size_decides(words, tmp_path, capsys):
    def responses(*more):
        details = tmp_path / "details.jsonl"
        report([*words, "--details", str(details), *more], capsys)
        return [[s["text"] for s in json.loads(line)["samples"]] for line in details.read_text().splitlines()]

    first = responses()
    assert responses("--batch-size", "2") == first
    assert responses("--seed", "1") != first


def test_a_single_problem_has_no_standard_error_and_still_an_interval(words, tmp_path, capsys):
    found = report([*words, "--limit", "1", "--output", str(tmp_path / "one.json")], capsys)
    assert found["standard_error"] is None and found["confidence_95"][0] < found["confidence_95"][1]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder where even root cannot write")
def test_what_was_found_is_said_even_where_it_cannot_be_written(words, capsys):
    assert main([*words, "--limit", "1", "--output", "/proc/self/found.json"]) == 1
    said = capsys.readouterr()
    assert "greedy" in said.out and "/proc/self/found.json: cannot be written:" in said.err


def test_answers_can_be_compared_as_mathematics(student, tmp_path, capsys):
    """Numbers that this student says; then the same again, with each as a LaTeX fraction of twice the number."""
    data, details = tmp_path / "problems.jsonl", tmp_path / "details.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"a {n} + 2", "answer": "0"}) + "\n" for n in range(2, 9)))
    words = ["evaluate", "--model", str(student), "--data", str(data), "--samples", "4"]
    words += ["--max-new-tokens", "1", "--details", str(details)]
    report(words, capsys)
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    said = [[s["text"] for s in line["samples"] if s["text"].isdigit()] for line in lines]
    assert any(said)
    records = [
        {"prompt": line["messages"][0]["content"], "answer": rf"\frac{{{2 * int(texts[0])}}}{{2}}" if texts else "x+1"}
        for line, texts in zip(lines, said, strict=True)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    as_words, as_maths = report(words, capsys), report([*words, "--compare", "math"], capsys)
    assert as_words["average"] == 0 and as_maths["compare"] == "math"
    right = sum(texts.count(texts[0]) for texts in said if texts)
    assert as_maths["average"] == pytest.approx(right / (4 * len(lines)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--samples", "0", "--model", "./nobody"], "--samples must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--model", "./nobody"], "--model ./nobody: no such folder"),
        (["--data", "nothing.jsonl"], "nothing.jsonl: cannot be read"),
        (
            ["--output", "no/such/folder/found.json"],
            "--output no/such/folder/found.json: lies in no folder that is there",
        ),
        (["--details", "."], "--details .: is a folder"),
        (["--compare", "guess"], "invalid choice: 'guess'"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_generated(words, more, message, capsys):
    assert main([*words, *more]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out
