"""How a cache comes to be on a store: identity, plan, shards, each all or nothing.

    cache.json                  create-only: the identity
    plans/00000.json            create-only: which attempt of the plan won
    samples/<attempt>-*.parquet, vocabulary/<attempt>.parquet
    commits/00017.json          create-only: which attempt of the shard won
    shards/00017-<attempt>...   the shard's objects, and the statistics of its samples
    manifest.parquet, .json     all commits in one table and its checksum, written when every shard is in
    quarantine/00017.json       a shard that could not be scored, and why

Objects of an attempt are written first, under names no other attempt uses; the record that lists them is
created last. A writer that dies leaves garbage and no half-written cache; of two writers that race, one record
wins, and both wrote a valid result.
"""

from __future__ import annotations

import datetime
import logging
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from logitcache_storage.committed import CommittedObjects, put_object
from logitcache_storage.committed import shard_prefix as shard_prefix
from logitcache_storage.encoding import column_types, decode, encode
from logitcache_storage.errors import (
    CacheNotFoundError,
    CorruptionError,
    LogitCacheError,
    MismatchError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from logitcache_storage.invariants import check_rows
from logitcache_storage.manifest import Manifest, manifest_bytes, parse_manifest
from logitcache_storage.objects import ObjectStore
from logitcache_storage.record_json import dump_record, load_record
from logitcache_storage.schema import (
    STATISTICS_SUFFIX,
    CacheIdentity,
    ExcludedSample,
    ManifestRecord,
    QuarantineRecord,
    ShardRecord,
)
from logitcache_storage.shard_format import shard_format
from logitcache_storage.statistics import row_statistics, sum_statistics
from logitcache_storage.statistics_object import dump_statistics, summarise
from logitcache_storage.topk import TopKLogProbs

IDENTITY_PATH = "cache.json"
MANIFEST_PATH = "manifest.json"
MANIFEST_TABLE_PATH = "manifest.parquet"
REPORT_PATH = "report.json"
"""What the runs of the build took, for people: no reader of the cache asks for it."""

MAX_IDS_PER_BYTE = 4096
"""Of a shard: far more than any rows compress to, and little enough that what is read fits where its bytes do."""

_EARLY_MANIFEST = re.compile(rb'\{"crc32c": "[0-9a-f]{8}", "shards": \[')
"""One object that held all commit records."""

log = logging.getLogger(__name__)


def new_attempt() -> str:
    """A name no other attempt has, 16 hex digits."""
    return uuid.uuid4().hex[:16]


def commit_path(shard: int) -> str:
    """Where the commit record of a shard stands."""
    return f"commits/{shard:05d}.json"


def quarantine_path(shard: int) -> str:
    """Where the quarantine record of a shard stands."""
    return f"quarantine/{shard:05d}.json"


# Identity


def load_identity(store: ObjectStore) -> CacheIdentity:
    """The identity of the cache on a store.

    Raises:
        CacheNotFoundError: there is no cache here.
    """
    try:
        data = store.get(IDENTITY_PATH)
    except ObjectNotFoundError as e:
        raise CacheNotFoundError(
            f"no cache at {store.url}: there is no {IDENTITY_PATH}; check the URL, or make one with"
            f" 'logitcache build --cache {store.url} ...'"
        ) from e
    return load_record(CacheIdentity, data, where=f"{store.url}/{IDENTITY_PATH}")


def create_or_continue(store: ObjectStore, identity: CacheIdentity) -> bool:
    """Claim the URL for this identity, or check that the cache there is of the same. True when it is new.

    Raises:
        MismatchError: another cache is there; names every field that differs.
    """
    try:
        store.create(IDENTITY_PATH, dump_record(identity))
        return True
    except ObjectExistsError:
        found = load_identity(store)
    if differences := found.differences(identity):
        listing = "\n  ".join(differences)
        raise MismatchError(
            f"{store.url} holds a cache made with other settings (field: in the cache, asked for):\n  {listing}\n"
            "run with the cache's settings to continue it, or choose another --cache"
        )
    return False


# Shards


def commit_shard(
    store: ObjectStore,
    identity: CacheIdentity,
    shard: int,
    topk: TopKLogProbs,
    labels: npt.NDArray[np.int32],
    *,
    seconds: float,
    worker: str,
    sample_rows: Sequence[int] | None = None,
    excluded: Sequence[ExcludedSample] = (),
) -> ShardRecord:
    """Check, encode, write and commit the rows of a shard; returns the record that holds.

    Args:
        store: where the cache is.
        identity: of the cache; gives precision, container and vocabulary size.
        shard: index of the shard.
        topk: its rows, in the order of the plan, without those of `excluded`.
        labels: the observed target token of each row, [N].
        seconds: how long scoring took.
        worker: who scored it, for the record.
        sample_rows: how many rows each of its samples has, in their order; None, or k = 0: no statistics of samples are
            written.
        excluded: samples that could not be scored, in the order of the plan.

    Raises:
        CorruptionError: the rows break an invariant, or the samples do not cover them; nothing is written.
    """
    if topk.k != identity.k:
        raise CorruptionError(f"shard {shard}: rows of {topk.k} ids, the cache keeps {identity.k}")
    attempt = new_attempt()
    prefix = shard_prefix(shard, attempt)
    check_rows(topk, labels, identity.vocab_size, where=f"shard {shard}")
    columns = encode(topk, identity.precision, identity.id_layout)
    attributes = {"shard": shard, "precision": identity.precision, "id_layout": identity.id_layout}
    written = dict(sorted(shard_format(identity.container).write(columns, attributes).items()))
    decoded = decode(columns, identity.precision, identity.id_layout)
    statistics = row_statistics(decoded, labels)
    if sample_rows is not None and identity.k:
        written[STATISTICS_SUFFIX] = dump_statistics(summarise(statistics, decoded, sample_rows))
    objects = tuple(put_object(store, prefix + suffix, data) for suffix, data in written.items())
    record = ShardRecord(
        shard=shard,
        attempt=attempt,
        num_rows=len(topk),
        num_bytes=sum(record.size for record in objects),
        objects=objects,
        statistics=sum_statistics(decoded, statistics),
        seconds=round(seconds, 6),
        worker=worker,
        created=_now(),
        excluded=tuple(excluded) or None,
    )
    try:
        store.create(commit_path(shard), dump_record(record))
        return record
    except ObjectExistsError:
        return load_commit(store, shard)


def load_commit(store: ObjectStore, shard: int) -> ShardRecord:
    """The commit record of one shard."""
    path = commit_path(shard)
    return _parse_commit(store, path, store.get(path))


def load_commits(store: ObjectStore, num_planned: int | None = None) -> Mapping[int, ShardRecord]:
    """All committed shards, from the manifest where there is a good one, else from the commit records.

    Args:
        store: where the cache is.
        num_planned: shards of all plans that were read. A manifest of fewer is older than an extension, and not asked;
            shards beyond are of an extension that was planned since, and left out.
    """
    try:
        if (manifest := load_manifest(store)) is not None and len(manifest) >= (num_planned or 0):
            return manifest if num_planned in (None, len(manifest)) else _below(num_planned, manifest)
    except CorruptionError as e:
        # It says nothing that the commit records, each with its own checksum, do not say.
        log.warning("%s; the commit records are read instead, and the next 'logitcache build' writes it again", e)
    paths = [path for path in store.list("commits") if path.endswith(".json")]
    records = (_parse_commit(store, path, data) for path, data in zip(paths, store.get_many(paths), strict=True))
    return _below(num_planned, {record.shard: record for record in records})


def load_manifest(store: ObjectStore) -> Manifest | None:
    """All commit records in one, or None where there is no manifest, or one of an early writer.

    Raises:
        CorruptionError: it is damaged, or another one was written just now.
    """
    try:
        data = store.get(MANIFEST_PATH)
    except ObjectNotFoundError:
        return None
    if _EARLY_MANIFEST.match(data):
        return None
    record = load_record(ManifestRecord, data, where=f"{store.url}/{MANIFEST_PATH}")
    table = CommittedObjects(store, (record.table,)).get(record.table.path)
    return parse_manifest(table, record.num_shards, where=f"{store.url}/{record.table.path}")


def committed_shards(store: ObjectStore) -> set[int]:
    """Which shards are committed, from the names of the commit records alone."""
    names = (path.rsplit("/", 1)[-1] for path in store.list("commits"))
    return {int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()}


def write_manifest(store: ObjectStore, records: Mapping[int, ShardRecord]) -> None:
    """Put all commit records into one table, so that opening a cache takes two reads."""
    table = put_object(store, MANIFEST_TABLE_PATH, manifest_bytes(records))
    store.put(MANIFEST_PATH, dump_record(ManifestRecord(len(records), table)))


def read_rows(store: ObjectStore, identity: CacheIdentity, record: ShardRecord, rows: slice) -> TopKLogProbs:
    """Rows [start, stop) of a committed shard.

    Raises:
        CorruptionError: an object is missing or damaged, or does not hold what the record says.
    """
    if record.num_rows * max(identity.k, 1) > MAX_IDS_PER_BYTE * record.num_bytes:
        raise CorruptionError(
            f"{store.url}/{shard_prefix(record.shard, record.attempt)}: {record.num_rows} rows of {identity.k} ids"
            f" in {record.num_bytes} bytes, which no writer makes"
        )
    objects = CommittedObjects(store, record.row_objects)
    prefix = shard_prefix(record.shard, record.attempt)
    where = f"{store.url}/{prefix}"
    try:
        types = column_types(identity.precision, identity.id_layout, identity.k)
        columns = shard_format(identity.container).read(objects, prefix, types, record.num_rows, rows)
    except LogitCacheError:
        raise
    except Exception as e:  # Zarr and Arrow answer bytes that they cannot read with errors of many kinds
        raise CorruptionError(f"{where}: not the {identity.container} shard it should be: {e}") from e
    topk = decode(columns, identity.precision, identity.id_layout, where=where)
    found, expected = topk.ids.shape, (rows.stop - rows.start, identity.k)
    if found != expected:
        raise CorruptionError(f"{where}: rows of shape {found}, expected {expected}")
    largest = topk.ids.view(np.uint32).max(initial=0)  # a negative id is a large one, too
    if largest >= identity.vocab_size:
        raise CorruptionError(f"{where}: ids outside [0, {identity.vocab_size})")
    return topk


# Quarantine


def quarantine_shard(store: ObjectStore, shard: int, reasons: Iterable[str]) -> QuarantineRecord:
    """Record that a shard could not be scored, replacing what an earlier run said of it."""
    listed = tuple(reasons)
    record = QuarantineRecord(shard=shard, attempts=len(listed), reasons=listed, created=_now())
    store.put(quarantine_path(shard), dump_record(record))
    return record


def load_quarantine(store: ObjectStore) -> dict[int, QuarantineRecord]:
    """Quarantined shards that no run has committed since."""
    paths = store.list("quarantine")
    found = (
        load_record(QuarantineRecord, data, where=f"{store.url}/{path}")
        for path, data in zip(paths, store.get_many(paths), strict=True)
    )
    committed = committed_shards(store) if paths else set()
    return {record.shard: record for record in found if record.shard not in committed}


def _below(num_planned: int | None, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
    return {shard: record for shard, record in records.items() if num_planned is None or shard < num_planned}


def _parse_commit(store: ObjectStore, path: str, data: bytes) -> ShardRecord:
    record = load_record(ShardRecord, data, where=f"{store.url}/{path}")
    if path != commit_path(record.shard):
        raise CorruptionError(f"{store.url}/{path}: is the record of shard {record.shard}")
    prefix = shard_prefix(record.shard, record.attempt)
    for item in record.objects:
        if not item.path.startswith(prefix):
            raise CorruptionError(f"{store.url}/{path}: lists {item.path}, expected objects of {prefix}")
    return record


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
