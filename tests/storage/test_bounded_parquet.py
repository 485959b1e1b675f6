"""Parquet of every kind is read as Arrow reads it; what would fill the memory is refused before it is unpacked."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache_storage import bounded_parquet
from logitcache_storage.bounded_parquet import BoundedParquet

NUM_ROWS = 1024


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "zstd", "row_group_size": NUM_ROWS, **options})
    return sink.getvalue()


def opened(data: bytes) -> BoundedParquet:
    return BoundedParquet(lambda: io.BytesIO(data), len(data))


def many_kinds() -> pa.Table:
    rng = np.random.default_rng(0)
    words = [rng.bytes(1000).hex() for _ in range(2 * NUM_ROWS)]
    turns = [[{"role": "user", "text": word[:n]}, {"role": "x", "text": None}][: n % 3] for n, word in enumerate(words)]
    return pa.table(
        {
            "word": words,
            "few": [["yes", "no", None][n % 3] for n in range(2 * NUM_ROWS)],
            "turns": pa.array(turns, pa.list_(pa.struct([("role", pa.string()), ("text", pa.large_string())]))),
            "flag": [n % 5 == 0 for n in range(2 * NUM_ROWS)],
            "key": pa.array([bytes.fromhex(word[:32]) for word in words], pa.binary(16)),
            "score": rng.random(2 * NUM_ROWS),
            "ids": [[n] * (n % 7) for n in range(2 * NUM_ROWS)],
            "kind": pa.array(["a", "b"] * NUM_ROWS).dictionary_encode(),
            "none": pa.nulls(2 * NUM_ROWS),
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False, "compression": "none", "version": "1.0"},
        {"data_page_version": "2.0", "data_page_size": 5000, "write_statistics": False},
        {"dictionary_pagesize_limit": 3000, "data_page_size": 2000, "write_page_checksum": True, "compression": "gzip"},
        {"store_schema": False, "compression": "snappy", "use_byte_stream_split": ["score"], "use_dictionary": ["few"]},
    ],
    ids=lambda options: ",".join(options) or "as we write",
)
def test_what_is_no_bomb_is_read(options: dict[str, Any]) -> None:
    data = written(many_kinds(), **options)
    file, expected = opened(data), pq.read_table(io.BytesIO(data))
    assert file.read().equals(expected)
    for names in (["ids"], ["turns", "key"]):
        assert file.read_group(1, names).equals(expected.select(names).slice(NUM_ROWS))
    for i in range(file.metadata.num_columns):
        column = file.metadata.row_group(0).column(i)
        pages = file._pages(column)
        assert sum(page.num_values for page in pages if page.kind != 2) == column.num_values
        headers = column.total_uncompressed_size - sum(page.num_bytes for page in pages)
        assert 10 * len(pages) <= headers <= 10_000 * len(pages)  # the least and the greatest word stand in them


def test_long_words_that_occur_once_are_looked_at_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes of pages alone they could be a dictionary of one word of 2 MB that every row repeats."""
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES_AT_ONCE", 0)
    looked_at: list[str] = []
    spelled_out = BoundedParquet._spelled_out
    monkeypatch.setattr(
        BoundedParquet, "_spelled_out", lambda file, *where: looked_at.append(where[1]) or spelled_out(file, *where)
    )
    data = written(many_kinds().select(["word", "few", "turns"]))
    assert opened(data).read().equals(pq.read_table(io.BytesIO(data)))
    assert {"word", "turns.list.element.text"} <= set(looked_at)


LONG = "x" * 100_000


def by_number() -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * NUM_ROWS, pa.int32()), [LONG])


def in_lists(values: pa.Array) -> pa.Array:
    inner = pa.StructArray.from_arrays([values], ["text"])
    return pa.ListArray.from_arrays(pa.array(range(NUM_ROWS + 1), pa.int32()), inner)


BOMBS: dict[str, tuple[Callable[[], pa.Array], dict[str, Any]]] = {
    "a word by its number": (by_number, {}),
    "words by their numbers, in lists": (lambda: in_lists(by_number()), {}),
    "words by their difference": (
        lambda: pa.array([LONG[: 50_000 + n] for n in range(NUM_ROWS)]),
        {"use_dictionary": False, "column_encoding": {"x": "DELTA_BYTE_ARRAY"}},
    ),
    "zeros": (lambda: pa.array([bytes(20_000)] * NUM_ROWS), {"use_dictionary": False}),
    "wide zeros": (lambda: pa.array([bytes(20_000)] * NUM_ROWS, pa.binary(20_000)), {}),
}


POOL = pa.proxy_memory_pool(pa.default_memory_pool())
"""Counts what is allocated from it; it must outlive that."""


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_fill_the_memory_is_refused_before_it_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES_AT_ONCE", 1 << 20)
    make, options = BOMBS[name]
    data = written(pa.table({"x": make()}), store_schema=False, dictionary_pagesize_limit=1 << 30, **options)
    usual = pa.default_memory_pool()
    pa.set_memory_pool(POOL)
    try:
        with pytest.raises(ValueError, match=r"bytes that unpack to \d+ or more, which no writer makes"):
            opened(data).read()
    finally:
        pa.set_memory_pool(usual)
    assert POOL.max_memory() < 4 << 20


def test_many_groups_are_together_no_more_than_one_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES_AT_ONCE", 30_000_000)
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), [LONG])
    options = {"store_schema": False, "dictionary_pagesize_limit": 1 << 30, "row_group_size": 250}
    file = opened(written(pa.table({"x": values}), **options))
    assert file.metadata.num_row_groups == 2 and file.read_group(1).num_rows == 250
    with pytest.raises(ValueError, match=r"bytes that unpack to \d+ or more"):
        file.read()


def test_page_headers_are_what_counts() -> None:
    """The footer may say what it likes of sizes; and headers that no writer makes are refused."""
    data = written(pa.table({"x": pa.array(np.arange(NUM_ROWS, dtype=np.int64))}), use_dictionary=False)
    start, _ = opened(data).byte_range(0)
    for change in (b"\xff" * 20, b"\x19" * 20, b"\x00" * 20, b"\x1c" * 20):
        with pytest.raises((ValueError, LookupError)):
            opened(data[:start] + change + data[start + 20 :]).read()


READ = """
import os, sys
from pathlib import Path
from logitcache_storage.bounded_parquet import BoundedParquet

path = Path(sys.argv[1])
file = BoundedParquet(lambda: path.open("rb"), path.stat().st_size)
before = len(os.listdir("/proc/self/task"))
assert len(file.read()) == file.metadata.num_rows
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_no_thread_of_arrow_holds_our_bytes(tmp_path):
    """One that lets go of them while the interpreter ends takes the process with it, by SIGABRT."""
    path = tmp_path / "table.parquet"
    path.write_bytes(written(many_kinds()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", READ, path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
