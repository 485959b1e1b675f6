"""Records: what is refused, by which name, and the checksum over their own bytes."""

from __future__ import annotations

import dataclasses
import json

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache_storage.committed import object_record
from logitcache_storage.errors import CorruptionError, InputError, MismatchError
from logitcache_storage.record_json import dump_record, load_record, parse, to_json
from logitcache_storage.schema import (
    CacheIdentity,
    CorpusIdentity,
    ManifestRecord,
    PlanPart,
    PlanRecord,
    QuarantineRecord,
    ShardRecord,
    parse_object_path,
)
from logitcache_storage.testing import make_identity

ATTEMPT = "0123456789abcdef"
OBJECT = object_record(f"shards/00003-{ATTEMPT}.arrow", b"12345")
SHARD = ShardRecord(3, ATTEMPT, 7, 5, (OBJECT,), {"entropy_sum": 1.5}, 0.25, "node-1", "2026-01-01T00:00:00+00:00")
PLAN = PlanRecord(3, 30, 12, (5, 7), {"samples": 3}, (PlanPart(0, 2, OBJECT), PlanPart(2, 1, OBJECT)), OBJECT)
INDEX = object_record(f"samples/{ATTEMPT}-00000.index", bytes(64))
INDEXED = PlanRecord(2, 20, 5, (5,), {}, (PlanPart(0, 2, OBJECT, INDEX),), OBJECT)
RECORDS = [make_identity(), SHARD, PLAN, INDEXED, ManifestRecord(8, INDEX), QuarantineRecord(1, 2, ("a", "ü\n"), "now")]


def sealed(values: object) -> bytes:
    """JSON values as a record with a valid checksum, written with other code than the product's."""
    text = json.dumps(values)
    zeroed = ('{"crc32c": "00000000"' + (", " if text != "{}" else "") + text[1:]).encode()
    return zeroed[:12] + f"{google_crc32c.value(zeroed):08x}".encode() + zeroed[20:]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_records_come_back(record: object) -> None:
    data = dump_record(record)
    assert load_record(type(record), data, where="x") == record
    assert load_record(type(record), sealed(to_json(record)), where="x") == record
    assert data.startswith(b'{"crc32c": "') and data.endswith(b"}\n")
    assert google_crc32c.value(data[:12] + b"00000000" + data[20:]) == int(data[12:20], 16)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_no_flipped_bit_is_accepted(record: object) -> None:
    data = dump_record(record)
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), size=300, replace=False):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        try:
            found = load_record(type(record), bytes(changed), where="x")
        except (CorruptionError, MismatchError):
            continue
        # JSON does not care which white space ends the file, but the checksum does.
        raise AssertionError(f"bit {bit} of {data!r} is not noticed: {found}")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for prefix in (b"", b'{"crc32c": "00000000"', dump_record(SHARD)[:50]):
        with pytest.raises((CorruptionError, MismatchError), match="commits/3"):
            load_record(ShardRecord, prefix + data, where="commits/3")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"surprise": 1}, "unknown field 'surprise' in ShardRecord"),
        ({"attempt": ...}, "missing field 'attempt' in ShardRecord"),
        ({"shard": "3"}, "shard: expected int, found '3'"),
        ({"shard": True}, "shard: expected int, found True"),
        ({"shard": 3.0}, "shard: expected int, found 3.0"),
        ({"shard": None}, "shard: expected int, found None"),
        ({"shard": -1}, "shard must be >= 0, got -1"),
        ({"num_rows": 2**60}, "num_rows must be in"),
        ({"num_bytes": 6}, "num_bytes must be the objects' 5, got 6"),
        ({"attempt": "../../etc"}, "attempt must be 16 lower-case hex digits"),
        ({"objects": {}}, "objects: expected a list, found dict"),
        ({"objects": [7]}, r"objects\[0\]: expected an object with the fields of ObjectRecord, found int"),
        ({"statistics": []}, "statistics: expected an object, found list"),
        ({"statistics": {"entropy_sum": "1"}}, r"statistics.entropy_sum: expected float, found '1'"),
        ({"seconds": "1"}, "seconds: expected float, found '1'"),
        ({"worker": 1}, "worker: expected str, found 1"),
    ],
)
def test_fields_that_are_refused(change: dict, match: str) -> None:
    values = {k: v for k, v in {**to_json(SHARD), **change}.items() if v is not ...}
    with pytest.raises(CorruptionError, match=match):
        load_record(ShardRecord, sealed(values), where="commits/00003.json")


@pytest.mark.parametrize("path", ["../x", "a/../b", "/abs", "", "a//b", ".hidden", "a\\b", "a\n", "é"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="must be relative"):
        parse_object_path(path)
    values = to_json(SHARD)
    values["objects"][0]["path"] = path
    with pytest.raises(CorruptionError, match="must be relative"):
        load_record(ShardRecord, sealed(values), where="commits/00003.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_samples": 4}, "num_samples must be the parts' 3, got 4"),
        ({"num_rows": 13}, "num_rows must be the sum of shard_num_rows, got 13"),
        ({"shard_num_rows": (13, -1)}, r"shard_num_rows\[1\] must be in"),
        ({"shard_num_rows": (2**60,)}, r"shard_num_rows\[0\] must be in"),
        ({"parts": (PlanPart(0, 2, OBJECT), PlanPart(1, 2, OBJECT))}, r"parts\[1\].first_sample must be 2, got 1"),
        ({"parts": (PlanPart(0, 0, OBJECT),)}, r"parts\[0\].num_samples must be >= 1, got 0"),
    ],
)
def test_plans_that_do_not_add_up(change: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be between 1 and the vocabulary size 50 in a cache of role 'teacher', got 0"),
        ({"k": 51}, "k must be between 1 and the vocabulary size 50 in a cache of role 'teacher', got 51"),
        ({"k": -1, "role": "reference"}, "k must be between 0 and the vocabulary size 50 in a cache of role"),
        ({"vocab_size": 0}, "vocab_size must be >= 1"),
        ({"kept_mass": 0.0}, r"kept_mass must be in \(0, 1\], got 0.0"),
        ({"kept_mass": 1.1}, "kept_mass must be in"),
        ({"kept_mass": float("nan")}, "kept_mass must be in"),
        ({"precision": "u4"}, "precision must be one of u8, u10, fp16, fp32, got 'u4'"),
        ({"container": "npz"}, "container must be one of zarr, arrow, got 'npz'"),
        ({"shard_rows": 0}, "shard_rows must be >= 1"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"corpus": ("f", -1)}, "corpus.num_records must be >= 0, got -1"),
    ],
)
def test_identities_that_cannot_be(change: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        if "corpus" in change:
            change = {"corpus": CorpusIdentity(*change["corpus"], {})}
        make_identity(**change)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_other_format_versions(version: object) -> None:
    values = {**to_json(make_identity()), "format_version": version, "unheard_of": True}
    with pytest.raises(MismatchError, match=r"cache\.json: format version .*reads version 1; read it with the release"):
        load_record(CacheIdentity, sealed(values), where="cache.json")


def test_numbers_that_are_not_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_record(dataclasses.replace(SHARD, seconds=float("nan")))
    data = sealed({**to_json(SHARD), "seconds": float("inf")})
    with pytest.raises(CorruptionError, match="the number Infinity is not JSON"):
        load_record(ShardRecord, data, where="x")


def test_deeply_nested_and_huge_records() -> None:
    with pytest.raises(CorruptionError, match="not a valid QuarantineRecord"):
        load_record(QuarantineRecord, b"[" * 200_000, where="x")
    with pytest.raises(CorruptionError, match="268435457 bytes of metadata"):
        load_record(QuarantineRecord, bytes((1 << 28) + 1), where="x")


def test_free_form_values_are_nested_a_little_only() -> None:
    def record(depth: int) -> bytes:
        inner: object = 1
        for n in range(depth):
            inner = [inner] if n % 2 else {"a": inner}
        return sealed({**to_json(PLAN), "report": {"a": inner}})

    assert load_record(PlanRecord, record(31), where="x").report
    for depth in (32, 200):
        with pytest.raises(CorruptionError, match="report: values nested more than 32 deep"):
            load_record(PlanRecord, record(depth), where="x")


def test_records_of_another_class() -> None:
    with pytest.raises(CorruptionError, match=r"cache\.json: not a valid CacheIdentity: cache\.json: unknown field"):
        load_record(CacheIdentity, dump_record(SHARD), where="cache.json")
    with pytest.raises(InputError, match="expected an object with the fields of ShardRecord, found list"):
        parse(ShardRecord, [], where="x")


def test_ints_are_floats_where_floats_are_asked_for() -> None:
    values = {**to_json(SHARD), "seconds": 1, "statistics": {"a": 2}}
    found = load_record(ShardRecord, sealed(values), where="x")
    assert isinstance(found.seconds, float)
    assert isinstance(found.statistics["a"], float)
