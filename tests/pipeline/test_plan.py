"""Placement invariants, the samples table and the report."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache_pipeline import plan
from logitcache_pipeline.columns import JSON_COLUMN
from logitcache_pipeline.plan import PlanSummary, default_shard_rows, plan_schema, plan_tables, render_report
from logitcache_pipeline.tokenize import Excluded, TokenizedSample
from logitcache_storage.errors import CorpusError, InputError
from logitcache_storage.fingerprints import sample_key
from logitcache_storage.samples import SAMPLES_SCHEMA

NO_COLUMNS = pa.schema([])


def sample(number: int, num_targets: int, *, content: int | None = None, truncated: bool = False, **columns):
    """Two ranges where there is room; `content` decides the tokens: equal content is a duplicate."""
    input_ids = np.full(num_targets + 3, content if content is not None else number, dtype=np.int32)
    split = num_targets // 2
    ranges = [[1, 1 + split], [2 + split, 2 + num_targets]] if split else [[1, 1 + num_targets]]
    target_ranges = np.array(ranges, dtype=np.int32)
    key = sample_key(input_ids, target_ranges)
    return TokenizedSample(key, f"c.jsonl:{number}", input_ids, target_ranges, columns, truncated)


def planned(samples, *, extra_columns=NO_COLUMNS, **options) -> tuple[list[pa.Table], PlanSummary]:
    *tables, summary = plan_tables(samples, extra_columns=extra_columns, **options)
    assert isinstance(summary, PlanSummary)
    for table in tables:
        table.validate(full=True)
    return tables, summary


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=60),
    shard_rows=st.integers(1, 20),
    samples_per_part=st.integers(1, 70),
)
def test_rows_are_dense_disjoint_in_order_and_within_capacity(sizes, shard_rows, samples_per_part):
    samples = [sample(i, n, content=c) for i, (n, c) in enumerate(sizes)]
    tables, summary = planned(samples, shard_rows=shard_rows, samples_per_part=samples_per_part)
    assert [len(t) for t in tables[:-1]] == [samples_per_part] * (len(tables) - 1)
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["source_id"] for row in rows] == [s.source_id for s in samples]
    place = {}
    held = defaultdict(list)
    for row in rows:
        where = row["shard"], row["first_row"], row["num_targets"]
        if row["key"] not in place:
            held[row["shard"]].append(row)
        assert place.setdefault(row["key"], where) == where  # a duplicate is where its first occurrence is
    first_of_each = [row["source_id"] for shard in sorted(held) for row in held[shard]]
    assert first_of_each == [r["source_id"] for i, r in enumerate(rows) if r["key"] not in {q["key"] for q in rows[:i]}]
    assert sorted(held) == list(range(len(summary.shard_num_rows)))
    for shard, inside in held.items():
        covered = [row["first_row"] + i for row in inside for i in range(row["num_targets"])]
        assert covered == list(range(summary.shard_num_rows[shard]))
        assert len(covered) <= shard_rows or len(inside) == 1
    for shard in range(1, len(held)):  # no shard ends while the next sample would still fit
        assert summary.shard_num_rows[shard - 1] + held[shard][0]["num_targets"] > shard_rows
    assert summary.num_rows == sum(summary.shard_num_rows) == sum(n for _, _, n in place.values())
    assert summary.num_samples == len(samples)
    assert summary.num_tokens == sum(len(s.input_ids) for s in samples)
    assert summary.report["duplicates"] == len(rows) - len(place)
    assert summary.report["targets"] == sum(n for n, _ in sizes)


def test_the_table_holds_every_sample_whole():
    samples = [sample(i, n) for i, n in enumerate((1, 2, 7, 5))]
    tables, _ = planned(samples, shard_rows=8, samples_per_part=3)
    table = pa.concat_tables(tables)
    assert table.schema.equals(SAMPLES_SCHEMA)
    for row, s in zip(table.to_pylist(), samples, strict=True):
        assert row["key"].hex() == s.key
        assert row["input_ids"] == s.input_ids.tolist()
        assert row["num_tokens"] == len(s.input_ids)
        assert row["num_targets"] == len(s.target_positions)
        assert row["target_ranges"] == s.target_ranges.flatten().tolist()
    assert table.column("shard").to_pylist() == [0, 0, 1, 2]
    assert table.column("first_row").to_pylist() == [0, 1, 0, 0]


def test_corpus_columns_follow_the_fixed_ones():
    columns = pa.schema(
        [
            pa.field("critical", pa.list_(pa.int64())),
            pa.field("key", pa.string(), metadata=JSON_COLUMN),
            pa.field("weight", pa.float64()),
        ]
    )
    samples = [
        sample(0, 1, critical=[0, 1], key={"b": 1, "a": "é"}, weight=2, unknown="ignored"),
        sample(1, 1),
    ]
    ((table,), _) = planned(samples, shard_rows=8, extra_columns=columns)
    assert table.schema.names == [*SAMPLES_SCHEMA.names, "critical", "corpus_key", "weight"]
    assert table.schema.equals(plan_schema(columns), check_metadata=True)
    assert table.column("critical").to_pylist() == [[0, 1], None]
    assert table.column("corpus_key").to_pylist() == ['{"a":"é","b":1}', None]
    assert table.column("weight").to_pylist() == [2.0, None]


def test_two_columns_for_one_name_are_refused():
    columns = pa.schema([("corpus_shard", pa.int64()), ("shard", pa.int64())])
    with pytest.raises(CorpusError, match=r"'corpus_shard' and 'shard'.*rename one"):
        plan_schema(columns)


def test_parts_end_early_where_tokens_are_many(monkeypatch):
    monkeypatch.setattr(plan, "MAX_TOKENS_PER_PART", 20)
    samples = [sample(i, 6) for i in range(7)]  # of 9 tokens
    tables, summary = planned(samples, shard_rows=100)
    assert [len(t) for t in tables] == [3, 3, 1]
    assert summary.shard_num_rows == (42,)


def test_the_report_counts_every_record_once():
    items = [sample(i, i + 1, truncated=i < 2) for i in range(100)]
    items += [sample(200 + i, 5, content=4) for i in range(7)]
    items += [Excluded(f"c.jsonl:{i}", "empty") for i in range(300, 306)]
    items += [Excluded("c.jsonl:400", "overlong"), Excluded("c.jsonl:401", "without_targets")]
    _, summary = planned(items, shard_rows=1024)
    report = summary.report
    assert json.loads(json.dumps(report)) == report
    names = ("records", "samples", "duplicates", "truncated", "overlong", "empty", "without_targets")
    assert [report[name] for name in names] == [115, 107, 7, 2, 1, 6, 1]
    assert report["records"] == len(items)
    assert report["targets"] == 5050 + 35
    assert report["rows"] == 5050
    assert report["tokens"] == 5050 + 300 + 7 * 8
    lengths = sorted(len(s.input_ids) for s in items if isinstance(s, TokenizedSample))
    for name, quantile in (("p5", 5), ("p50", 50), ("p95", 95), ("p99", 99)):
        nearest_rank = lengths[-(-quantile * 107 // 100) - 1]
        assert report["tokens_per_sample"][name] == nearest_rank
    assert (report["tokens_per_sample"]["min"], report["tokens_per_sample"]["max"]) == (4, 103)
    assert report["examples"]["empty"] == [f"c.jsonl:{i}" for i in range(300, 305)]
    assert report["examples"]["duplicates"] == [f"c.jsonl:{i}" for i in range(200, 205)]
    text = render_report(report)
    assert text.startswith("115 records, 107 samples, 5,406 tokens, 5,085 of them targets (5,050 to score)\n")
    assert "6 have nothing to learn from: left out (e.g. c.jsonl:300, " in text
    assert len(text.splitlines()) == 7


def test_a_clean_corpus_has_a_short_report():
    _, summary = planned([sample(0, 3)], shard_rows=1024)
    assert len(render_report(summary.report).splitlines()) == 2


@pytest.mark.parametrize(
    ("num_bytes", "rows"),
    [
        (0, 4096),
        (1_048_576, 4096),
        (1_250_000, 5120),
        (1_441_791, 5120),
        (1_441_792, 6144),
        (33_554_432, 131072),
        (10**13, 131072),
    ],
)
def test_default_shard_rows(num_bytes, rows):
    assert default_shard_rows(num_bytes) == rows


def test_a_plan_of_nothing_is_refused():
    with pytest.raises(
        CorpusError, match=r"none of the 2 records is a sample \(0 overlong, 1 empty, 1 without targets"
    ):
        planned([Excluded("c:1", "empty"), Excluded("c:2", "without_targets")], shard_rows=8)
    with pytest.raises(InputError, match="shard_rows must be at least 1, got 0"):
        planned([sample(0, 1)], shard_rows=0)
