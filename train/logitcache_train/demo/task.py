"""The demo's corpus: chained arithmetic modulo 7, written out word by word, with answers that can be checked.

    prompt      a 3 b + 5 c * 2 d - 4 ?
    response    is b : 3 + 5 = 1 . then c : 1 * 2 gives 2 ; so d : 2 - 4 makes 5 . the answer is 5

The first two words give `a`; each further letter applies an operation to the letter before it.
Demonstrations are noisy: a step's result may be wrong, and the chain then goes on from the wrong value.
Each step is phrased in one of several ways, so that no single token is "the" right one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from logitcache_storage.errors import InputError

MODULUS = 7
MAX_OPERATIONS = 3
MAX_RESPONSE_TOKENS = 9 * MAX_OPERATIONS + 5
"""Nine words a step, at most four for the ending, and the end-of-text token."""

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: (x + y) % MODULUS,
    "-": lambda x, y: (x - y) % MODULUS,
    "*": lambda x, y: (x * y) % MODULUS,
}
_LETTERS = "abcd"
_PLAIN_STEPS = (
    "is {letter} : {x} {op} {y} = {result} .",
    "then {letter} : {x} {op} {y} gives {result} ;",
    "so {letter} : {x} {op} {y} makes {result} .",
    "now {letter} : {x} {op} {y} get {result} ;",
)
_PLAIN_ENDINGS = ("answer {result}", "the answer is {result}", "result : {result}")
_TERSE_STEPS = ("hmm {letter} | {x} {op} {y} -> {result} !", "ok {letter} | {x} {op} {y} yields {result} !")
_TERSE_ENDINGS = ("final -> {result} !",)


@dataclass(frozen=True)
class Problem:
    """A start value and one to three operations on it, all operands in 0..6."""

    start: int
    operations: tuple[str, ...]
    operands: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The problem as words, `?` last."""
        steps = zip(_LETTERS[1:], self.operations, self.operands, strict=False)
        return " ".join(["a", str(self.start), *(f"{letter} {op} {y}" for letter, op, y in steps), "?"])

    @property
    def answer(self) -> int:
        """The value of the last letter, 0..6."""
        value = self.start
        for op, y in zip(self.operations, self.operands, strict=True):
            value = OPERATIONS[op](value, y)
        return value


@dataclass(frozen=True)
class Author:
    """Whose demonstrations they are: which problems, how often a step is wrong, in which style."""

    operation_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Relative frequencies of `+`, `-`, `*`."""
    wrong_steps: float = 0.0
    """Probability that a step's result is wrong (uniform over the other six values)."""
    terse: float = 0.0
    """Probability that a demonstration is in the terse style instead of the plain one."""
    num_operations: tuple[int, ...] = (2, 3)
    """Lengths of chains, uniformly chosen."""

    def __post_init__(self) -> None:
        for name in ("wrong_steps", "terse"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.num_operations or not all(1 <= n <= MAX_OPERATIONS for n in self.num_operations):
            raise InputError(f"num_operations must be between 1 and {MAX_OPERATIONS}, got {self.num_operations}")

    def problem(self, rng: random.Random) -> Problem:
        """Draw a problem."""
        n = rng.choice(self.num_operations)
        start, *operands = (rng.randrange(MODULUS) for _ in range(n + 1))
        return Problem(start, tuple(rng.choices(list(OPERATIONS), self.operation_weights, k=n)), tuple(operands))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """Write out a solution, slips included; its last number is what the author takes for the answer."""
        terse = rng.random() < self.terse
        steps, endings = (_TERSE_STEPS, _TERSE_ENDINGS) if terse else (_PLAIN_STEPS, _PLAIN_ENDINGS)
        value, words = problem.start, []
        for letter, op, y in zip(_LETTERS[1:], problem.operations, problem.operands, strict=False):
            result = OPERATIONS[op](value, y)
            if rng.random() < self.wrong_steps:
                result = (result + rng.randrange(1, MODULUS)) % MODULUS
            words.append(rng.choice(steps).format(letter=letter, x=value, op=op, y=y, result=result))
            value = result
        return " ".join([*words, rng.choice(endings).format(result=value)])

    def records(self, num_records: int, *, seed: int, exclude: Collection[str] = frozenset()) -> list[dict[str, str]]:
        """Demonstrations as `prompt`, `response` and the true `answer`: a pure function of the arguments.

        Args:
            num_records: how many.
            seed: of the random draws.
            exclude: prompts that must not occur, such as those held out for evaluation.
        """
        rng = random.Random(seed)
        records: list[dict[str, str]] = []
        while len(records) < num_records:
            problem = self.problem(rng)
            response = self.demonstrate(problem, rng)
            if problem.prompt not in exclude:
                records.append({"prompt": problem.prompt, "response": response, "answer": str(problem.answer)})
        return records


TEACHER = Author(wrong_steps=0.05)
BASE = Author(operation_weights=(4.0, 4.0, 0.2), wrong_steps=0.1, terse=0.1)
"""Rarely shown a multiplication, so that about half of its answers are right before any fine-tuning.

The weight 0.2 was set by that accuracy. It matters: with 0.3 the base is right 58 to 69% of the time, and dft and
target_sft then ended level on two of three seeds.
"""
CORPUS = Author(wrong_steps=0.3)
UNSEEN_STYLE_CORPUS = Author(wrong_steps=0.3, terse=1.0)
"""The corpus in a style that the base student has met and the teacher never has."""
HELD_OUT = Author(num_operations=(MAX_OPERATIONS,))


def vocabulary() -> list[str]:
    """Every word that a prompt or a response can hold, in a fixed order."""
    templates = " ".join(_PLAIN_STEPS + _PLAIN_ENDINGS + _TERSE_STEPS + _TERSE_ENDINGS)
    phrasing = [word for word in templates.split() if not word.startswith("{")]
    return list(dict.fromkeys([*map(str, range(MODULUS)), *OPERATIONS, *_LETTERS, "?", *phrasing]))


def write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
