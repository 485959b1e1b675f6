"""Caches made to harm their reader: an error, never an out-of-memory, never code, never a file outside.

Every hostile byte stands under a correct checksum, so only what the reader knows of the format stops it. The readers
run in processes with little memory (`read_hostile.py`): what they would allocate, they cannot.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import logitcache_storage
from logitcache_storage import commit
from logitcache_storage.committed import object_record
from logitcache_storage.manifest import MANIFEST_SCHEMA
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import PLAN_PATH, load_plan
from logitcache_storage.record_json import dump_record, to_json
from logitcache_storage.samples import SAMPLES_SCHEMA
from logitcache_storage.schema import ManifestRecord, PlanPart
from logitcache_storage.testing import make_identity, make_samples, write_cache

pytestmark = pytest.mark.timeout(120)

MAX_MEMORY = 2 << 30
NUM_FUZZED = 100
SAMPLES, TOPKS = make_samples(5, k=3, vocab_size=50, seed=6)
READER = Path(__file__).with_name("read_hostile.py")


def _reader_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_hostile", READER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


replace_object = _reader_module().replace_object


def read_all(folders: list[Path], *, num_fuzzed: int = 0) -> list[dict[str, str]]:
    """What `read_hostile.py` says of each folder."""
    command = [sys.executable, str(READER), str(MAX_MEMORY), str(num_fuzzed), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sealed(values: object) -> bytes:
    data = b'{"crc32c": "00000000", ' + json.dumps(values).encode()[1:]
    return data[:12] + f"{google_crc32c.value(data):08x}".encode() + data[20:]


def table_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    about = {"compression": "zstd", "row_group_size": 1 << 26, "store_schema": False}
    pq.write_table(table, sink, dictionary_pagesize_limit=1 << 30, **about, **options)
    return sink.getvalue()


def rows_of(**changes: pa.Array) -> pa.Table:
    """A samples table of these columns, the others all zeros."""
    num = len(next(iter(changes.values())))
    zeros = {"key": bytes(16), "source_id": "x", "input_ids": [0, 0], "target_ranges": [1, 2], "num_targets": 1}
    columns = [changes.get(f.name, pa.repeat(pa.scalar(zeros.get(f.name, 0), f.type), num)) for f in SAMPLES_SCHEMA]
    return pa.Table.from_arrays(columns, schema=SAMPLES_SCHEMA)


def change_plan(store: ObjectStore, **changes: object) -> None:
    plan = load_plan(store)
    assert plan is not None
    store.put(PLAN_PATH, dump_record(dataclasses.replace(plan, **changes)))
    store.delete(commit.MANIFEST_PATH)


def many_samples_planned(store: ObjectStore) -> None:
    values = to_json(load_plan(store))
    part = {"first_sample": 0, "num_samples": 1 << 40, "object": values["parts"][0]["object"]}
    store.put(PLAN_PATH, sealed({**values, "num_samples": 1 << 40, "parts": [part]}))


def change_part(store: ObjectStore, table: pa.Table, **options: Any) -> None:
    plan = load_plan(store)
    data = table_bytes(table, **options)
    record = object_record(plan.parts[0].object.path, data)
    store.put(record.path, data)
    change_plan(store, num_samples=table.num_rows, parts=(PlanPart(0, table.num_rows, record),))


def many_samples_in_few_bytes(store: ObjectStore) -> None:
    change_part(store, rows_of(shard=pa.repeat(pa.scalar(0, pa.int32()), 200_000)))


def long_sample_in_few_bytes(store: ObjectStore) -> None:
    num_tokens = 17_000_000
    ids = pa.ListArray.from_arrays([0, num_tokens], pa.repeat(pa.scalar(0, pa.int32()), num_tokens))
    change_part(store, rows_of(input_ids=ids))


def many_words_in_few_bytes(store: ObjectStore) -> None:
    plan = load_plan(store)
    num = 200_000
    words = pa.table({"token": pa.repeat("x" * 100, num), "text": pa.repeat(b"x" * 100, num)})
    words = words.append_column("special", pa.repeat(pa.scalar(False), num))
    replace_object(store, plan.vocabulary, table_bytes(words))


def words_by_number(num: int) -> pa.Array:
    """One word of 8 MB, and its number so many times."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * num, pa.int32()), ["x" * 8_000_000])


def long_words_by_number(store: ObjectStore) -> None:
    table = rows_of(shard=pa.repeat(pa.scalar(0, pa.int32()), 1000))
    change_part(store, table.set_column(1, "source_id", words_by_number(1000)))


def long_words_by_number_in_a_column(store: ObjectStore) -> None:
    """Of the corpus's own, and nested: nobody but `Cache.samples` and `verify --deep` ever asks for it."""
    lists = pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), words_by_number(1000))
    table = rows_of(shard=pa.repeat(pa.scalar(0, pa.int32()), 1000))
    change_part(store, table.append_column("turns", lists))


def long_words_by_number_in_the_vocabulary(store: ObjectStore) -> None:
    special = pa.repeat(pa.scalar(False), 50)
    words = pa.table({"token": words_by_number(50), "text": words_by_number(50), "special": special})
    replace_object(store, load_plan(store).vocabulary, table_bytes(words))


def page_of_zeros(store: ObjectStore) -> None:
    table = rows_of(shard=pa.repeat(pa.scalar(0, pa.int32()), 1000))
    change_part(store, table.append_column("text", pa.repeat(pa.scalar(bytes(300_000)), 1000)), use_dictionary=False)


def change_rows(store: ObjectStore, num_rows: int) -> None:
    """A shard that says it has so many rows, with the bytes of a few."""
    store.delete(commit.MANIFEST_PATH)
    record = commit.load_commit(store, 0)
    plan = load_plan(store)
    change_plan(
        store, num_rows=plan.num_rows - record.num_rows + num_rows, shard_num_rows=(num_rows, *plan.shard_num_rows[1:])
    )
    store.put(commit.commit_path(0), dump_record(dataclasses.replace(record, num_rows=num_rows)))


def rows_beyond_any_type(store: ObjectStore) -> None:
    values = to_json(commit.load_commit(store, 0))
    store.delete(commit.MANIFEST_PATH)
    store.put(commit.commit_path(0), sealed({**values, "num_rows": 1 << 60}))


def wide_rows(store: ObjectStore) -> None:
    values = to_json(commit.load_identity(store))
    store.put("cache.json", sealed({**values, "k": 1 << 24, "vocab_size": 1 << 24}))


def nested(depth: int) -> Callable[[ObjectStore], None]:
    def change(store: ObjectStore) -> None:
        values = to_json(commit.load_identity(store))
        text = json.dumps({**values, "corpus": {**values["corpus"], "settings": {"deep": "HERE"}}})
        data = ('{"crc32c": "00000000", ' + text[1:].replace('"HERE"', "[" * depth + "]" * depth)).encode()
        store.put("cache.json", data[:12] + f"{google_crc32c.value(data):08x}".encode() + data[20:])

    return change


def change_manifest(store: ObjectStore, table: pa.Table) -> None:
    data = table_bytes(table)
    store.put(commit.MANIFEST_TABLE_PATH, data)
    record = ManifestRecord(min(table.num_rows, len(data) // 8), object_record(commit.MANIFEST_TABLE_PATH, data))
    store.put(commit.MANIFEST_PATH, dump_record(record))


def long_manifest_in_few_bytes(store: ObjectStore) -> None:
    num = 100_000
    zeros = {"attempt": "0" * 16, "worker": "", "created": "", "objects": [], "statistics": []}
    columns = [pa.repeat(pa.scalar(zeros.get(f.name, 0), f.type), num) for f in MANIFEST_SCHEMA]
    change_manifest(store, pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA))


def name_that_leaves_the_folder(store: ObjectStore) -> None:
    table = pq.read_table(io.BytesIO(store.get(commit.MANIFEST_TABLE_PATH)))
    rows = table.to_pylist()
    for row in rows:
        row["objects"][0]["suffix"] = "/../../../outside"
    change_manifest(store, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))


def big_batch_in_few_bytes(store: ObjectStore) -> None:
    """Rows that are there, but in an Arrow batch of 3 million, all equal."""
    record = commit.load_commit(store, 0)
    schema = pa.ipc.open_file(io.BytesIO(store.get(record.objects[0].path))).schema
    zeros = {f.name: [0] * 3 if pa.types.is_fixed_size_list(f.type) else 0 for f in schema}
    columns = [pa.repeat(pa.scalar(zeros[f.name], f.type), 3_000_000) for f in schema]
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    replace_object(store, record.objects[0], sink.getvalue())


UNPACKED = r"bytes that unpack to \d+ or more"

HOSTILE: dict[str, tuple[Callable[[ObjectStore], object], str]] = {
    "2^40 samples planned": (many_samples_planned, "1099511627776 samples in .* bytes"),
    "200k samples in few bytes": (many_samples_in_few_bytes, "200000 samples in row group 0, expected 1024"),
    "17M tokens in few bytes": (long_sample_in_few_bytes, "values in .* bytes"),
    "200k words in few bytes": (many_words_in_few_bytes, "200000 words"),
    "8 GB of one word": (long_words_by_number, UNPACKED),
    "8 GB of one word in lists": (long_words_by_number_in_a_column, UNPACKED),
    "800 MB of one word in the vocabulary": (long_words_by_number_in_the_vocabulary, UNPACKED),
    "300 MB of zeros": (page_of_zeros, UNPACKED),
    "2^31 rows in few bytes": (lambda store: change_rows(store, (1 << 31) - 1), "2147483647 rows of 3 ids in .* bytes"),
    "2^60 rows": (rows_beyond_any_type, "num_rows must be in"),
    "2^24 ids a row": (wide_rows, "rows of 16777216 ids in"),
    "JSON 500 deep": (nested(500), "nested"),
    "JSON 100,000 deep": (nested(100_000), "not a valid CacheIdentity"),
    "100k shards in few bytes": (long_manifest_in_few_bytes, "100000 shards and 1200000 values in .* bytes"),
    "name outside": (name_that_leaves_the_folder, "must be relative"),
    "3M rows in a batch": (big_batch_in_few_bytes, r"shards/00000-.*batch 0 unpacks to \d+ bytes"),
}


def test_hostile_caches_are_refused_within_little_memory(tmp_path: Path, count_fault) -> None:
    cases = [(name, "arrow", change, match) for name, (change, match) in HOSTILE.items()]
    cases.append(("2^31 rows in few bytes", "zarr", *HOSTILE["2^31 rows in few bytes"]))
    folders = []
    for n, (_, container, change, _) in enumerate(cases):
        folders.append(tmp_path / str(n))
        store = open_store(str(folders[-1]))
        write_cache(store, SAMPLES, TOPKS, identity=make_identity(k=3, container=container, shard_rows=30))
        change(store)
    for (name, _, _, match), found in zip(cases, read_all(folders), strict=True):
        said = json.dumps(found)
        assert "UNEXPECTED" not in said, f"{name}: {said}"
        assert not re.search("alloc|memory", said), f"{name}: {said}"  # refused before, not because there was none
        assert re.search(match, found["read"] or found["verify"]), f"{name}: {said}"
        count_fault("hostile caches refused")


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_any_bytes_under_good_checksums_are_refused_or_read(tmp_path: Path, container: str, count_fault) -> None:
    write_cache(str(tmp_path), SAMPLES, TOPKS, identity=make_identity(k=3, container=container, shard_rows=30))
    assert read_all([tmp_path], num_fuzzed=NUM_FUZZED) == [{}]
    for _ in range(NUM_FUZZED):
        count_fault("objects changed under good checksums")


def test_nothing_of_a_cache_is_run() -> None:
    """No module of storage can unpickle or evaluate anything."""
    files = sorted(Path(logitcache_storage.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
                assert not any(k.arg == "allow_pickle" for k in node.keywords), file
            forbidden = (
                r"(pickle|cloudpickle|dill|marshal|shelve|joblib)(\..*)?|eval|exec|np\.load|numpy\.load|yaml\.load"
            )
            assert not [name for name in names if re.fullmatch(forbidden, name)], file
