"""`logitcache stats`: the numbers on the screen are those of the library."""

import json

import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.stats import total
from logitcache_storage.testing import make_identity, make_samples, write_cache


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("stats"))
    samples, topks = make_samples(40, 6, 30)
    write_cache(url, samples, topks, identity=make_identity(k=6, vocab_size=30, shard_rows=50))
    return url


def test_json_is_the_library_s_numbers(url, capsys):
    assert main(["stats", url, "--json", "--by-shard"]) == 0
    found = json.loads(capsys.readouterr().out)
    cache = Cache.open(url)
    expected = total(cache.shards.values())
    assert found["num_samples"] == 40
    assert found["num_tokens"] == sum(len(sample.input_ids) for sample in cache)
    assert found["total"]["label_log_prob"] == expected.label_log_prob
    assert [shard["shard"] for shard in found["shards"]] == sorted(cache.shards)
    assert sum(shard["num_rows"] for shard in found["shards"]) == expected.num_rows
    assert found["distributions"]["num_rows"] == expected.num_rows
    assert set(found["distributions"]["quantiles"]) == {"entropy", "kept_mass", "label_log_prob"}


def test_the_screen_is_plain_text_within_80_columns(url, capsys):
    assert main(["stats", url, "--by-shard"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80 and "\x1b" not in out
    assert all(line == line.rstrip() for line in lines)
    expected = total(Cache.open(url).shards.values())
    assert f"{expected.label_log_prob:.4f} nats, perplexity {expected.perplexity:,.3f}" in out
    assert "quantiles over" in out and "rank of the label" in out and "by shard" in out


def test_no_rows_need_be_read(url, capsys):
    assert main(["stats", url, "--sample-shards", "0"]) == 0
    assert "quantiles" not in capsys.readouterr().out


def test_a_cache_with_nothing_committed(tmp_path, capsys):
    samples, topks = make_samples(4, 6, 30)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=6, vocab_size=30), commit_shards=0)
    assert main(["stats", str(tmp_path)]) == 0
    assert "the build is unfinished" in capsys.readouterr().out
    assert main(["stats", str(tmp_path), "--json", "--by-shard"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["entropy"] is None


@pytest.mark.parametrize("wrong", ["-1", "two", "1.5"])
def test_a_wrong_number_of_shards(url, wrong, capsys):
    assert main(["stats", url, f"--sample-shards={wrong}"]) == 2
    assert f"expected a number of shards, 0 or more, found '{wrong}'" in capsys.readouterr().err
