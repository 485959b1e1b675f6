"""`logitcache export`: files, a summary, and for Axolotl the lines of a configuration."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from logitcache_storage.cli import main
from logitcache_storage.testing import make_identity, make_samples, write_cache

SAMPLES, TOPKS = make_samples(20, 5, 30)


@pytest.fixture
def url(tmp_path):
    url = str(tmp_path / "cache")
    write_cache(url, SAMPLES, TOPKS, identity=make_identity(k=5, vocab_size=30, container="arrow"))
    return url


def test_parquet(url, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", url, "--to", "parquet", "--output", str(out)]) == 0
    screen = capsys.readouterr().out
    assert "20, " in screen and "part-00000.parquet" in screen and "Axolotl" not in screen
    assert pq.read_table(out).num_rows == 20
    assert main(["export", url, "--to", "parquet", "--output", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", url, "--to", "parquet", "--output", str(out), "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == ["part-00000.parquet"] and found["num_samples"] == 20 and found["layout"] == "parquet"


@pytest.mark.parametrize("kept_mass", [1.0, 0.6])
def test_the_configuration_is_yaml_that_fits(url, tmp_path, kept_mass, capsys):
    short = str(tmp_path / "short")
    rows = [topk.keep_mass(kept_mass) for topk in TOPKS]
    write_cache(short, SAMPLES, rows, identity=make_identity(k=5, vocab_size=30, kept_mass=kept_mass))
    assert main(["export", short, "--to", "axolotl", "--output", str(tmp_path / "out: 1")]) == 0
    screen = capsys.readouterr().out
    config = yaml.safe_load(screen.split("configuration:\n")[1])
    assert config["datasets"] == [{"path": str(tmp_path / "out: 1"), "ds_type": "parquet", "type": None}]
    assert config["kd_temperature"] == 1 and config["kd_normalize_topk"] is (kept_mass == 1)
    assert config["sequence_len"] == max(len(ids) for ids, _ in SAMPLES)
    assert config["plugins"] == ["axolotl.integrations.kd.KDPlugin"] and config["skip_prepare_dataset"] is True


def test_an_unfinished_cache_says_so(tmp_path, capsys):
    url = str(tmp_path / "cache")
    identity = make_identity(k=5, vocab_size=30, shard_rows=40, container="arrow")
    write_cache(url, SAMPLES, TOPKS, identity=identity, commit_shards=1)
    assert main(["export", url, "--to", "parquet", "--output", str(tmp_path / "out")]) == 0
    assert "what is not committed is not exported" in " ".join(capsys.readouterr().out.split())


def test_wrong_arguments(url, tmp_path, capsys):
    assert main(["export", url, "--to", "csv", "--output", str(tmp_path / "out")]) == 2
    assert main(["export", url, "--to", "parquet"]) == 2
    assert main(["export", str(tmp_path / "none"), "--to", "parquet", "--output", str(tmp_path / "out")]) == 2
    assert "no cache at" in capsys.readouterr().err
