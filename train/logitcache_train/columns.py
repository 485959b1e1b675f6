"""Per-target data of samples: the corpus's own columns, and those of files that are joined by sample key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_train.objectives import Objective

SEQUENCE_COLUMN = "sequence"
"""The column that every sample has: which sequence of the micro-batch a target belongs to."""

ColumnReader = Callable[[int, npt.NDArray[np.int32], int, int], npt.NDArray[Any]]
"""(sample, its target positions [M], its number of tokens L, its place in the micro-batch) to per-target data [M]."""


class ColumnFiles:
    """Parquet files with a column `key` (16 bytes, or 32 hex digits) and columns of numbers.

    A value belongs to the sample of that key, in every cache: a number, or a list of numbers, one for each of its
    tokens or targets. `logitcache doubtful --columns` writes such a file.
    """

    def __init__(self, paths: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> None:
        """Read the files.

        Args:
            paths: or URLs; of several values for one key that of the first file counts.
            storage_options: handed to fsspec.

        Raises:
            InputError: a file cannot be read, or has no key.
        """
        self.paths = tuple(paths)
        self._tables = [_read(path, storage_options) for path in paths]
        self._keys = [_keys(table, path) for table, path in zip(self._tables, paths, strict=True)]

    @property
    def names(self) -> list[str]:
        """Of all columns but the keys."""
        return list(dict.fromkeys(name for table in self._tables for name in table.column_names if name != "key"))

    def fingerprint(self) -> str | None:
        """Of keys and values; None without files."""
        digest = hashlib.sha256()
        for table in self._tables:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            digest.update(sink.getvalue())
        return digest.hexdigest() if self._tables else None

    def values(self, name: str, cache: Cache, samples: npt.NDArray[np.int64]) -> Callable[[int], Any]:
        """The value of a column for each of these samples of a cache, by the sample's index.

        Raises:
            InputError: a sample has none.
        """
        keys = cache.keys()
        columns: list[pa.ChunkedArray] = []
        column_of, row_of = (np.full(len(cache), -1, np.int64) for _ in range(2))
        for table, own in zip(self._tables, self._keys, strict=True):
            if name not in table.column_names:
                continue
            left = samples[column_of[samples] < 0]
            found = pc.index_in(_arrow(keys[left]), value_set=own)
            there = left[np.asarray(found.is_valid())]
            column_of[there], row_of[there] = len(columns), found.drop_null().to_numpy(zero_copy_only=False)
            columns.append(table.column(name))
        lacking = samples[column_of[samples] < 0]
        if len(lacking):
            raise InputError(
                f"--columns {', '.join(self.paths)}: no {name!r} for {len(lacking):,} of {len(samples):,} samples of"
                f" {cache.store.url}, the first with key {cache.key(int(lacking[0]))}; give a file that has them, too"
            )
        # Not one array of all: in one file numbers may be whole, in another not.
        return lambda sample: columns[column_of[sample]][int(row_of[sample])].as_py()


NO_FILES = ColumnFiles(())


def column_readers(
    objective: Objective, cache: Cache, samples: npt.NDArray[np.int64], files: ColumnFiles = NO_FILES
) -> dict[str, ColumnReader]:
    """A reader for every column that the objective may look at and the files or the cache have; files come first.

    Args:
        objective: says which columns.
        cache: whose samples.
        samples: those that will be asked for.
        files: columns besides those of the corpus.

    Raises:
        InputError: neither has a column that the objective needs, or no column of the files is looked at.
    """
    readers: dict[str, ColumnReader] = {}
    asked = (*objective.columns, *objective.optional_columns)
    if files.paths and not set(asked) & set(files.names):
        raise InputError(
            f"--columns {', '.join(files.paths)}: objective {objective.name!r} looks at"
            f" {', '.join(map(repr, asked)) or 'no column'}, the file has {', '.join(map(repr, files.names)) or 'none'}"
        )
    for name in asked:
        if name in files.names:
            readers[name] = _reader(name, cache, files.values(name, cache, samples))
        elif name == SEQUENCE_COLUMN:
            readers[name] = lambda _, positions, __, place: np.full(len(positions), place)
        elif name in cache.column_names:
            readers[name] = _reader(name, cache, _corpus_value(name, cache))
        elif name in objective.columns:
            raise InputError(
                f"objective {objective.name!r} needs the column {name!r}, which {cache.store.url} does not have;"
                " put it into the corpus (one number a record, or one for each token) and build the cache again,"
                " or give a Parquet file with 'key' and this column (--columns)"
            )
    return readers


def _corpus_value(name: str, cache: Cache) -> Callable[[int], Any]:
    return lambda sample: cache.describe([sample])[0][name]


def _reader(name: str, cache: Cache, value_of: Callable[[int], Any]) -> ColumnReader:
    def read(index: int, positions: npt.NDArray[np.int32], num_tokens: int, _: int) -> npt.NDArray[Any]:
        value = value_of(index)
        data = np.asarray(value, dtype=np.float32) if _is_numeric(value) else None
        if data is not None and data.ndim == 0:
            return np.full(len(positions), data)
        if data is not None and data.shape == (num_tokens,):
            return data[positions]
        if data is not None and data.shape == (len(positions),):
            return data
        raise InputError(
            f"column {name!r} of sample {cache.key(index)}: expected a number, or a list of numbers, one for"
            f" each of its {num_tokens} tokens or {len(positions)} targets; found {str(value)[:60]!r}"
        )

    return read


def _is_numeric(value: Any) -> bool:
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return all(isinstance(v, int | float) for v in values)


def _read(path: str, storage_options: Mapping[str, Any] | None) -> pa.Table:
    try:
        with fsspec.open(path, "rb", **(storage_options or {})) as file:
            # Without Arrow's threads: one that lets go of our bytes while the interpreter ends, ends the process.
            return pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
    except Exception as e:  # clients of stores raise what they like
        raise InputError(f"--columns {path}: cannot be read as Parquet: {e}") from e


def _keys(table: pa.Table, path: str) -> pa.Array:
    """The keys as 16 bytes each."""
    column = table.column("key").combine_chunks() if "key" in table.column_names else None
    if column is not None and pa.types.is_string(column.type):
        try:
            column = pa.array([bytes.fromhex(key) for key in column.to_pylist()], pa.binary(16))
        except (ValueError, TypeError, pa.ArrowInvalid):
            column = None
    if column is None or column.type != pa.binary(16):
        raise InputError(
            f"--columns {path}: needs a column 'key' of sample keys, 16 bytes or 32 hex digits each; it has"
            f" {', '.join(f'{f.name} ({f.type})' for f in table.schema)}"
        )
    return column


def _arrow(keys: npt.NDArray[np.void]) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(keys))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, data])
