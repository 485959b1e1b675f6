"""`logitcache objectives`: what it prints, what it draws, what it refuses."""

from argparse import ArgumentParser

import pytest

from logitcache_storage.errors import InputError
from logitcache_train import OBJECTIVES
from logitcache_train.commands.objectives import COMMAND


def run_command(capsys, *arguments):
    parser = ArgumentParser()
    COMMAND.add_arguments(parser)
    args, args.rest = parser.parse_known_args(arguments)
    assert COMMAND.run(args) == 0
    return capsys.readouterr().out


def test_the_table_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run_command(capsys)
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    for name, row in OBJECTIVES.items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert all(f"{parameter} {value:g}" in out for parameter, value in row.values.items())
        assert all(f"{role} cache" in line for role in row.roles[:1])
    assert "label: p_label > threshold" in " ".join(out.split()).replace(" threshold 0.1", "")


def test_one_row_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = run_command(capsys, "target_sft", "--eta", "0.3")
    for part in (
        "loss    -sum_a sg(Q_a) log p_a, Q = p_y label + (1 - p_y) guided",
        "source  Xie et al. 2026, arXiv 2606.11189",
        "label   p_label",
        "guided  p_rest",
        "needs   teacher cache",
        "--eta   0.3, in [0, 1], beyond with --extrapolate: the teacher's say",
    ):
        assert part in out
    out = run_command(capsys, "iw_sft")
    assert "may use      teacher cache, column sequence" in out and "mean by the column 'sequence' of log q_y" in out
    assert "needs      nothing but the corpus" in run_command(capsys, "gem")


def test_every_row_is_shown_in_full(capsys):
    for name, row in OBJECTIVES.items():
        out = run_command(capsys, name)
        assert out.startswith(f"{name}\n") and all(f"--{parameter}" in out for parameter in row.parameters)


def test_a_row_from_a_file(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("objective: {name: mine, label: 1 - p_label, parameters: {weight: 0.5, my_floor: 0.1}}\n")
    out = run_command(capsys, str(path), "--weight", "0.25", "--my-floor", "0.75")
    assert out.startswith("mine\n") and "1 - p_label" in out and "0.25, in (-inf, inf)" in out
    assert "--my_floor  0.75, in (-inf, inf)" in out
    with pytest.raises(InputError, match="argument --my_floor/--my-floor: invalid float value: 'low'"):
        run_command(capsys, str(path), "--my_floor", "low")


def test_a_picture(capsys, tmp_path):
    path = tmp_path / "target.svg"
    out = run_command(capsys, "target_sft", "--eta", "1.25", "--extrapolate", "--plot", str(path))
    assert out == f"written to {path}\n" and "eta = 1.25" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tsft"], "unknown objective 'tsft'; choose from"),
        (["target_sft", "--eta", "1.3"], "extrapolate"),
        (["sft", "--eta", "0.3"], "'sft' has no parameter 'eta'"),
        (["sft", "--plot", "a.jpg"], r"--plot a.jpg: the name must end in \.png, \.svg, \.pdf"),
        (["sft", "--plot", "/nowhere/a.png"], "--plot /nowhere/a.png: there is no folder /nowhere"),
        (["--plot", "a.png"], "--plot is for one objective; say which"),
        (["--eta", "0"], "--eta is for one objective"),
        (["--etta"], "--etta is for one objective"),
        (["target_sft", "--floor", "0.5"], "unknown argument --floor; parameters of objective 'target_sft': --eta"),
        (["missing.yaml"], "missing.yaml: cannot be read as YAML: .*No such file"),
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(InputError, match=message) as e:
        run_command(capsys, *arguments)
    assert e.value.exit_status == 2
