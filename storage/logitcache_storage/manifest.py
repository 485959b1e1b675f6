"""All commit records of a cache as one table, a row for each shard, so that opening it takes two reads.

Only the numbers are looked at when it is opened; the record of a shard is made when it is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitcache_storage.bounded_parquet import BoundedParquet
from logitcache_storage.committed import shard_prefix
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.schema import ExcludedSample, ObjectRecord, ShardRecord


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_OBJECT = pa.struct(
    [
        _required("suffix", pa.string()),  # of the path, behind shards/<shard>-<attempt>
        _required("size", pa.int64()),
        _required("block_crc32c", pa.list_(_required("element", pa.uint32()))),
    ]
)
_STATISTIC = pa.struct([_required("name", pa.string()), _required("value", pa.float64())])

MANIFEST_SCHEMA = pa.schema(
    [
        _required("shard", pa.int32()),
        _required("attempt", pa.string()),
        _required("num_rows", pa.int32()),
        _required("num_bytes", pa.int64()),
        _required("objects", pa.list_(_required("element", _OBJECT))),
        _required("statistics", pa.list_(_required("element", _STATISTIC))),
        _required("seconds", pa.float64()),
        _required("worker", pa.string()),
        _required("created", pa.string()),
    ]
)
_EXCLUDED = pa.struct(
    [
        _required("first_row", pa.int32()),
        _required("num_rows", pa.int32()),
        _required("key", pa.string()),
        _required("source_ids", pa.list_(_required("element", pa.string()))),
        _required("reason", pa.string()),
    ]
)
_WITH_EXCLUDED = MANIFEST_SCHEMA.append(_required("excluded", pa.list_(_required("element", _EXCLUDED))))
"""Where some shard lacks a sample, and only there: earlier readers know no such column."""

_ROWS_PER_GROUP = 1024


class Manifest(Mapping[int, ShardRecord]):
    """Shard to its commit record, in order of shard."""

    def __init__(self, table: pa.Table, where: str) -> None:
        """`table` is of `MANIFEST_SCHEMA`; `where` names it in errors.

        Raises:
            CorruptionError: shards are not ascending.
        """
        self._table, self._where = table, where
        self._shards = table.column("shard").to_numpy()
        if len(self._shards) and (self._shards[0] < 0 or (np.diff(self._shards) <= 0).any()):
            raise CorruptionError(f"{where}: shards are not in order")

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of the numbers of every record: `shard`, `num_rows`, `num_bytes` or `seconds`."""
        return np.asarray(self._table.column(name).to_numpy())

    def sums(self) -> dict[str, float]:
        """Sum over all records of each statistic that every record has, without making them."""
        found = pc.list_flatten(self._table.column("statistics")).combine_chunks()
        table = pa.table({"name": pc.struct_field(found, "name"), "value": pc.struct_field(found, "value")})
        by_name = table.group_by("name").aggregate([("value", "sum"), ("value", "count")]).to_pylist()
        return {row["name"]: row["value_sum"] for row in by_name if row["value_count"] == len(self)}

    @property
    def excluded(self) -> dict[int, tuple[ExcludedSample, ...]]:
        """What each shard lacks that lacks a sample.

        Raises:
            CorruptionError: a record is not valid.
        """
        if "excluded" not in self._table.column_names:
            return {}
        lacking = np.flatnonzero(pc.list_value_length(self._table.column("excluded")).to_numpy())
        return {shard: self[shard].excluded or () for shard in self._shards[lacking].tolist()}

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shards.tolist())

    def __getitem__(self, shard: int) -> ShardRecord:
        """The record of a shard, checked as one from `commits/` is.

        Raises:
            KeyError: the shard is not committed.
            CorruptionError: the record is not valid.
        """
        row = int(np.searchsorted(self._shards, shard))
        if row == len(self._shards) or self._shards[row] != shard:
            raise KeyError(shard)
        (values,) = self._table.slice(row, 1).to_pylist()
        prefix = shard_prefix(values["shard"], values["attempt"])
        try:
            objects = tuple(
                ObjectRecord(prefix + item["suffix"], item["size"], tuple(item["block_crc32c"]))
                for item in values["objects"]
            )
            statistics = {item["name"]: item["value"] for item in values["statistics"]}
            excluded = tuple(
                ExcludedSample(**{**sample, "source_ids": tuple(sample["source_ids"])})
                for sample in values.get("excluded") or ()
            )
            return ShardRecord(**{**values, "objects": objects, "statistics": statistics, "excluded": excluded or None})
        except InputError as e:
            raise CorruptionError(f"{self._where}: shard {shard}: {e}") from e


def manifest_bytes(records: Mapping[int, ShardRecord]) -> bytes:
    """The records as Parquet."""
    rows = [_row(records[shard]) for shard in sorted(records)]
    sink = io.BytesIO()
    schema = _WITH_EXCLUDED if any(row["excluded"] for row in rows) else MANIFEST_SCHEMA
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP, store_schema=False)
    return sink.getvalue()


def parse_manifest(data: bytes, num_shards: int, *, where: str) -> Manifest:
    """The table behind these bytes.

    Raises:
        CorruptionError: they are no such table of so many shards.
    """
    try:
        file = BoundedParquet(lambda: io.BytesIO(data), len(data))
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        # Each shard and each checksum has bytes of its own, so a table of more values than bytes is none.
        values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
        if file.metadata.num_rows != num_shards or values > 8 * len(data):
            found = f"{file.metadata.num_rows} shards and {values} values in {len(data)} bytes"
            raise CorruptionError(f"{where}: {found}, expected {num_shards} shards")
        table = file.read().combine_chunks()
        if not any(table.schema.equals(known) for known in (MANIFEST_SCHEMA, _WITH_EXCLUDED)):
            raise CorruptionError(f"{where}: other columns than a manifest has: {table.schema.names}")
    except (pa.ArrowException, OSError, LookupError, ValueError) as e:
        raise CorruptionError(f"{where}: not the Parquet file it should be: {e}") from e
    return Manifest(table, where)


def _row(record: ShardRecord) -> dict[str, Any]:
    prefix = shard_prefix(record.shard, record.attempt)
    objects = [
        {"suffix": item.path.removeprefix(prefix), "size": item.size, "block_crc32c": item.block_crc32c}
        for item in record.objects
    ]
    statistics = [{"name": name, "value": value} for name, value in record.statistics.items()]
    excluded = [asdict(sample) for sample in record.excluded or ()]
    return {**vars(record), "objects": objects, "statistics": statistics, "excluded": excluded}
