"""`logitcache copy`: what was copied, what was there, what was left out."""

import json
import uuid

import pytest

from logitcache_storage.cli import main
from logitcache_storage.commit import load_commit
from logitcache_storage.objects import open_store
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.verify import verify_cache

SAMPLES, TOPKS = make_samples(20, 5, 30)


@pytest.fixture
def url():
    url = f"memory://{uuid.uuid4().hex}"
    identity = make_identity(k=5, vocab_size=30, shard_rows=50, container="arrow")
    write_cache(url, SAMPLES, TOPKS, identity=identity)
    return url


def test_copy_and_copy_again(url, tmp_path, capsys):
    target = str(tmp_path / "copy")
    assert main(["copy", url, target]) == 0
    out = capsys.readouterr().out
    assert "copied" in out and "there" not in out and "\x1b" not in out
    assert verify_cache(target, deep=True).is_intact
    assert main(["copy", url, target]) == 0
    out = capsys.readouterr().out
    assert "0 objects, 0 B" in out and "there " in out


def test_json(url, tmp_path, capsys):
    assert main(["copy", url, str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_complete"] and found["num_bytes"] > 0 and found["damaged"] == {}


def test_damage_stops_or_is_left_out(url, tmp_path, capsys):
    broken = load_commit(open_store(url), 1).objects[0].path
    open_store(url).put(broken, b"x")
    assert main(["copy", url, str(tmp_path)]) == 1
    assert f"{broken}: 1 bytes where the commit says" in capsys.readouterr().err
    assert main(["copy", url, str(tmp_path), "--skip-damaged"]) == 1
    out, err = capsys.readouterr()
    assert "not all that are planned" in out and "left out" in out and broken in err
    assert main(["copy", url, str(tmp_path), "--skip-damaged", "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)["damaged"]) == ["1"]


def test_another_cache_is_status_two(url, tmp_path, capsys):
    write_cache(str(tmp_path), SAMPLES, TOPKS, identity=make_identity(k=5, vocab_size=30))
    assert main(["copy", url, str(tmp_path)]) == 2
    assert "holds another cache, other settings (there, here)" in capsys.readouterr().err
    assert main(["copy", url, url]) == 2


def test_to_s3_and_back(url, s3_server, tmp_path):
    there, options = s3_server.new_url(), json.dumps(s3_server.storage_options)
    assert main(["copy", url, there, "--storage-options-to", options]) == 0
    again = s3_server.new_url()
    assert main(["copy", there, again, "--storage-options", options]) == 0
    assert main(["copy", again, str(tmp_path), "--storage-options", options]) == 0
    assert verify_cache(str(tmp_path), deep=True).is_intact
