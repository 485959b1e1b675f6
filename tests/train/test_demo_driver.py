"""What surrounds the demo: its folder, the commands it runs, the sentences it prints."""

import io
import json

import pytest
from rich.console import Console

from logitcache_storage.errors import InputError
from logitcache_train.demo.driver import METHODS, Demo, prepare_folder
from logitcache_train.demo.report import Score, caveats, findings, score_table, seconds_table
from logitcache_train.demo.steps import StepError, Steps


def text_of(*renderables) -> str:
    console = Console(record=True, width=120, file=io.StringIO())
    for item in renderables:
        console.print(item)
    return console.export_text()


def test_a_new_folder_is_marked(tmp_path) -> None:
    prepare_folder(Demo(tmp_path / "new" / "demo", seed=3))
    assert json.loads((tmp_path / "new" / "demo" / "demo.json").read_text()) == {
        "seed": 3,
        "unseen_style": False,
    }


def test_an_earlier_demo_is_replaced_and_what_is_not_its_own_stays(tmp_path) -> None:
    demo = Demo(tmp_path)
    prepare_folder(demo)
    for folder in ("cache/shards", "teacher", "students/sft", "students/mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("x")
    (tmp_path / "train.jsonl").write_text("x")
    prepare_folder(Demo(tmp_path, unseen_style=True))
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["demo.json", "students/mine/file"]
    assert json.loads((tmp_path / "demo.json").read_text())["unseen_style"] is True


def test_links_are_removed_and_what_they_point_to_is_not(tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("x")
    demo = Demo(tmp_path / "demo")
    prepare_folder(demo)
    demo.cache.symlink_to(elsewhere)
    prepare_folder(demo)
    assert not demo.cache.exists()
    assert (elsewhere / "file").exists()


def test_a_folder_with_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds no earlier demo; choose another folder with --output"):
        prepare_folder(Demo(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        prepare_folder(Demo(tmp_path / "thesis.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_negative_seed_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="--seed must be 0 or more, got -1"):
        Demo(tmp_path, seed=-1)


def test_seeds_of_neighbouring_runs_are_disjoint(tmp_path) -> None:
    seeds = [Demo(tmp_path, seed=s).seed_of(role) for s in range(5) for role in range(5)]
    assert len(set(seeds)) == len(seeds)


def test_a_failing_command_stops_with_its_own_output_and_status(tmp_path, capfd) -> None:
    steps = Steps(Console(width=200))
    with pytest.raises(StepError, match="ended with exit status 2") as error, steps.part("look"):
        steps.command("status", tmp_path / "nothing-here")
    assert error.value.exit_status == 2
    shown = capfd.readouterr()
    assert "nothing-here" in shown.out and shown.out.index("1. look") < shown.out.index("$ ")
    assert "nothing-here" in shown.err
    assert steps.seconds == {}


def test_a_command_is_shown_timed_and_its_output_returned(capfd) -> None:
    steps = Steps(Console(width=200))
    with steps.part("ask"):
        printed = steps.output_of("--version")
    assert printed.startswith("logitcache ")
    assert "--version\n" in capfd.readouterr().out
    assert steps.seconds["ask"] > 0


def test_the_environment_is_shown_once_and_reaches_the_command(capfd) -> None:
    steps = Steps(Console(width=200), {"COLUMNS": "44"})
    first, second = (steps.output_of("status", "--help") for _ in range(2))
    assert capfd.readouterr().out.count("$ export COLUMNS=44\n") == 1
    assert first == second != Steps(Console(), {"COLUMNS": "120"}).output_of("status", "--help")


BASE = Score("base", 50.0, 2.0, 75.0)


def test_findings_name_the_highest_and_say_when_that_is_noise() -> None:
    students = [
        Score("sft", 40.0, 1.0, 90.0),
        Score("kd", 81.0, 3.0, 100.0),
        Score("target_sft", 88.0, 4.0, 100.0),
    ]
    text = " ".join(findings(BASE, students))
    assert "target_sft at 88.0, 7.0 points above kd, which is within two standard errors" in text
    assert "(10.0)" in text
    assert "greedily: kd, target_sft at 100.0" in text
    assert "Below the base model when sampled (50.0): sft." in text
    assert "+48.0 against sft, +7.0 against kd" in text


def test_findings_follow_the_numbers_when_the_method_loses() -> None:
    students = [Score("target_sft", 20.0, 1.0, 30.0), Score("dft", 90.0, 1.0, 91.0)]
    text = " ".join(findings(BASE, students))
    assert "dft at 90.0, 70.0 points above target_sft, more than two standard errors" in text
    assert "greedily: dft at 91.0" in text
    assert "(50.0): target_sft." in text
    assert "-70.0 against dft" in text


def test_nobody_below_the_base_is_not_mentioned() -> None:
    assert not any("Below" in s for s in findings(BASE, [Score("kd", 60.0, 1.0, 70.0), Score("dft", 61.0, 1.0, 70.0)]))


@pytest.mark.parametrize("unseen_style", [True, False])
def test_caveats_carry_the_size_and_the_style(unseen_style: bool) -> None:
    text = " ".join(caveats(num_parameters=228_960, num_problems=200, unseen_style=unseen_style))
    assert "0.23M" in text and "no replication" in text and "200 problems" in text
    assert ("never met; its own score" in text) == unseen_style


def test_tables() -> None:
    student = Score("kd", 81.25, 1.04, 100.0, learning_rate=3e-3, train_seconds=12.4)
    text = text_of(score_table([BASE, student], num_samples=16, temperature=1.0), seconds_table({"a": 30.0, "b": 45.0}))
    assert "Average@16, T=1" in text
    assert [line.split() for line in text.splitlines() if line.startswith("kd")] == [
        ["kd", "0.003", "81.2", "+-", "1.0", "100.0", "12"]
    ]
    assert "1 min 15 s" in text


def test_methods_are_known_objectives() -> None:
    from logitcache_train.objectives import OBJECTIVES

    assert {method.objective for method in METHODS} <= set(OBJECTIVES)
