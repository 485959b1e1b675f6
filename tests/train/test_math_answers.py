"""Answers as mathematics: what is the same, what is not, and what must not hold an evaluation up."""

import subprocess
import sys
import threading
import time

import pytest

from logitcache_storage.errors import LogitCacheError
from logitcache_train import math_answers
from logitcache_train.math_answers import MathComparison


@pytest.fixture(scope="module")
def compare():
    with MathComparison(seconds=30) as comparison:
        yield comparison


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("1/2", r"\boxed{0.5}"),
        ("0.5", r"so it is $\frac{1}{2}$"),
        (r"\frac{1}{2}", "the answer is 1/2"),
        (r"$\frac{1}{2}$", r"\boxed{\frac12}"),
        ("x = 3, so\n#### 1,000", "it is 1000"),
        ("1000", r"\boxed{1{,}000}"),
        ("1000", "She has $1,000"),
        ("50%", r"\boxed{50\%}"),
        ("50%", "it is 0.5"),
        ("50", "50 percent"),
        ("5 cm", r"\boxed{5\text{ cm}}"),
        ("5", r"\boxed{5\,\mathrm{cm}}"),
        ("3 apples", r"\boxed{3}"),
        ("(0,1]", r"\boxed{(0, 1]}"),
        (r"(-\infty, 3)", r"\boxed{(-\infty,3)}"),
        (r"\{1,2\}", r"\boxed{2,1}"),
        ("x^2+2x+1", "$(x+1)^2$"),
        ("x=3", r"\boxed{3}"),
        (r"2\pi", r"\boxed{6.283185307}"),
        (r"\sqrt{2}/2", r"\boxed{\frac{1}{\sqrt{2}}}"),
        ("The first gets 4 and the second 5, so 9 together.", "#### 9"),
        ("Paris", r"\boxed{\text{Paris}}"),
        ("A", "the answer is A"),
        ("5", r"\boxed{5}}}}"),
    ],
)
def test_the_same_mathematics(compare, reference, response):
    assert compare(response, reference) is True


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("1/2", r"\boxed{0.2}"),
        (r"\frac{1}{2}", "so it is 2"),
        ("1,000", "1 and then 000"),
        ("[0,1]", r"\boxed{(0, 1]}"),
        (r"\{1,2\}", r"\boxed{1,3}"),
        ("x^2+2x+1", "$(x-1)^2$"),
        ("-3", r"\boxed{3}"),
        ("1/3", "0.333"),
        ("Paris", r"\boxed{pairs}"),
        ("A", r"\boxed{B}"),
        ("5", ""),
        ("5", "no number"),
    ],
)
def test_other_mathematics(compare, reference, response):
    assert compare(response, reference) is False


@pytest.mark.parametrize(
    "response",
    [
        "5" * 1_000_000,
        "{" * 200_000,
        r"\boxed{" * 20_000,
        r"\frac{" * 2_000,
        "(" * 2_000 + "6" + ")" * 2_000,
        "$" * 4_001,
        r"\boxed{" + "9" * 6_000 + "}",
        "a\x00b \ud800 6\r\n6",
    ],
    ids=lambda text: text[:8].encode("unicode_escape").decode(),
)
def test_long_and_broken_responses_are_wrong(compare, response):
    assert compare(response, "5") is False


@pytest.mark.parametrize("response", [r"\boxed{10^{10^{10}}}", "so 10**10**10**10"])
def test_what_would_take_for_ever_is_undecided_and_the_next_comparison_works(response):
    with MathComparison(seconds=0.5) as comparison:
        comparison("6", "5.5")  # Starts the process, which is not what is timed.
        start = time.monotonic()
        assert comparison(response, "5") is None
        assert time.monotonic() - start < 15
        # No second wait for the same answer.
        start = time.monotonic()
        assert comparison(response, "5") is None
        assert time.monotonic() - start < 0.4
        comparison._seconds = 30
        assert comparison(r"\boxed{\frac{10}{2}}", "5.0") is True


def test_a_process_that_dies_leaves_one_comparison_undecided_and_the_last_ends_with_the_block():
    with MathComparison(seconds=30) as comparison:
        assert comparison("$6/3$", "2.0") is True
        comparison._process.kill()
        comparison._process.wait()
        assert comparison("$8/4$", "2.0") is None
        assert comparison("$10/5$", "2.0") is True
        last = comparison._process
        assert last.poll() is None
    assert last.poll() is not None


def test_any_thread_may_compare(compare):
    found = []
    thread = threading.Thread(target=lambda: found.append(compare(r"\boxed{\frac{3}{6}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_process_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(math_answers, "_WORKER", broken)
    with (
        MathComparison() as comparison,
        pytest.raises(LogitCacheError, match=r"does not start; to see why, run: .*worker"),
    ):
        comparison("$6/3$", "2.0")


def test_the_worker_imports_nothing_of_this_project():
    """It starts anew after every answer that takes too long, so it must not bring torch."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); import math_verify; print(*sys.modules)"
    words = [sys.executable, "-P", "-c", code, str(math_answers._WORKER)]
    modules = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert "math_verify" in modules and not [m for m in modules if m.split(".")[0] in ("torch", "logitcache_train")]
