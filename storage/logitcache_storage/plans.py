"""The plans on a store: which samples there are, and in which shard and row each one's targets stand.

The samples table and the vocabulary are written first, under an attempt's own names; the plan that lists them is
created last, and of two builders that race one plan wins. A cache is extended by further plans, each of data of its
own: `plans/00001.json` stands behind `plans/00000.json`, and so on. Readers see all of them as one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache_storage.committed import put_object
from logitcache_storage.errors import CorruptionError, ObjectExistsError, ObjectNotFoundError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.record_json import dump_record, load_record
from logitcache_storage.sample_index import index_bytes
from logitcache_storage.samples import ROWS_PER_GROUP
from logitcache_storage.schema import ExtensionRecord, ObjectRecord, PlanPart, PlanRecord

PLAN_PATH = "plans/00000.json"
"""Where the first plan stands."""

MAX_EXAMPLES = 5
"""Examples of each kind in the report of several plans."""


@dataclass(frozen=True)
class Plans:
    """Every plan of a cache, in order."""

    first: PlanRecord
    """Of the data that the cache's identity names."""
    extensions: tuple[ExtensionRecord, ...] = ()

    @property
    def records(self) -> list[PlanRecord]:
        """The plans alone."""
        return [self.first, *(extension.plan for extension in self.extensions)]

    def number_of(self, corpus_fingerprint: str) -> int | None:
        """Number of the extension that holds this corpus, from 1; None where none does."""
        found = (n for n, e in enumerate(self.extensions, 1) if e.corpus.fingerprint == corpus_fingerprint)
        return next(found, None)


def plan_path(number: int) -> str:
    """Where the plan of this number stands: 0 is the first one, the others are extensions."""
    return f"plans/{number:05d}.json"


def plan_paths(store: ObjectStore) -> list[str]:
    """Where all plans stand, in order, as far as their number can be told; empty where there is none yet."""
    return [plan_path(number) for number in range(len(store.list("plans")))]


def load_plans(store: ObjectStore) -> Plans | None:
    """Every plan, or None where the build has not written the first yet.

    Raises:
        CorruptionError: a plan is missing or damaged.
    """
    paths = plan_paths(store)
    if not paths:
        return None
    try:
        first, *others = store.get_many(paths)
    except ObjectNotFoundError as e:
        raise CorruptionError(f"{e}, and there are {len(paths)} plans") from e
    extensions = (
        load_record(ExtensionRecord, data, where=f"{store.url}/{path}")
        for path, data in zip(paths[1:], others, strict=True)
    )
    return Plans(load_record(PlanRecord, first, where=f"{store.url}/{paths[0]}"), tuple(extensions))


def load_plan(store: ObjectStore) -> PlanRecord | None:
    """All plans as one (`join_plans`), or None where the build has not written the first yet."""
    plans = load_plans(store)
    return None if plans is None else join_plans(plans, where=store.url)


def join_plans(plans: Plans, *, where: str) -> PlanRecord:
    """All plans as one: samples, shards and parts one behind the other, counts added up; `where` is the cache's URL.

    Raises:
        CorruptionError: an extension does not begin where the plan before it ends.
    """
    if not plans.extensions:
        return plans.first
    sizes, parts, num_samples = list(plans.first.shard_num_rows), list(plans.first.parts), plans.first.num_samples
    for number, extension in enumerate(plans.extensions, 1):
        if extension.first_shard != len(sizes):
            raise CorruptionError(
                f"{where}/{plan_path(number)}: begins at shard {extension.first_shard},"
                f" and {len(sizes)} shards are planned before it"
            )
        plan = extension.plan
        sizes += plan.shard_num_rows
        parts += (replace(part, first_sample=num_samples + part.first_sample) for part in plan.parts)
        num_samples += plan.num_samples
    records = plans.records
    return PlanRecord(
        num_samples=num_samples,
        num_tokens=sum(plan.num_tokens for plan in records),
        num_rows=sum(plan.num_rows for plan in records),
        shard_num_rows=tuple(sizes),
        report=_joined_reports([plan.report for plan in records]),
        parts=tuple(parts),
        vocabulary=plans.first.vocabulary,
    )


def write_samples(store: ObjectStore, attempt: str, tables: Iterable[pa.Table]) -> tuple[PlanPart, ...]:
    """Write the samples table, one parquet object and its index per table."""
    parts: list[PlanPart] = []
    first_sample = 0
    for table in tables:
        path = f"samples/{attempt}-{len(parts):05d}.parquet"
        index = put_object(store, path.replace(".parquet", ".index"), index_bytes(table))
        parts.append(PlanPart(first_sample, table.num_rows, write_parquet(store, path, table), index))
        first_sample += table.num_rows
    return tuple(parts)


def write_parquet(store: ObjectStore, path: str, table: pa.Table) -> ObjectRecord:
    """Write a table as one parquet object and return its record."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return put_object(store, path, sink.getvalue())


def commit_plan(store: ObjectStore, plan: PlanRecord) -> PlanRecord:
    """Make this the first plan, unless another builder was faster; returns what is planned now."""
    try:
        store.create(plan_path(0), dump_record(plan))
        return plan
    except ObjectExistsError:
        found = load_plan(store)
        assert found is not None
        return found


def commit_extension(store: ObjectStore, number: int, extension: ExtensionRecord) -> bool:
    """Put this plan behind `number` others; False where another builder has put one there before."""
    try:
        store.create(plan_path(number), dump_record(extension))
        return True
    except ObjectExistsError:
        return False


def _joined_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums of what was counted, the first examples of each kind, and under `plans` the reports themselves."""
    names = {name: None for report in reports for name in report}
    counts: dict[str, Any] = {}
    for name in names:
        values = [report.get(name, 0) for report in reports]
        if all(isinstance(value, int | float) for value in values):
            counts[name] = sum(values)
    listed = [examples for report in reports if isinstance(examples := report.get("examples"), dict)]
    kinds = {kind: None for examples in listed for kind in examples}
    examples = {kind: [e for found in listed for e in found.get(kind, ())][:MAX_EXAMPLES] for kind in kinds}
    return {**counts, **({"examples": examples} if examples else {}), "plans": list(reports)}
