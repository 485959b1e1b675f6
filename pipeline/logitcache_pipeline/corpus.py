"""Reading a corpus: JSON lines, Parquet and Hugging Face datasets, record by record, from any fsspec URL.

A source is one of, each possibly several by a pattern such as `data/*.jsonl.zst`:

    .jsonl .ndjson .json (one object per line), with .gz, .zst or .bz2 after it         .parquet
    a folder written by `Dataset.save_to_disk`, or a dataset name; `:SPLIT` after either

A null inside a record is an absent field: Parquet and datasets cannot tell the two apart, so nobody may.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_pipeline.columns import ColumnTypes, canonical_json
from logitcache_storage.errors import CorpusError, InputError, StoreError

Rows = Iterator[tuple[int, dict[str, Any]]]

_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_KNOWN_SUFFIXES = f"{', '.join(_LINE_SUFFIXES)} (also with {', '.join(_COMPRESSIONS)}), .parquet"
_DATASET_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
_DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.|$)", re.IGNORECASE)
_SURROGATE = re.compile(rb"\\u[dD]")
_ROWS_PER_BATCH = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the corpus and where it came from: `train.jsonl:17`, lines and rows counted from 1."""

    source_id: str
    data: dict[str, Any]


@dataclass(frozen=True)
class CorpusSurvey:
    """What one pass over a corpus says of it, the same for every container and compression."""

    fingerprint: str
    """SHA-256 (hex) over the canonical JSON of the records, in order."""
    num_records: int
    num_bytes: int
    """Bytes of that canonical JSON."""
    fields: tuple[str, ...]
    """Field names of the first record, sorted: they decide the shape of all."""
    columns: pa.Schema
    """Every field that occurs, sorted by name, with its arrow type (`columns.ColumnTypes`)."""


def read_records(sources: str | Sequence[str], storage_options: Mapping[str, Any] | None = None) -> Iterator[Record]:
    """All records of the sources, in the order given (a pattern: sorted), streamed.

    Source ids start with the name of the file or folder; the second source of a name becomes `name#2`.
    The sources are looked up at once, before the first record is asked for.

    Args:
        sources: paths, URLs, patterns or dataset names.
        storage_options: handed to fsspec (credentials, endpoint).

    Raises:
        InputError: a source is missing or of an unknown kind.
        StoreError: the store could not be reached.
        CorpusError: while iterating: a file or a line cannot be read.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise InputError("no corpus: expected at least one file, URL or dataset name")
    found = [source for name in names for source in _find(str(name), dict(storage_options or {}))]
    return _records(found)


def survey(sources: str | Sequence[str], storage_options: Mapping[str, Any] | None = None) -> CorpusSurvey:
    """Fingerprint, size and columns of a corpus, in one streamed pass; errors as `read_records`.

    Raises:
        CorpusError: there is no record at all.
    """
    digest, columns = hashlib.sha256(), ColumnTypes()
    num_records = num_bytes = 0
    fields: tuple[str, ...] = ()
    for record in read_records(sources, storage_options):
        line = canonical_json(record.data).encode() + b"\n"
        digest.update(line)
        columns.add(record.data)
        fields = fields if num_records else tuple(sorted(record.data))
        num_records += 1
        num_bytes += len(line)
    if not num_records:
        where = sources if isinstance(sources, str) else ", ".join(sources)
        raise CorpusError(f"{where}: no records; expected at least one line or row")
    return CorpusSurvey(digest.hexdigest(), num_records, num_bytes, fields, columns.schema())


@dataclass(frozen=True)
class _Source:
    where: str
    name: str
    rows: Callable[[], Rows]


def _records(sources: Iterable[_Source]) -> Iterator[Record]:
    used: set[str] = set()
    for source in sources:
        label, count = source.name, 1
        while label in used:
            count += 1
            label = f"{source.name}#{count}"
        used.add(label)
        for number, data in source.rows():
            yield Record(f"{label}:{number}", data)


def _find(source: str, options: dict[str, Any]) -> list[_Source]:
    """The files and datasets a source stands for, looked up but not read."""
    try:
        fs, path = fsspec.core.url_to_fs(source, **options)
    except (ImportError, ValueError) as e:
        raise InputError(f"{_public(source)}: no file system for this URL: {e}") from e
    if _reach(source, fs.exists, path):
        return [_open(source, fs, path, options)]
    if glob.has_magic(source) and not source.startswith("http"):
        if not (paths := sorted(_reach(source, fs.glob, path))):
            raise InputError(f"{source}: no file matches this pattern")
        return [_open(_url(fs, path), fs, path, options) for path in paths]
    head, _, split = source.rpartition(":")
    if head and re.fullmatch(r"[\w.\-]+", split):
        fs, path = fsspec.core.url_to_fs(head, **options)
        if _reach(head, fs.exists, path):
            return [_open(head, fs, path, options, split)]
    else:
        head, split = source, ""
    if _DATASET_NAME.fullmatch(head) and not _DATA_FILE.search(head):
        return [_hub_dataset(head, split)]
    raise InputError(f"{_public(source)}: no such file or folder; give a path, a URL, a pattern or a dataset name")


def _open(source: str, fs: Any, path: str, options: dict[str, Any], split: str = "") -> _Source:
    where, name = _public(source), PurePosixPath(_public(path)).name
    if _reach(source, fs.isdir, path):
        return _saved_dataset(where, fs, path, options, split)
    if split:
        raise InputError(f"{where}:{split}: only a dataset has splits, this is a file; drop the ':{split}'")
    stem, suffix = PurePosixPath(name.lower()).stem, PurePosixPath(name.lower()).suffix
    if suffix == ".parquet":
        return _Source(where, name, partial(_parquet_rows, where, fs, path))
    compression = _COMPRESSIONS.get(suffix)
    if PurePosixPath(stem if compression else name.lower()).suffix in _LINE_SUFFIXES:
        return _Source(where, name, partial(_json_lines, where, fs, path, compression))
    raise InputError(f"{where}: unknown kind of file {suffix or name!r}; expected {_KNOWN_SUFFIXES}")


def _json_lines(where: str, fs: Any, path: str, compression: str | None) -> Rows:
    number = 0
    try:
        with fs.open(path, "rb") as raw:
            # Arrow's decompressors read on over concatenated frames and refuse a truncated file;
            # fsspec's zstd ends quietly in both cases.
            lines = io.BufferedReader(pa.CompressedInputStream(raw, compression)) if compression else raw
            for number, line in enumerate(lines, start=1):
                text = (line.removeprefix(_BOM) if number == 1 else line).strip()
                if text:
                    yield number, _parse_line(text, f"{where}, line {number}")
    except (OSError, pa.ArrowException) as e:
        raise CorpusError(
            f"{where}: reading stopped after line {number}: {e}; check that the file is whole, then run again"
        ) from e


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    remedy = "every line must hold one JSON object; repair or delete this one"
    try:
        data = json.loads(line.decode())
        if _SURROGATE.search(line):
            json.dumps(data, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as e:
        raise CorpusError(f"{where}: not valid JSON in UTF-8: {e}; found {line[:60]!r}; {remedy}") from e
    if not isinstance(data, dict):
        raise CorpusError(f"{where}: expected a JSON object, found {line[:60]!r}; {remedy}")
    return {key: _without_nulls(value) for key, value in data.items() if value is not None}


def _parquet_rows(where: str, fs: Any, path: str) -> Rows:
    def batches() -> Iterator[Any]:
        with fs.open(path, "rb") as raw:
            # Without Arrow's threads: one that lets go of our bytes while the interpreter ends, ends the process.
            yield from pq.ParquetFile(raw, pre_buffer=False).iter_batches(_ROWS_PER_BATCH, use_threads=False)

    return _table_rows(where, batches)


def _table_rows(where: str, batches: Callable[[], Iterable[Any]]) -> Rows:
    """Rows of tables or record batches, as plain Python values."""
    number = 0
    try:
        for batch in batches():
            for data in batch.to_pylist():
                number += 1
                yield number, _without_nulls(data)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise CorpusError(
            f"{where}: reading stopped after row {number}: {e}; check that the file is whole, then run again"
        ) from e


def _saved_dataset(where: str, fs: Any, path: str, options: dict[str, Any], split: str) -> _Source:
    marks = ("dataset_info.json", "dataset_dict.json")
    if not any(_reach(where, fs.exists, f"{path}/{mark}") for mark in marks):
        raise InputError(
            f"{where}: a folder that Dataset.save_to_disk did not write;"
            " name its files, for instance with a pattern such as 'folder/*.jsonl'"
        )
    import datasets

    try:
        found = datasets.load_from_disk(_url(fs, path), storage_options=options or None)
    except Exception as e:  # whatever is wrong inside the folder, the library has an error of its own for it
        raise CorpusError(f"{where}: cannot be loaded: {type(e).__name__}: {e}; save the dataset again") from e
    return _dataset(where, PurePosixPath(path).name, found, split)


def _hub_dataset(name: str, split: str) -> _Source:
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as e:  # the hub's client raises a dozen kinds of errors, all of which mean the same here
        raise InputError(
            f"{name}: no such file or folder, and not a dataset that can be loaded: {type(e).__name__}: {e};"
            " or save it with Dataset.save_to_disk and give the folder"
        ) from e
    return _dataset(name, PurePosixPath(name).name, found, split)


def _dataset(where: str, name: str, found: Any, split: str) -> _Source:
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    wanted = split or ("train" if isinstance(found, dict) else next(iter(splits)))
    if wanted not in splits:
        raise InputError(f"{where}: no split {wanted!r}, found {', '.join(splits)}; choose one with '{where}:SPLIT'")
    tables = splits[wanted].with_format("arrow")
    return _Source(where, name, partial(_table_rows, where, partial(tables.iter, batch_size=_ROWS_PER_BATCH)))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [_without_nulls(item) for item in value]
    return value


def _reach(source: str, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return ask(*args, **kwargs)
    except Exception as e:  # every file system has errors of its own
        raise StoreError(f"{_public(source)}: cannot be reached: {type(e).__name__}: {e}") from e


def _url(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _public(url: str) -> str:
    """The URL without its query, which may hold a signature that no log should show."""
    return url.split("?")[0] if url.startswith("http") else url
