"""The plan on a store: which samples there are, and in which shard and row each one's targets stand.

The samples table and the vocabulary are written first, under an attempt's own names; the plan that lists them is
created last, and of two builders that race one plan wins.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage.committed import put_object
from logitcache_storage.errors import ObjectExistsError, ObjectNotFoundError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.samples import ROWS_PER_GROUP
from logitcache_storage.schema import ObjectRecord, PlanPart, PlanRecord, dump_record, load_record

PLAN_PATH = "plans/00000.json"


def load_plan(store: ObjectStore) -> PlanRecord | None:
    """The plan, or None where the build has not written it yet."""
    try:
        data = store.get(PLAN_PATH)
    except ObjectNotFoundError:
        return None
    return load_record(PlanRecord, data, where=f"{store.url}/{PLAN_PATH}")


def write_samples(store: ObjectStore, attempt: str, tables: Iterable[pa.Table]) -> tuple[PlanPart, ...]:
    """Write the samples table, one parquet object per table."""
    parts: list[PlanPart] = []
    first_sample = 0
    for table in tables:
        path = f"samples/{attempt}-{len(parts):05d}.parquet"
        parts.append(PlanPart(first_sample, table.num_rows, write_parquet(store, path, table)))
        first_sample += table.num_rows
    return tuple(parts)


def write_parquet(store: ObjectStore, path: str, table: pa.Table) -> ObjectRecord:
    """Write a table as one parquet object and return its record."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return put_object(store, path, sink.getvalue())


def commit_plan(store: ObjectStore, plan: PlanRecord) -> PlanRecord:
    """Make this the plan, unless another builder was faster; returns the plan that holds."""
    try:
        store.create(PLAN_PATH, dump_record(plan))
        return plan
    except ObjectExistsError:
        found = load_plan(store)
        assert found is not None
        return found
