"""`logitcache doubtful`: what is on the screen, in the files, and which status it ends with."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.inspect.doubtful import doubtful_positions
from logitcache_storage.sample_statistics import load_statistics
from logitcache_storage.testing import make_identity, make_samples, write_cache

SAMPLES, TOPKS = make_samples(80, 4, 30, seed=3)
WORDS = ["\x1b[2J", "=SUM(A1)", *(f"w{i} " for i in range(28))]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("doubtful") / "cache")
    identity = make_identity(k=4, vocab_size=30, shard_rows=200, container="arrow")
    write_cache(folder, SAMPLES, TOPKS, identity=identity, vocabulary=WORDS)
    return folder


def test_the_surest_are_listed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doubtful", url, "--min-probability", "0.2", "--limit", "7"]) == 0
    out = capsys.readouterr().out
    cache = Cache.open(url)
    found = doubtful_positions(cache, load_statistics(cache), min_probability=0.2, limit=7)
    lines = [line.split() for line in out.splitlines()]
    rows = [line for line in lines if line and line[0].isdecimal() and "test:" in line[-1]]
    assert [(int(line[0]), int(line[1])) for line in rows] == [(p.index, p.row) for p in found.positions]
    assert f"{found.num_samples} of 80 samples" in out and "--limit N" in out
    assert max(map(len, out.splitlines()[1:])) <= 80 and "\x1b" not in out


def test_nothing_doubtful(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doubtful", url, "--min-probability", "1"]) == 0
    assert "0 of 80 samples" in capsys.readouterr().out


def test_files(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, weights = tmp_path / "doubts.csv", tmp_path / "weights.parquet"
    table.write_text("old")
    assert main(["doubtful", url, "--min-probability", "0.3", "--csv", str(table), "--columns", str(weights)]) == 0
    cache = Cache.open(url)
    found = doubtful_positions(cache, load_statistics(cache), min_probability=0.3, limit=None)
    rows = list(csv.DictReader(table.open(encoding="utf-8", newline="")))
    assert [int(row["sample"]) for row in rows] == [p.index for p in found.positions]
    lists = pq.read_table(weights).column("critical").to_pylist()
    assert sum(row.count(0) for row in lists) == len(rows) > 50
    out = capsys.readouterr().out
    assert f"{len(rows)} target tokens with the weight 0" in out
    assert f"{table}: {len(rows)} positions in {found.num_samples} samples" in out
    assert {path.name for path in tmp_path.iterdir()} == {"doubts.csv", "weights.parquet"}


def test_a_link_stays_a_link(url: str, tmp_path: Path) -> None:
    table, link = tmp_path / "doubts.csv", tmp_path / "link.csv"
    link.symlink_to(table)
    for _ in range(2):  # to a file that is not there yet, and to one that is
        assert main(["doubtful", url, "--csv", str(link)]) == 0
        assert link.is_symlink() and table.read_text().startswith("sample,key,")
        table.write_text("old")


def test_a_folder_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--csv", "--columns"):
        assert main(["doubtful", "/nowhere", option, str(tmp_path)]) == 2
        assert f"{option} {tmp_path} is a folder" in capsys.readouterr().err


def test_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doubtful", url, "--json", "--limit", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["url"] == url and len(data["positions"]) == 2 and not data["is_complete"]
    assert {"index", "key", "row", "position", "label", "choice", "choice_probability"} <= data["positions"][0].keys()


def test_what_cannot_be_read_or_written(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doubtful", url, "--csv", str(tmp_path / "none" / "x.csv")]) == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    for words in (["--min-probability", "0"], ["--min-probability", "2"], ["--limit", "-1"]):
        assert main(["doubtful", url, *words]) == 2
    damaged = shutil.copytree(url, tmp_path / "cache")
    for path in damaged.glob("shards/00001-*"):
        path.write_bytes(b"\0" * path.stat().st_size)
    capsys.readouterr()
    assert main(["doubtful", str(damaged), "--min-probability", "0.2"]) == 1
    shown = capsys.readouterr()
    assert "shards/00001-" in shown.err and "test:" in shown.out
    weights = tmp_path / "weights.parquet"
    assert main(["doubtful", str(damaged), "--columns", str(weights)]) == 1
    assert "not every sample is known" in capsys.readouterr().err and list(tmp_path.iterdir()) == [damaged]
