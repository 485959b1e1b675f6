"""Samples to shards: a pure function of the samples' order and the settings, streamed into tables.

Consecutive samples fill a shard up to `shard_rows` target rows. A sample never straddles two shards, and one
with more rows than that has a shard of its own. A duplicate (same key) has the rows of its first occurrence.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache_pipeline.columns import column_array
from logitcache_pipeline.tokenize import Excluded, TokenizedSample
from logitcache_storage.errors import CorpusError, InputError
from logitcache_storage.samples import SAMPLES_SCHEMA

MAX_EXAMPLES = 5
MAX_TOKENS_PER_PART = 1 << 26

_EXCLUDED = ("overlong", "empty", "without_targets", "in_cache")
_NOTED = {
    "duplicates": "share the rows of an equal sample: scored once, trained as often as they occur",
    "truncated": "were cut to the maximum length",
    "overlong": "are longer than the maximum length: left out",
    "empty": "have nothing to learn from: left out",
    "without_targets": "have no target token: left out",
    "in_cache": "are in the cache already: left out",
}


@dataclass(frozen=True)
class PlanSummary:
    """What a plan adds up to."""

    num_samples: int
    num_tokens: int
    num_rows: int
    """Target rows to be scored; duplicates have none of their own."""
    shard_num_rows: tuple[int, ...]
    report: dict[str, Any]
    """Counts, length percentiles and examples, as JSON values; `render_report` puts it in words."""


def default_shard_rows(num_bytes: int) -> int:
    """Rows of a shard for a corpus of `CorpusSurvey.num_bytes`: about 64 shards of 4,096 to 131,072 rows."""
    rows = num_bytes // 4 // 64  # four bytes are about a token
    return (min(max(rows, 4096), 131072) + 512) // 1024 * 1024


def plan_schema(extra_columns: pa.Schema) -> pa.Schema:
    """Schema of the samples table; a corpus column with the name of a fixed one becomes `corpus_<name>`.

    Raises:
        CorpusError: the corpus has a column of that name, too.
    """
    renamed = [f.with_name(f"corpus_{f.name}") if f.name in SAMPLES_SCHEMA.names else f for f in extra_columns]
    names = Counter(f.name for f in renamed)
    for f in extra_columns:
        if names[f.name] > 1:
            raise CorpusError(
                f"the corpus has the columns {f.name!r} and {f.name.removeprefix('corpus_')!r}, and the"
                " second is stored under the name of the first; rename one of them in the corpus"
            )
    return pa.schema([*SAMPLES_SCHEMA, *renamed])


def plan_tables(
    samples: Iterable[TokenizedSample | Excluded],
    *,
    shard_rows: int,
    extra_columns: pa.Schema,
    first_shard: int = 0,
    samples_per_part: int = 65536,
) -> Iterator[pa.Table | PlanSummary]:
    """Tables of consecutive samples, each of the schema `plan_schema(extra_columns)`, and last their summary.

    Args:
        samples: what `tokenize_records` gives.
        shard_rows: target rows of a shard, at least 1.
        extra_columns: the corpus's own columns (`columns.extra_columns`).
        first_shard: number of the first shard in the cache: those below it belong to earlier plans.
        samples_per_part: most samples of a table; one ends earlier at `MAX_TOKENS_PER_PART` tokens.

    Raises:
        CorpusError: no record became a sample.
    """
    for name, value in (("shard_rows", shard_rows), ("samples_per_part", samples_per_part)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    schema, placement, tally = plan_schema(extra_columns), _Placement(shard_rows, first_shard), _Tally()
    part: list[tuple[TokenizedSample, int, int]] = []
    tokens_in_part = 0
    for sample in samples:
        if isinstance(sample, Excluded):
            tally.note(sample.reason, sample.source_id)
            continue
        shard, first_row, is_new = placement.place(sample.key, sample.num_targets)
        tally.add(sample, is_new)
        part.append((sample, shard, first_row))
        tokens_in_part += len(sample.input_ids)
        if len(part) == samples_per_part or tokens_in_part >= MAX_TOKENS_PER_PART:
            yield _table(part, schema, extra_columns)
            part, tokens_in_part = [], 0
    if part:
        yield _table(part, schema, extra_columns)
    yield tally.summary(tuple(placement.shard_num_rows))


def render_report(report: dict[str, Any]) -> str:
    """The report in a few lines for people."""
    lengths = report["tokens_per_sample"]
    lines = [
        f"{report['records']:,} records, {report['samples']:,} samples,"
        f" {report['tokens']:,} tokens, {report['targets']:,} of them targets ({report['rows']:,} to score)",
        f"tokens per sample: median {lengths['p50']:,}, 95% up to {lengths['p95']:,}, longest {lengths['max']:,}",
    ]
    for name, meaning in _NOTED.items():
        if report.get(name):
            lines.append(f"{report[name]:,} {meaning} (e.g. {', '.join(report['examples'][name])})")
    return "\n".join(lines)


class _Placement:
    """Where each sample's rows stand."""

    def __init__(self, shard_rows: int, first_shard: int) -> None:
        self._shard_rows, self._first_shard = shard_rows, first_shard
        self._placed: dict[bytes, tuple[int, int]] = {}
        self.shard_num_rows: list[int] = []

    def place(self, key: str, num_targets: int) -> tuple[int, int, bool]:
        """Shard, first row, and whether the sample is the first of its key."""
        short_key, sizes = bytes.fromhex(key), self.shard_num_rows
        if found := self._placed.get(short_key):
            return *found, False
        if not sizes or sizes[-1] + num_targets > self._shard_rows:
            sizes.append(0)
        place = self._first_shard + len(sizes) - 1, sizes[-1]
        sizes[-1] += num_targets
        self._placed[short_key] = place
        return *place, True


class _Tally:
    """Counts over the samples, and the first few source ids of whatever a user would want to look up."""

    def __init__(self) -> None:
        self._noted: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {name: [] for name in _NOTED}
        self._num_tokens, self._num_targets = array("q"), array("q")

    def note(self, name: str, source_id: str) -> None:
        self._noted[name] += 1
        if len(self._examples[name]) < MAX_EXAMPLES:
            self._examples[name].append(source_id)

    def add(self, sample: TokenizedSample, is_new: bool) -> None:
        self._num_tokens.append(len(sample.input_ids))
        self._num_targets.append(sample.num_targets)
        if sample.truncated:
            self.note("truncated", sample.source_id)
        if not is_new:
            self.note("duplicates", sample.source_id)

    def summary(self, shard_num_rows: tuple[int, ...]) -> PlanSummary:
        num_samples, num_rows = len(self._num_tokens), sum(shard_num_rows)
        noted = {name: self._noted[name] for name in _NOTED}
        num_records = num_samples + sum(noted[name] for name in _EXCLUDED)
        if not num_samples:
            counts = ", ".join(f"{noted[name]} {name.replace('_', ' ')}" for name in _EXCLUDED)
            raise CorpusError(
                f"none of the {num_records} records is a sample ({counts});"
                " check the corpus, its field names and the maximum length"
            )
        report: dict[str, Any] = {
            "records": num_records,
            "samples": num_samples,
            **noted,
            "tokens": sum(self._num_tokens),
            "targets": sum(self._num_targets),
            "rows": num_rows,
            "tokens_per_sample": _percentiles(self._num_tokens),
            "targets_per_sample": _percentiles(self._num_targets),
            "examples": self._examples,
        }
        return PlanSummary(num_samples, report["tokens"], num_rows, shard_num_rows, report)


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths that occur, never between two of them, so that no machine rounds them differently."""
    quantiles = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    found = np.percentile(np.asarray(lengths), list(quantiles.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(quantiles, found, strict=True)}


def _table(part: list[tuple[TokenizedSample, int, int]], schema: pa.Schema, extra_columns: pa.Schema) -> pa.Table:
    samples = [sample for sample, _, _ in part]
    fixed = {
        "key": pa.array([bytes.fromhex(s.key) for s in samples], pa.binary(16)),
        "source_id": pa.array([s.source_id for s in samples], pa.string()),
        "shard": pa.array([shard for _, shard, _ in part], pa.int32()),
        "first_row": pa.array([first_row for _, _, first_row in part], pa.int32()),
        "num_tokens": pa.array([len(s.input_ids) for s in samples], pa.int32()),
        "num_targets": pa.array([s.num_targets for s in samples], pa.int32()),
        "input_ids": _lists([s.input_ids for s in samples]),
        "target_ranges": _lists([s.target_ranges.reshape(-1) for s in samples]),
    }
    extra = [column_array([s.columns.get(f.name) for s in samples], f) for f in extra_columns]
    return pa.Table.from_arrays([*(fixed[name] for name in SAMPLES_SCHEMA.names), *extra], schema=schema)


def _lists(values: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values), pa.int32()))
