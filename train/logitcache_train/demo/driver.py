"""The demo itself: makes a corpus and two models, then runs every command on them as a user would.

DIR/demo.json        the settings; marks the folder as a demo's
DIR/train.jsonl      the noisy demonstrations    DIR/held_out.jsonl   problems that no model has met
DIR/teacher DIR/base checkpoints                 DIR/cache            the teacher's log-probs
DIR/students/NAME    one checkpoint a method     DIR/results.json     all numbers of the run
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from logitcache_storage.errors import InputError
from logitcache_train.demo import task
from logitcache_train.demo.models import Pretraining, pretrain_in_parallel
from logitcache_train.demo.report import Score, caveats, findings, score_table, seconds_table
from logitcache_train.demo.steps import Steps, shell_line

MARKER = "demo.json"
TEACHER_TOP_K, NUM_WORKERS = 16, 2
NUM_RECORDS, NUM_HELD_OUT = 1500, 200
NUM_STEPS, BATCH_SIZE = 150, 32
NUM_SAMPLES, TEMPERATURE = 16, 1.0


@dataclass(frozen=True)
class Demo:
    """What to run, and where its files go."""

    output: Path
    seed: int = 0
    unseen_style: bool = False
    """Write the corpus in a style that the teacher has never met."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"--seed must be 0 or more, got {self.seed}")

    @property
    def corpus(self) -> Path:
        """The demonstrations that students are trained on."""
        return self.output / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """The problems that models are evaluated on."""
        return self.output / "held_out.jsonl"

    @property
    def cache(self) -> Path:
        """The cache of the teacher's log-probs over the corpus."""
        return self.output / "cache"

    def seed_of(self, role: int) -> int:
        """A seed of its own for each random thing; runs with neighbouring seeds share none."""
        return 10 * self.seed + role


@dataclass(frozen=True)
class Method:
    """An objective and the settings it is trained with."""

    objective: str
    learning_rate: float
    parameters: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """The title of its training among the demo's parts."""
        return f"train a student with {self.objective}"


METHODS = (
    Method("sft", 1e-3),
    Method("dft", 1e-3),
    Method("kd", 3e-3),
    Method("target_sft", 1e-3, ("--eta", "0.5")),
)


def run_demo(demo: Demo, console: Console) -> None:
    """Run every part, print the table, write `results.json`.

    An earlier demo in the same folder is replaced: the files that it made are removed, others stay.

    Raises:
        InputError: the folder holds something else.
        StepError: one of the commands failed.
    """
    prepare_folder(demo)
    # At this size a second thread costs more than it brings: on a busy machine, 40 s instead of 11 for one training.
    steps = Steps(console, {"OMP_NUM_THREADS": "1"})
    with steps.part("write the corpus and the held-out problems"):
        held_out_prompts = _write_data(demo)
    with steps.part("pre-train a teacher and a base student from scratch, side by side"):
        num_parameters = _pretrain(demo, held_out_prompts, console)
    with steps.part("ask the teacher once: build the cache"):
        steps.command("build", *_build_arguments(demo))
    with steps.part("look at the cache"):
        steps.command("status", demo.cache)
        steps.command("inspect", demo.cache, "--sample", _first_slip(demo))
        steps.command("stats", demo.cache)
    for method in METHODS:
        with steps.part(method.part):
            steps.command("train", *_train_arguments(demo, method))
    with steps.part("evaluate all models on the held-out problems"):
        scores = [_evaluate(demo, name, steps) for name in ("teacher", "base")]
        scores += [_evaluate_student(demo, method, steps) for method in METHODS]
    sentences = [
        *findings(scores[1], scores[2:]),
        *caveats(num_parameters=num_parameters, num_problems=NUM_HELD_OUT, unseen_style=demo.unseen_style),
    ]
    _write_results(demo, scores, steps, sentences, num_parameters)
    _print_results(demo, scores, steps, sentences, console)


def prepare_folder(demo: Demo) -> None:
    """Make the folder, or clear an earlier demo out of it.

    Raises:
        InputError: it is a file, or a folder with something else in it.
    """
    folder = demo.output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder with --output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise InputError(f"{folder} is not empty and holds no earlier demo; choose another folder with --output")
    made = [
        demo.corpus,
        demo.held_out,
        demo.cache,
        *(folder / name for name in ("teacher", "base", "results.json")),
    ]
    for path in [*made, *(_student_folder(demo, method) for method in METHODS)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / MARKER, _settings(demo))


def _write_data(demo: Demo) -> frozenset[str]:
    held_out = task.HELD_OUT.records(NUM_HELD_OUT, seed=demo.seed_of(0))
    prompts = frozenset(record["prompt"] for record in held_out)
    author = task.UNSEEN_STYLE_CORPUS if demo.unseen_style else task.CORPUS
    task.write_jsonl(demo.held_out, held_out)
    task.write_jsonl(demo.corpus, author.records(NUM_RECORDS, seed=demo.seed_of(1), exclude=prompts))
    return prompts


def _pretrain(demo: Demo, held_out: frozenset[str], console: Console) -> int:
    configs = {
        "teacher": Pretraining(task.TEACHER, seed=demo.seed_of(2), exclude=held_out),
        "base": Pretraining(task.BASE, seed=demo.seed_of(3), exclude=held_out),
    }
    num_steps = configs["base"].num_steps
    console.print(Text(f"   {num_steps:,} steps each, a process and a core each; about a minute on two idle cores"))
    made = pretrain_in_parallel(list(configs.values()), [demo.output / name for name in configs])
    for name, model in zip(configs, made, strict=True):
        line = f"   {demo.output / name}: {model.num_parameters:,} parameters, loss {model.loss:.3f} nats/token"
        console.print(Text(line), soft_wrap=True)
    return made[0].num_parameters


def _first_slip(demo: Demo) -> int:
    """The first demonstration with a wrong answer, where it shows what the teacher thinks of a slip."""
    records = [json.loads(line) for line in demo.corpus.read_text().splitlines()]
    return next((i for i, r in enumerate(records) if r["answer"] not in r["response"].split()[-2:]), 0)


def _build_arguments(demo: Demo) -> list[object]:
    return [
        *("--teacher", demo.output / "teacher", "--data", demo.corpus, "--cache", demo.cache),
        *("--k", TEACHER_TOP_K, "--workers", NUM_WORKERS),
    ]


def _train_arguments(demo: Demo, method: Method) -> list[object]:
    return [
        *("--student", demo.output / "base", "--cache", demo.cache),
        *(
            "--objective",
            method.objective,
            *method.parameters,
            "--learning_rate",
            f"{method.learning_rate:g}",
        ),
        *("--output", _student_folder(demo, method), "--seed", demo.seed_of(4)),
        *("--max_steps", NUM_STEPS, "--per_device_train_batch_size", BATCH_SIZE, "--warmup_steps", 10),
        *("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'),
        *("--adam_beta2", 0.98, "--weight_decay", 0, "--max_grad_norm", 1, "--logging_steps", NUM_STEPS // 3),
    ]


def _evaluate_arguments(demo: Demo, model: Path) -> list[object]:
    return [
        *("--model", model, "--data", demo.held_out, "--samples", NUM_SAMPLES),
        *("--temperature", f"{TEMPERATURE:g}", "--max-new-tokens", task.MAX_RESPONSE_TOKENS),
    ]


def _evaluate(demo: Demo, name: str, steps: Steps, folder: Path | None = None) -> Score:
    printed = steps.output_of("evaluate", *_evaluate_arguments(demo, folder or demo.output / name), "--json")
    found = json.loads(printed)
    return Score(name, 100 * found["average"], 100 * found["standard_error"], 100 * found["greedy"])


def _evaluate_student(demo: Demo, method: Method, steps: Steps) -> Score:
    score = _evaluate(demo, method.objective, steps, _student_folder(demo, method))
    seconds = steps.seconds[method.part]
    return dataclasses.replace(score, learning_rate=method.learning_rate, train_seconds=seconds)


def _student_folder(demo: Demo, method: Method) -> Path:
    return demo.output / "students" / method.objective


def _settings(demo: Demo) -> dict[str, object]:
    return {"seed": demo.seed, "unseen_style": demo.unseen_style}


def _write_results(demo: Demo, scores: list[Score], steps: Steps, sentences: list[str], num_parameters: int) -> None:
    results = {
        "settings": _settings(demo),
        "num_parameters": num_parameters,
        "scores": [dataclasses.asdict(score) for score in scores],
        "seconds": steps.seconds,
        "sentences": sentences,
    }
    _write_json(demo.output / "results.json", results)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _print_results(demo: Demo, scores: list[Score], steps: Steps, sentences: list[str], console: Console) -> None:
    console.print(Text(f"\nAccuracy on {NUM_HELD_OUT} held-out problems, percent", style="bold"))
    console.print(score_table(scores, num_samples=NUM_SAMPLES, temperature=TEMPERATURE))
    console.print()
    for sentence in sentences:
        console.print(Text(f"- {sentence}"))
    console.print(Text("\nTime", style="bold"))
    console.print(seconds_table(steps.seconds))
    console.print(Text(f"\nEverything is in {demo.output}. To try next:", style="bold"), soft_wrap=True)
    for words in _next_commands(demo):
        console.print(Text(f"$ {shell_line([str(word) for word in words])}", style="cyan"), soft_wrap=True)


def _next_commands(demo: Demo) -> list[list[object]]:
    hybrid = Method("kd_hybrid", 3e-3)
    return [
        ["inspect", demo.cache, "--sample", 7, "--top", 8],
        ["verify", demo.cache, "--deep"],
        ["objectives"],
        ["train", *_train_arguments(demo, hybrid)],
        ["evaluate", *_evaluate_arguments(demo, _student_folder(demo, hybrid))],
    ]
