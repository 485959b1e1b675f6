"""A cache as plain Parquet, for tools that know nothing of it: one row per sample, in the order of the cache.

`parquet` holds everything, one list entry per target token; it is what pandas, DuckDB and `datasets` read:

    key, source_id                  string
    input_ids, labels               list<int32>, [L]; labels are input_ids at the targets and -100 elsewhere
    target_positions                list<int32>, [M]; entry m of each list below predicts input_ids[target_positions[m]]
    ids, log_probs                  list<list>, [M][number kept], the most likely first
    log_tail, label_log_prob        list<float32>, [M]
    ... and the corpus's own columns, as `corpus_NAME` where the name is taken

`axolotl` is what Axolotl's KD plugin (`axolotl.integrations.kd`) takes from a dataset that is prepared already:

    input_ids, attention_mask, labels, position_ids       list, [L]; and length, for sample packing
    target_token_ids, target_logprobs, target_mask        list<list>, [L][k]

Row j of the three last describes the token at j + 1, as the student's output at j does: the plugin's documentation
calls this alignment `current`. Positions that predict no target, and entries that are not kept, hold id 0, log-prob
-1e9 and mask 0. The plugin takes the teacher's log-probs as normalised over the entries that are there, so they are
divided by the kept mass: the tail cannot be told to it. Its `kd_normalize_topk` does the same to the student, over all
k entries, padded ones too: it is right for rows that keep k entries, and to be switched off for others. Its
`kd_temperature` must be 1, and no sample may be longer than `sequence_len`: data that is prepared is taken as it is.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.errors import InputError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.progress import progress
from logitcache_storage.record_json import to_json
from logitcache_storage.samples import SAMPLES_SCHEMA, read_parquet_object
from logitcache_storage.topk import TopKLogProbs

IGNORE_INDEX = -100
"""The label of a position that is no target, as PyTorch's cross entropy has it."""
PADDED_LOG_PROB = -1e9
"""What the plugin puts where there is no entry: finite, so that zero times it is zero."""

GROUP_VALUES = 1 << 22
"""Log-probs, or tokens, in a row group; what is in memory at once is a few times 4 bytes of each."""
FILE_BYTES = 1 << 28
"""A file is closed when it has reached this size."""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    url: str
    layout: str
    output: str
    files: tuple[str, ...]
    """Below `output`."""
    num_samples: int
    num_rows: int
    num_bytes: int
    is_complete: bool
    """Whether the cache holds every planned shard; what it does not hold is not exported."""
    kept_in_full: bool
    """Whether every row keeps k entries."""
    longest: int
    """Tokens of the longest sample."""


def export_cache(
    cache: Cache, output: ObjectStore, layout: str, *, overwrite: bool = False, quiet: bool = True
) -> ExportReport:
    """Write all committed samples as Parquet files of bounded size, each of them whole or not at all.

    Args:
        cache: what to export.
        output: where the files go, `part-00000.parquet` and so on.
        layout: `parquet` or `axolotl`, see the top of the module.
        overwrite: remove the files of an earlier export first.
        quiet: show no progress.

    Raises:
        InputError: unknown layout, or one that needs ids of a cache without; the output is not empty, or holds more
            than an earlier export.
        CorruptionError: an object of the cache is damaged; the files before it stay.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; choose from {', '.join(sorted(LAYOUTS))}")
    if layout == "axolotl" and not cache.identity.k:
        raise InputError(
            f"{cache.store.url} keeps label log-probs only (k = 0), and the layout axolotl is made of the teacher's"
            " top-k; export a cache of role teacher, or take the layout parquet"
        )
    _clear(output, overwrite)
    to_table, width = LAYOUTS[layout], "num_targets" if layout == "parquet" else "num_tokens"
    k, corpus = cache.identity.k, _corpus_columns(cache)
    # Long prompts may have many more tokens than few targets have log-probs.
    values = np.maximum(getattr(cache.index, width).astype(np.int64) * max(k, 1), cache.index.num_tokens)
    about = {"layout": layout, "url": cache.store.url, "identity": to_json(cache.identity)}
    files = _Files(output, {b"logitcache": json.dumps(about).encode()})
    num_rows, kept_in_full = 0, True
    with progress("exporting", total=len(cache), unit="samples", quiet=quiet) as meter:
        for group in _groups(values, GROUP_VALUES):
            samples = cache.read(group)
            files.write(to_table(samples, k, corpus))
            num_rows += sum(len(sample.topk) for sample in samples)
            kept_in_full &= all(bool((sample.topk.num_kept == sample.topk.k).all()) for sample in samples)
            meter.advance(len(samples))
    if not len(cache):
        files.write(to_table([], k, corpus))
    files.close()
    return ExportReport(
        url=cache.store.url,
        layout=layout,
        output=output.url,
        files=tuple(files.names),
        num_samples=len(cache),
        num_rows=num_rows,
        num_bytes=files.num_bytes,
        is_complete=cache.is_complete,
        kept_in_full=kept_in_full,
        longest=int(cache.index.num_tokens.max(initial=0)),
    )


def parquet_table(samples: list[Sample], k: int, corpus: list[pa.Field]) -> pa.Table:
    """Samples in the layout `parquet`; `corpus` are the corpus's own columns."""
    topk = _joined(samples, k)
    counts = [len(sample.topk) for sample in samples]
    kept = topk.kept
    columns = {
        "key": pa.array([sample.key for sample in samples], pa.string()),
        "source_id": pa.array([sample.source_id for sample in samples], pa.string()),
        "input_ids": _lists([sample.input_ids for sample in samples], pa.int32()),
        "labels": _lists([_labels(sample) for sample in samples], pa.int32()),
        "target_positions": _lists([sample.target_positions for sample in samples], pa.int32()),
        "ids": _split(_split(pa.array(topk.ids[kept]), topk.num_kept), counts),
        "log_probs": _split(_split(pa.array(topk.log_probs[kept]), topk.num_kept), counts),
        "log_tail": _split(pa.array(topk.log_tail), counts),
        "label_log_prob": _split(pa.array(topk.label_log_prob), counts),
    }
    for f in corpus:
        name = f.name
        while name in columns:
            name = f"corpus_{name}"
        columns[name] = pa.array([sample.columns[f.name] for sample in samples], f.type)
    return pa.table(columns)


def axolotl_table(samples: list[Sample], k: int, corpus: list[pa.Field]) -> pa.Table:
    """Samples in the layout `axolotl`, which has no place for the corpus's own columns."""
    topk = _joined(samples, k)
    lengths = np.asarray([len(sample.input_ids) for sample in samples], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    # The teacher's row for the token at p stands where the student predicts it: at p - 1.
    before = [start + sample.target_positions - 1 for start, sample in zip(starts, samples, strict=True)]
    rows = np.concatenate([np.zeros(0, np.int64), *before])
    shape = (int(lengths.sum()), k)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
    log_probs = np.full(shape, PADDED_LOG_PROB, np.float32)
    ids[rows] = np.where(topk.kept, topk.ids, 0)
    mask[rows] = topk.kept
    log_probs[rows] = np.where(topk.kept, _normalised(topk), PADDED_LOG_PROB)

    def per_token(values: npt.NDArray[Any]) -> pa.Array:
        return _split(_split(pa.array(values.ravel()), np.full(shape[0], k)), lengths)

    return pa.table(
        {
            "input_ids": _lists([sample.input_ids for sample in samples], pa.int32()),
            "attention_mask": _lists([np.ones(n, np.int8) for n in lengths], pa.int8()),
            "labels": _lists([_labels(sample) for sample in samples], pa.int32()),
            "position_ids": _lists([np.arange(n, dtype=np.int32) for n in lengths], pa.int32()),
            "length": pa.array(lengths, pa.int32()),
            "target_token_ids": per_token(ids),
            "target_logprobs": per_token(log_probs),
            "target_mask": per_token(mask),
        }
    )


LAYOUTS: dict[str, Callable[[list[Sample], int, list[pa.Field]], pa.Table]] = {
    "parquet": parquet_table,
    "axolotl": axolotl_table,
}


class _Files:
    """Tables one after the other, in files of about `FILE_BYTES` that appear when they are whole."""

    def __init__(self, output: ObjectStore, metadata: Mapping[bytes, bytes]) -> None:
        self._output, self._metadata = output, metadata
        self._sink = io.BytesIO()
        self._writer: pq.ParquetWriter | None = None
        self.names: list[str] = []
        self.num_bytes = 0

    def write(self, table: pa.Table) -> None:
        """One more row group."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._sink, table.schema.with_metadata(dict(self._metadata)), compression="zstd"
            )
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        if self._sink.tell() >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Put the file that is being written, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        data = self._sink.getvalue()
        name = f"part-{len(self.names):05d}.parquet"
        self._output.put(name, data)
        self.names.append(name)
        self.num_bytes += len(data)
        self._sink, self._writer = io.BytesIO(), None


def _clear(output: ObjectStore, overwrite: bool) -> None:
    found = output.list("")
    if not found:
        return
    if not overwrite:
        raise InputError(f"{output.url}: not empty; choose another output, or replace an earlier export (--overwrite)")
    if others := [name for name in found if not _is_part(name)]:
        raise InputError(f"{output.url}: holds {others[0]}, which no export wrote; choose another output")
    for name in found:
        output.delete(name)


def _is_part(name: str) -> bool:
    stem = name.removeprefix("part-").removesuffix(".parquet")
    return name == f"part-{stem}.parquet" and len(stem) >= 5 and stem.isdecimal()


def _groups(values: npt.NDArray[np.int64], most: int) -> Iterator[range]:
    """Consecutive samples of about so many values together; at least one each."""
    group = (np.cumsum(values) - 1) // most
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(values)]
    yield from (range(start, stop) for start, stop in itertools.pairwise(edges) if stop > start)


def _corpus_columns(cache: Cache) -> list[pa.Field]:
    if not cache.plan.parts:
        return []
    schema = read_parquet_object(cache.store, cache.plan.parts[0].object).schema_arrow
    return [f for f in schema if f.name not in SAMPLES_SCHEMA.names]


def _joined(samples: list[Sample], k: int) -> TopKLogProbs:
    empty = TopKLogProbs(
        np.zeros((0, k), np.int32),
        np.zeros((0, k), np.float32),
        np.zeros(0, np.int32),
        np.zeros(0, np.float32),
        np.zeros(0, np.float32),
    )
    return TopKLogProbs.concatenate([empty, *(sample.topk for sample in samples)])


def _normalised(topk: TopKLogProbs) -> npt.NDArray[np.float64]:
    """Log-probs divided by the kept mass, [N, k]; -inf beyond `num_kept`."""
    log_probs = np.where(topk.kept, topk.log_probs, -np.inf).astype(np.float64)
    return np.asarray(log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True))


def _labels(sample: Sample) -> npt.NDArray[np.int32]:
    labels = np.full(len(sample.input_ids), IGNORE_INDEX, np.int32)
    labels[sample.target_positions] = sample.labels
    return labels


def _lists(arrays: list[npt.NDArray[Any]], dtype: pa.DataType) -> pa.Array:
    values = pa.array(np.concatenate([np.zeros(0, dtype.to_pandas_dtype()), *arrays]), dtype)
    return _split(values, [len(array) for array in arrays])


def _split(values: pa.Array, lengths: Any) -> pa.Array:
    """Consecutive lists of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
