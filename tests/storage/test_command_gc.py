"""`logitcache gc`: shows first, deletes with --yes, and nothing but garbage."""

import json

import pytest

from logitcache_storage.cli import main
from logitcache_storage.commit import commit_path
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

LOST = f"shards/00001-{'a' * 16}.arrow"


@pytest.fixture
def url(tmp_path):
    samples, topks = make_samples(20, 5, 30)
    identity = make_identity(k=5, vocab_size=30, shard_rows=50, container="arrow")
    write_cache(str(tmp_path), samples, topks, identity=identity)
    (tmp_path / LOST).write_bytes(bytes(1500))
    (tmp_path / "shards/\x1b[31mnotes").write_bytes(b"mine")
    return str(tmp_path)


def test_without_yes_nothing_is_deleted(url, tmp_path, capsys):
    assert main(["gc", url, "--older-than", "0"]) == 0
    out = capsys.readouterr().out
    assert f"  {LOST}\n" in out and "1, 1.5 KB: objects that no record lists" in out
    assert "Nothing is deleted yet: run the same with --yes." in out and (tmp_path / LOST).exists()
    assert r"1, left alone: shards/\x1b[31mnotes" in out and "\x1b" not in out
    assert max(map(len, out.splitlines()[1:])) <= 80


def test_young_objects_are_left_alone(url, tmp_path, capsys):
    assert main(["gc", url, "--yes"]) == 0
    out = capsys.readouterr().out
    assert "garbage     none" in out and "--older-than 0 where no build" in " ".join(out.split())
    assert (tmp_path / LOST).exists()


def test_with_yes_it_is_deleted(url, tmp_path, capsys):
    assert main(["gc", url, "--yes", "--older-than", "0"]) == 0
    assert "All of it is deleted." in capsys.readouterr().out
    assert not (tmp_path / LOST).exists() and (tmp_path / "shards/\x1b[31mnotes").exists()
    assert verify_cache(url, deep=True).is_intact


def test_json(url, tmp_path, capsys):
    assert main(["gc", url, "--older-than=0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(g["path"], g["size"], g["kind"]) for g in found["garbage"]] == [(LOST, 1500, "attempt")]
    assert found["bytes"] == 1500 and not found["deleted"] and found["foreign"] == ["shards/\x1b[31mnotes"]
    assert main(["gc", url, "--older-than=0", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] and not (tmp_path / LOST).exists()


def test_a_damaged_record_is_status_one(url, tmp_path, capsys):
    (tmp_path / commit_path(1)).write_bytes(b"{}")
    assert main(["gc", url, "--older-than=0", "--yes"]) == 1
    assert "nothing is deleted while it is not known what a record lists" in capsys.readouterr().err
    assert (tmp_path / LOST).exists()


@pytest.mark.parametrize("wrong", ["-1", "soon", "nan", "inf"])
def test_wrong_hours_and_no_cache(url, wrong, tmp_path, capsys):
    assert main(["gc", url, f"--older-than={wrong}"]) == 2
    assert f"expected a number of hours, 0 or more, found '{wrong}'" in capsys.readouterr().err
    assert main(["gc", str(tmp_path / "nothing")]) == 2
