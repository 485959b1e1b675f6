"""`logitcache verify`: the report on the screen, its JSON, its statuses."""

import json

import pytest

from logitcache_storage.cli import main
from logitcache_storage.commit import commit_path, load_commit, quarantine_shard
from logitcache_storage.objects import open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.testing import make_identity, make_samples, write_cache


@pytest.fixture
def url(tmp_path):
    samples, topks = make_samples(20, 5, 30)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=5, vocab_size=30, shard_rows=50))
    return str(tmp_path)


@pytest.mark.parametrize("words", [[], ["--deep"]])
def test_an_intact_cache(url, words, capsys):
    assert main(["verify", url, *words]) == 0
    out, err = capsys.readouterr()
    assert "damage   none" in out and err == ""


def test_damage_is_named_with_its_remedy_and_is_status_one(url, tmp_path, capsys):
    broken = load_commit(open_store(url), 1).objects[0].path
    (tmp_path / broken).write_bytes(b"")
    assert main(["verify", url]) == 1
    out = capsys.readouterr().out
    assert f"  {broken}: 0 bytes where the commit says" in out
    assert f"'logitcache verify {url} --repair' sets aside what is damaged" in out
    assert "so that the next build scores 1 shard (1) again" in out


def test_the_remedy_works(url, tmp_path, capsys):
    """What the screen says to do leaves a cache that is intact and asks for exactly the damaged shard."""
    (tmp_path / load_commit(open_store(url), 1).objects[0].path).write_bytes(b"")
    assert main(["verify", url, "--repair"]) == 0
    out = capsys.readouterr().out
    assert "Set aside: 1 shard (1); the old commit records are in damaged/." in out
    assert f"  logitcache build --teacher teacher --data ... --cache {url} --engine transformers" in out
    assert main(["verify", url]) == 0
    assert not (tmp_path / commit_path(1)).exists()
    assert main(["verify", url, "--repair"]) == 0
    assert "Set aside" not in capsys.readouterr().out


def test_what_no_build_can_restore_is_said(url, tmp_path, capsys):
    (tmp_path / load_plan(open_store(url)).vocabulary.path).unlink()
    for words in ([], ["--repair"]):
        assert main(["verify", url, *words]) == 1
        out = capsys.readouterr().out
        assert "Restore it from a copy, or build a new cache" in out and "--repair" not in out


def test_a_repair_says_what_it_did_and_what_is_left(url, tmp_path, capsys):
    store = open_store(url)
    broken, lost = load_commit(store, 1).objects[0].path, load_plan(store).vocabulary.path
    (tmp_path / broken).unlink()
    (tmp_path / lost).unlink()
    (tmp_path / commit_path(2)).unlink()
    quarantine_shard(store, 0, ["void"])
    (tmp_path / "quarantine" / "00000.json").write_bytes(b"{}")
    assert main(["verify", url, "--repair", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["repair"]
    assert not found["whole"]
    assert (found["restored"], found["set_aside"], found["removed"]) == ([2], [1], ["quarantine/00000.json"])
    assert [left["path"] for left in found["left"]] == [lost]
    assert found["next_command"].startswith("logitcache build --teacher teacher --data ... --cache ")


def test_a_damaged_identity_names_no_command(url, tmp_path, capsys):
    (tmp_path / "cache.json").write_bytes(b"{}")
    (tmp_path / load_commit(open_store(url), 1).objects[0].path).unlink()
    assert main(["verify", url, "--repair"]) == 1
    out = capsys.readouterr().out
    assert "Set aside: 1 shard (1)" in out and "  logitcache build ...\n" in out and "cache.json" in out


@pytest.mark.parametrize("option", [["--teacher", "t"], ["--engine-options", '{"tensor_parallel": 2}']])
def test_what_is_said_of_the_teacher_goes_with_rescore(url, capsys, option):
    assert main(["verify", url, *option]) == 2
    assert f"{option[0]} goes with --rescore N" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-3"])
def test_a_number_of_samples_that_is_none(url, capsys, number):
    assert main(["verify", url, "--rescore", number]) == 2
    assert f"--rescore: expected a number of samples, 1 or more, found {number}" in capsys.readouterr().err


def test_json(url, tmp_path, capsys):
    broken = load_commit(open_store(url), 1).objects[0].path
    (tmp_path / broken).unlink()
    assert main(["verify", url, "--deep", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["intact"] and found["deep"]
    assert [(d["path"], d["shard"]) for d in found["damage"]] == [(broken, 1)]


def test_quarantine_is_listed_and_is_no_damage(tmp_path, capsys):
    samples, topks = make_samples(20, 5, 30)
    identity = make_identity(k=5, vocab_size=30, shard_rows=50)
    write_cache(str(tmp_path), samples, topks, identity=identity, commit_shards=1)
    quarantine_shard(open_store(str(tmp_path)), 2, ["\x1b[31mworker lost"])
    assert main(["verify", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert r"shard 2 after 1 attempts: \x1b[31mworker lost" in out and "\x1b" not in out


def test_no_cache(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "logitcache verify: no cache at" in capsys.readouterr().err
