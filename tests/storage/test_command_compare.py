"""`logitcache compare`: the library's numbers on the screen and as JSON, errors that name the thing."""

import json
import uuid

import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.cli import main
from logitcache_storage.compare import compare_caches
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, write_cache

SAMPLES, TOPKS = make_samples(30, 6, 30)


def write(first: int = 0, **settings) -> str:
    url = f"memory://{uuid.uuid4().hex}"
    identity = make_identity(**{"k": 6, "vocab_size": 30, "container": "arrow", **settings})
    write_cache(url, SAMPLES[first:], TOPKS[first:], identity=identity)
    return url


@pytest.fixture(scope="module")
def urls():
    return write(precision="fp32"), write(first=10)


def test_json_is_the_library_s_numbers(urls, capsys):
    assert main(["compare", *urls, "--json", "--top", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = compare_caches(*map(Cache.open, urls), top=3)
    assert (found["url_a"], found["url_b"]) == urls
    assert found["kl_ab"] == expected.kl_ab > 0 and found["num_samples"] == 20
    assert found["only_a"] == {"num_samples": 10, "examples": [f"test:{i}" for i in range(1, 6)]}
    assert [s["key"] for s in found["most_different"]] == [s.key for s in expected.most_different]
    assert found["histogram"][-1]["high"] is None
    assert sum(b["num_rows"] for b in found["histogram"]) == found["num_rows"]


def test_the_screen_is_plain_text_within_80_columns(urls, capsys):
    assert main(["compare", *urls]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    assert "10 samples (test:1, test:2, test:3, test:4, test:5, ...)" in out
    assert "precision: 'fp32', 'u8'" in out and "KL(A || B) by token" in out and "samples that differ most" in out
    assert main(["compare", *urls, "--top", "0"]) == 0
    assert "differ most" not in capsys.readouterr().out


def test_names_from_a_corpus_are_harmless(capsys, monkeypatch):
    import pyarrow as pa

    from logitcache_storage import testing

    table = testing._plan_table

    def hostile(*args):
        rows, sizes = table(*args)
        names = pa.array([f"\x1b[31m[red]{i}" for i in range(rows.num_rows)])
        return rows.set_column(1, rows.schema.field("source_id"), names), sizes

    monkeypatch.setattr(testing, "_plan_table", hostile)
    assert main(["compare", write(), write(first=3, precision="fp16")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[31m[red]0" in out and r"\x1b[31m[red]" in out.split("differ most")[1]


def test_what_cannot_be_compared_is_status_two(urls, tmp_path, capsys):
    other = write(tokenizer=tokenizer_identity({"a": 1}, {}, None))
    assert main(["compare", urls[0], other]) == 2
    assert "tokenizers of another vocabulary" in capsys.readouterr().err
    assert main(["compare", urls[0], str(tmp_path)]) == 2
    assert "logitcache compare: no cache at" in capsys.readouterr().err
    assert main(["compare", urls[0]]) == 2
    assert main(["compare", *urls, "--top=-1"]) == 2
    assert "expected a number of samples, 0 or more, found '-1'" in capsys.readouterr().err


def test_options_of_the_second_store(urls, s3_server, capsys):
    url = s3_server.new_url()
    options = json.dumps(s3_server.storage_options)
    identity = make_identity(k=6, vocab_size=30, container="arrow")
    write_cache(url, SAMPLES, TOPKS, identity=identity, storage_options=s3_server.storage_options)
    assert main(["compare", urls[0], url, "--storage-options-b", options, "--json"]) == 0
    assert main(["compare", url, urls[0], "--storage-options", options, "--json"]) == 0
    assert main(["compare", url, url, "--storage-options", options, "--json"]) == 0
    assert '"kl_ab": 0.0' in capsys.readouterr().out
