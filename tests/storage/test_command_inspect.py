"""`logitcache inspect`: what is on the screen, for ordinary and for hostile text."""

import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.cli import main
from logitcache_storage.inspect import data
from logitcache_storage.inspect.data import segments, token_data
from logitcache_storage.inspect.draw import SHADES, bar, shade, token_text
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA, Vocabulary

STORAGE = Path(__file__).parents[2] / "storage"

PLAIN = ["The", " answer", " is", " 7", ".", "\n", "Q", ":", " how", " many", "?"]
HOSTILE = ["\x1b[31mred", "[red]bold[/red]", "\u202eevil", "\x07", "\r\n", "\t", " ", "🙂", " שלום", "مرحبا", "\\n"]
HOSTILE += ["\u0301", "日本語", "<script>alert(1)</script>", "[link=http://x]", "\x9b31m", "a\u2028b", "'\"", "\x00"]
WORDS = [*PLAIN, *HOSTILE]
VOCAB, K = len(WORDS), 6
LONG_NOTE = "x" * 300 + "end"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Sample 0 is ordinary, 1 has every hostile token as a target, 2 is long."""
    folder = str(tmp_path_factory.mktemp("inspect"))
    ordinary = np.array([6, 7, 8, 9, 10, 5, 0, 1, 2, 3, 4], np.int32)
    hostile = np.arange(VOCAB, dtype=np.int32)
    long = np.concatenate([np.tile(ordinary, 200), np.tile(ordinary, 20)]).astype(np.int32)
    samples = [
        (ordinary, np.array([[6, 11]], np.int32)),
        (hostile, np.array([[1, VOCAB]], np.int32)),
        (long, np.array([[2200, len(long)]], np.int32)),
    ]
    topks = []
    for i, (ids, ranges) in enumerate(samples):
        labels = ids[ranges[0, 0] : ranges[0, 1]]
        topks.append(make_topk(len(labels), K, VOCAB, seed=i, labels=labels))
    identity = make_identity(k=K, vocab_size=VOCAB, shard_rows=1000)
    columns = {"note": ["plain", "\x1b[2Jgone [red]", LONG_NOTE]}
    write_cache(folder, samples, topks, identity=identity, vocabulary=WORDS, columns=columns)
    return folder


def shown(capsys, *words, status=0):
    assert main(["inspect", *words]) == status
    return capsys.readouterr().out


def table_of(out):
    """The lines of the table of positions."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("row"))
    return [line for line in lines[start + 1 :] if line]


def test_the_list_shows_each_sample_and_its_mean(url, capsys):
    out = shown(capsys, url)
    cache = Cache.open(url)
    for i, sample in enumerate(cache):
        mean = sample.topk.label_log_prob.astype(np.float64).mean()
        line = next(line for line in out.splitlines() if sample.key[:12] in line)
        assert line.split()[0] == str(i) and f"{mean:.3f}" in line and sample.source_id in line
    assert json.loads(shown(capsys, url, "--json", "--rows", "1:2"))["samples"][0]["key"] == cache[1].key


def test_a_long_list_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    samples, topks = make_samples(30, 4, 50)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=4, shard_rows=100))
    out = shown(capsys, str(tmp_path))
    assert "Samples 0 to 19 of 30; see others with --rows 20:30." in out
    assert "Samples 28 to 29 of 30" in shown(capsys, str(tmp_path), "--rows", "28:")
    whole = shown(capsys, str(tmp_path), "--rows", "3:", "--json")
    monkeypatch.setattr(data, "SAMPLES_AT_ONCE", 4)
    assert shown(capsys, str(tmp_path), "--rows", "3:", "--json") == whole


def test_json_holds_what_the_cache_holds(url, capsys):
    found = json.loads(shown(capsys, url, "--sample", "1", "--json", "--top", "99"))
    sample = Cache.open(url)[1]
    assert found["key"] == sample.key and found["columns"] == {"note": "\x1b[2Jgone [red]"}
    assert "".join(segment["text"] for segment in found["segments"]) == "".join(WORDS)
    assert len(found["rows"]) == len(sample.labels)
    for m, row in enumerate(found["rows"]):
        topk = sample.topk
        assert (row["row"], row["position"]) == (m, sample.target_positions[m])
        assert row["label"]["id"] == sample.labels[m] and row["label"]["text"] == WORDS[sample.labels[m]]
        assert [choice["id"] for choice in row["top"]] == topk.ids[m].tolist()
        assert [choice["log_prob"] for choice in row["top"]] == topk.log_probs[m].tolist()
        assert row["label_log_prob"] == topk.label_log_prob[m]
        assert row["tail"] == pytest.approx(math.exp(topk.log_tail[m]))
        ids = topk.ids[m].tolist()
        expected = ids.index(sample.labels[m]) + 1 if sample.labels[m] in ids else None
        assert row["label_rank"] == expected


def test_the_table_says_the_same(url, capsys):
    rows = json.loads(shown(capsys, url, "--sample", "0", "--json"))["rows"]
    lines = table_of(shown(capsys, url, "--sample", "0", "--top", "3"))
    assert len(lines) == 3 * len(rows)
    for row, first in zip(rows, lines[::3], strict=True):
        number, position, label, rank, prob = first.split()[:5]
        assert (int(number), int(position)) == (row["row"], row["position"])
        assert label == row["label"]["text"].replace(" ", "␣")
        assert rank == (str(row["label_rank"]) if row["label_rank"] else f">{K}")
        assert float(prob) == pytest.approx(math.exp(row["label_log_prob"]), abs=5e-5)
    marked = [line for line in lines if "* 0." in line or "*  " in line]
    assert len(marked) == sum(any(c["id"] == row["label"]["id"] for c in row["top"]) for row in rows)


def test_a_sample_is_called_by_index_from_the_end_or_by_key(url, capsys):
    key = Cache.open(url)[0].key
    by_index = shown(capsys, url, "--sample", "0")
    assert shown(capsys, url, "--sample", key) == shown(capsys, url, "--sample", key[:8].upper()) == by_index
    assert shown(capsys, url, "--sample", "-3") == by_index


def test_long_samples_are_shortened_and_say_so(url, capsys):
    out = shown(capsys, url, "--sample", "2")
    assert re.search(r"\[\.\.\. [\d,]+\s+characters", out)
    assert len(table_of(out)) <= 40 * 3 + 1
    assert "Target rows 0 to 39 of 220; see others with --rows 40:80." in out
    assert len(json.loads(shown(capsys, url, "--sample", "2", "--json"))["rows"]) == 220
    (line,) = table_of(shown(capsys, url, "--sample", "2", "--rows", "219", "--top", "1"))[:1]
    assert line.split()[0] == "219"


def width(line):
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return len(line) + wide - sum(unicodedata.combining(c) > 0 or unicodedata.category(c) == "Cf" for c in line)


def test_a_long_column_of_the_corpus_is_cut(url, capsys):
    out = shown(capsys, url, "--sample", "2")
    assert out.count("x") < 200 and "x…" in out and "end" not in out.split("prompt")[0]
    assert json.loads(shown(capsys, url, "--sample", "2", "--json"))["columns"] == {"note": LONG_NOTE}


@pytest.mark.parametrize("words", [[], ["--sample", "0"], ["--sample", "1"], ["--sample", "1", "--top", "6"]])
def test_plain_screens_hold_80_columns_and_nothing_that_acts(url, words, capsys):
    out = shown(capsys, url, *words)
    for line in out.splitlines()[1:]:
        assert width(line) <= 80, line
        assert line == line.rstrip()
    marks = {"\u200e"}  # our own, after right-to-left tokens
    assert not [c for c in out if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in marks | {"\n"}]


def test_hostile_tokens_are_spelled_out_and_markup_is_text(url, capsys):
    out = shown(capsys, url, "--sample", "1")
    labels = [line.split()[2] for line in table_of(out) if re.match(r" *\d+ +\d+ ", line)]
    for expected in (r"\x1b[31mred", r"\u202eevil", r"\x07", r"\r\n", r"\t", "␣", "🙂", r"\\n", "◌\u0301", r"\x9b31m"):
        assert expected in labels
    assert "[red]bold[/re…" in labels and "␣שלום\u200e" in labels
    assert "⟦◌\u0301⟧" in out  # the accent does not sit on the mark
    assert r"\x1b[2Jgone [red]" in out and "[red]bold[/red]" in out and "[link=http://x]" in out


def test_without_colour_unlikely_labels_are_marked(url, capsys):
    out = shown(capsys, url, "--sample", "0")
    sample = Cache.open(url)[0]
    for label, log_prob in zip(sample.labels, sample.topk.label_log_prob, strict=True):
        assert (f"⟦{WORDS[label]}⟧" in out) == (log_prob < math.log(0.1))


def coloured(url, **environment):
    base = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    found = subprocess.run(
        [sys.executable, "-m", "logitcache_storage.cli", "inspect", url, "--sample", "1"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**base, "PYTHONPATH": str(STORAGE), "FORCE_COLOR": "1", "TERM": "xterm-256color", **environment},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_with_colour_only_our_own_escapes_reach_the_terminal(url):
    out = coloured(url)
    assert "\x1b[" in out and "⟦" not in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert not [c for c in plain if unicodedata.category(c) == "Cc" and c != "\n"]
    assert r"\x1b[31mred" in plain and "probability of the label" in plain


def test_no_color_is_respected(url):
    out = coloured(url, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3|4)[0-9;]*m", out) and "⟦" in out


def vocabulary(pieces):
    rows = {"token": [str(p) for p in pieces], "text": pieces, "special": [False] * len(pieces)}
    return Vocabulary(pa.table(rows, schema=VOCABULARY_SCHEMA))


def sample_of(num_tokens, targets):
    positions = np.array(targets, np.int32)
    ids = np.arange(num_tokens, dtype=np.int32)
    return Sample("00" * 16, "x", ids, positions, make_topk(len(targets), 1, num_tokens, labels=ids[positions]))


def test_a_character_of_several_tokens_stands_with_the_last():
    pieces = [b"a", "🙂".encode()[:2], "🙂".encode()[2:], b"\xff", b"b", b"\xe2\x98"]
    found = segments(sample_of(6, [2, 3, 5]), vocabulary(pieces))
    assert [(s["target"], s["start"], s["stop"]) for s in found] == [
        (False, 0, 2), (True, 2, 4), (False, 4, 5), (True, 5, 6),
    ]  # fmt: skip
    texts = [text for segment in found for text in segment["texts"]]
    assert texts == ["a", "", "🙂", "\udcff", "b", "\udce2\udc98"]


def test_tokens_that_are_no_text_on_their_own():
    words = vocabulary(["☃".encode(), b"\xe2\x98"])
    assert token_data(words, 0) == {"id": 0, "text": "☃", "bytes": None}
    assert token_data(words, 1) == {"id": 1, "text": "\ufffd", "bytes": "e298"}
    assert token_text(token_data(words, 1)) == r"\xe2\x98"
    assert token_text(token_data(words, 9)) == "<|id␣9|>"


def test_bars_and_shades():
    assert [bar(share, 4) for share in (0, 0.5, 1, 2, 1 / 32)] == ["    ", "██  ", "████", "████", "▏   "]
    assert [shade(math.log(p)) for p in (0.9, 0.2, 0.02, 0.002, 0.0002)] == [style for _, style, _ in SHADES]
    assert shade(-2000.0) == SHADES[-1][1]  # underflows to probability 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--sample", "3"], "no sample '3' in .*; committed samples: 0 to 2; give one of these, or at least 6 hex"),
        (["--sample", "nonsense"], "no sample 'nonsense'"),
        (["--sample", "9" * 5000], "no sample '999"),
        (["--sample", "9999999"], "committed samples: 0 to 2"),  # which might be a key, too
        (["--sample", "abcdef012345"], "no sample has the key 'abcdef012345'"),
        (["--sample", "0", "--rows", "5:9"], "no row 5 in sample 0, which has 5 rows; give A:B with A from 0 to 4"),
        (["--rows", "7:9"], "no row 7 in .*which has 3 rows"),
        (["--rows", "5:2"], "'5:2' is empty: B must be above A"),
        (["--rows", "a:b"], "expected A:B with A and B counted from 0, found 'a:b'"),
        (["--top", "-1"], "expected"),
    ],
)
def test_wrong_arguments_are_named_with_their_remedy(url, words, problem, capsys):
    assert main(["inspect", url, *words]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_a_cache_with_nothing_committed(tmp_path, capsys):
    samples, topks = make_samples(4, 4, 50)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=4), commit_shards=0)
    assert "0 committed of 4" in shown(capsys, str(tmp_path))
    assert main(["inspect", str(tmp_path), "--sample", "0"]) == 2
    assert "committed samples: none yet" in capsys.readouterr().err


def test_a_damaged_shard_is_named(tmp_path, capsys):
    samples, topks = make_samples(4, 4, 50)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=4))
    damaged = next(path for path in (tmp_path / "shards").rglob("codes/c/0/0"))
    damaged.write_bytes(b"x")
    assert main(["inspect", str(tmp_path), "--sample", "0"]) == 1
    assert damaged.relative_to(tmp_path).as_posix() in capsys.readouterr().err
