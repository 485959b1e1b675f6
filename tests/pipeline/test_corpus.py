"""Readers: every container gives the same records, and every fault is named."""

from __future__ import annotations

import bz2
import gzip
import json

import datasets
import fsspec
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from logitcache_pipeline.corpus import Record, read_records, survey
from logitcache_storage.errors import CorpusError, InputError

ROWS = [
    {"prompt": "zwei\nZeilen", "response": "über 😀", "weight": 0.5, "tags": ["a", "b"]},
    {"prompt": "", "response": "x", "weight": 1.0, "tags": None, "nested": [{"a": 1}, {"a": 2, "b": None}]},
    {"prompt": "p", "response": "y", "weight": 2.0, "tags": []},
]
READ = [
    {"prompt": "zwei\nZeilen", "response": "über 😀", "weight": 0.5, "tags": ["a", "b"]},
    {"prompt": "", "response": "x", "weight": 1.0, "nested": [{"a": 1}, {"a": 2}]},
    {"prompt": "p", "response": "y", "weight": 2.0, "tags": []},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def containers(tmp_path) -> list[str]:
    half = LINES.index(b"\n") + 10  # a frame may end anywhere
    names = {name for row in ROWS for name in row}  # arrow fills every row with all of them
    dataset = datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in ROWS])
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "splits")
    table = pa.Table.from_pylist(ROWS, dataset.features.arrow_schema)
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    memory = "memory://corpus-test/c.jsonl.gz"
    with fsspec.open(memory, "wb") as f:
        f.write(gzip.compress(LINES))
    return [
        write(tmp_path / "c.jsonl", LINES),
        write(tmp_path / "escaped.json", LINES.replace(b"\n", b"\r\n\r\n \n")),
        write(tmp_path / "bom.ndjson", b"\xef\xbb\xbf" + LINES.rstrip()),
        write(tmp_path / "c.jsonl.gz", gzip.compress(LINES[:half]) + gzip.compress(LINES[half:])),
        write(tmp_path / "c.jsonl.zst", zstd(LINES[:half]) + zstd(LINES[half:])),
        write(tmp_path / "c.jsonl.bz2", bz2.compress(LINES)),
        memory,
        (tmp_path / "c.jsonl").as_uri(),
        str(tmp_path / "c.parquet"),
        str(tmp_path / "saved"),
        f"{tmp_path / 'splits'}/",
        f"{tmp_path / 'splits'}:train",
    ]


def test_every_container_gives_the_same_records_and_survey(tmp_path):
    sources = containers(tmp_path)
    expected = survey(sources[0])
    assert expected.num_records == 3
    assert expected.fields == ("prompt", "response", "tags", "weight")
    assert expected.columns.names == ["nested", "prompt", "response", "tags", "weight"]
    for source in sources:
        assert [record.data for record in read_records(source)] == READ, source
        found = survey(source)
        assert found == expected, source
        assert found.columns.equals(expected.columns, check_metadata=True), source


def test_the_survey_depends_on_order_and_content_only(tmp_path):
    first, second, third = LINES.splitlines(keepends=True)
    fingerprints = {
        survey(write(tmp_path / "c.jsonl", data)).fingerprint
        for data in (LINES, second + first + third, first + second, LINES.replace(b"0.5", b"0.25"))
    }
    assert len(fingerprints) == 4
    reordered = json.dumps(dict(reversed(ROWS[0].items())), ensure_ascii=False, indent=None).encode() + b"\n"
    assert survey(write(tmp_path / "d.jsonl", reordered + second + third)).fingerprint in fingerprints


def test_one_file_cut_in_two_is_the_same_corpus(tmp_path):
    first, rest = LINES.split(b"\n", 1)
    parts = [write(tmp_path / "1.jsonl", first), write(tmp_path / "2.jsonl.zst", zstd(rest))]
    whole = survey(write(tmp_path / "whole.jsonl", LINES))
    assert survey(parts) == whole
    assert survey(str(tmp_path / "[12].jsonl*")) == whole
    assert survey(parts[::-1]).fingerprint != whole.fingerprint


def test_source_ids_count_lines_and_tell_sources_of_one_name_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "t.jsonl", b'\n{"x": 1}\n\n{"x": 2}\n')
    ids = [record.source_id for record in read_records(str(tmp_path / "*" / "t.jsonl"))]
    assert ids == ["t.jsonl:2", "t.jsonl:4", "t.jsonl#2:2", "t.jsonl#2:4"]
    datasets.Dataset.from_list([{"x": 1}, {"x": 2}]).select([1, 0]).save_to_disk(tmp_path / "saved")
    assert list(read_records(str(tmp_path / "saved"))) == [
        Record("saved:1", {"x": 2}),
        Record("saved:2", {"x": 1}),
    ]


def test_a_literal_name_is_no_pattern(tmp_path):
    assert len(list(read_records(write(tmp_path / "[x]*.jsonl", LINES)))) == 3


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1}{"a": 2}', "Extra data"),
        (b"[1, 2]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud83d"}', "surrogates not allowed"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path, line, found):
    source = write(tmp_path / "bad.jsonl", b'{"a": 0}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=rf"bad\.jsonl, line 3: .*{found}.*repair or delete this one") as error:
        survey(source)
    assert len(str(error.value)) < 500 + len(source)


def test_a_surrogate_pair_is_text(tmp_path):
    (record,) = read_records(write(tmp_path / "c.jsonl", b'{"a": "\\ud83d\\ude00"}'))
    assert record.data == {"a": "😀"}


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_truncated_file_is_refused_not_shortened(tmp_path, suffix, compress):
    data = b"".join(b'{"a": "%d"}\n' % (i * i * 7919 % 100_003) for i in range(20_000))
    source = write(tmp_path / f"cut.jsonl.{suffix}", compress(data)[:-100])
    with pytest.raises(CorpusError, match=rf"cut\.jsonl\.{suffix}: reading stopped after line \d+: .*whole"):
        list(read_records(source))


def test_a_damaged_parquet_file_is_refused(tmp_path):
    source = write(tmp_path / "bad.parquet", b"PAR1 no table PAR1")
    with pytest.raises(CorpusError, match=r"bad\.parquet: reading stopped after row 0"):
        list(read_records(source))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("missing-*.jsonl", "no file matches this pattern"),
        ("memory://nowhere/x.parquet", "no such file or folder"),
        ("nope://bucket/x.jsonl", "no file system for this URL"),
        ("notes.txt", r"unknown kind of file '.txt'; expected .jsonl"),
        ("plain", "save_to_disk did not write"),
        ("c.jsonl:train", "only a dataset has splits"),
        (
            "splits:validation",
            r"no split 'validation', found test, train|no split 'validation', found train, test",
        ),
        ("only_test", r"no split 'train', found test; choose one with"),
    ],
)
def test_a_source_that_cannot_be_used_is_named_before_reading(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    containers(tmp_path)
    write(tmp_path / "notes.txt", b"")
    (tmp_path / "plain").mkdir()
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)).save_to_disk("only_test")
    with pytest.raises(InputError, match=message) as error:
        read_records(["c.jsonl", source])
    assert source.split(":")[0] in str(error.value)


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(CorpusError, match=r"saved: cannot be loaded.*save the dataset again"):
        read_records(str(tmp_path / "saved"))


def test_an_unknown_dataset_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"some-org/some-set: .*not a dataset that can be loaded.*save_to_disk"):
        read_records("some-org/some-set:train")


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"^[^()]*c.jsonl: no records"):
        survey([write(tmp_path / "c.jsonl", b"\n \n")])
    with pytest.raises(InputError, match="at least one file"):
        read_records([])
