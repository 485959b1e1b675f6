"""How a cache comes to be on a store: identity, plan, shards, each all or nothing.

    cache.json                  create-only: the identity
    plans/00000.json            create-only: which attempt of the plan won
    samples/<attempt>-*.parquet, vocabulary/<attempt>.parquet
    commits/00017.json          create-only: which attempt of the shard won
    shards/00017-<attempt>...   the shard's objects
    manifest.json               all commits in one object, written when every shard is in
    quarantine/00017.json       a shard that could not be scored, and why

Objects of an attempt are written first, under names no other attempt uses; the record that lists them is
created last. A writer that dies leaves garbage and no half-written cache; of two writers that race, one record
wins, and both wrote a valid result.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from logitcache_storage.committed import CommittedObjects, put_object
from logitcache_storage.encoding import decode, encode
from logitcache_storage.errors import (
    CacheNotFoundError,
    CorruptionError,
    LogitCacheError,
    MismatchError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from logitcache_storage.invariants import check_rows
from logitcache_storage.objects import ObjectStore
from logitcache_storage.schema import (
    CacheIdentity,
    ManifestRecord,
    QuarantineRecord,
    ShardRecord,
    dump_record,
    load_record,
)
from logitcache_storage.shard_format import shard_format
from logitcache_storage.statistics import sum_statistics
from logitcache_storage.topk import TopKLogProbs

IDENTITY_PATH = "cache.json"
MANIFEST_PATH = "manifest.json"


def new_attempt() -> str:
    """A name no other attempt has, 16 hex digits."""
    return uuid.uuid4().hex[:16]


def commit_path(shard: int) -> str:
    """Where the commit record of a shard stands."""
    return f"commits/{shard:05d}.json"


def quarantine_path(shard: int) -> str:
    """Where the quarantine record of a shard stands."""
    return f"quarantine/{shard:05d}.json"


def shard_prefix(shard: int, attempt: str) -> str:
    """What the paths of one attempt's objects begin with."""
    return f"shards/{shard:05d}-{attempt}"


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
) -> ShardRecord:
    """Check, encode, write and commit the rows of a shard; returns the record that holds.

    Args:
        store: where the cache is.
        identity: of the cache; gives precision, container and vocabulary size.
        shard: index of the shard.
        topk: its rows, in the order of the plan.
        labels: the observed target token of each row, [N].
        seconds: how long scoring took.
        worker: who scored it, for the record.

    Raises:
        CorruptionError: the rows break an invariant; nothing is written.
    """
    if topk.k != identity.k:
        raise CorruptionError(f"shard {shard}: rows of {topk.k} ids, the cache keeps {identity.k}")
    attempt = new_attempt()
    prefix = shard_prefix(shard, attempt)
    check_rows(topk, labels, identity.vocab_size, where=f"shard {shard}")
    columns = encode(topk, identity.precision)
    written = shard_format(identity.container).write(columns, {"shard": shard, "precision": identity.precision})
    objects = tuple(put_object(store, prefix + suffix, data) for suffix, data in sorted(written.items()))
    record = ShardRecord(
        shard=shard,
        attempt=attempt,
        num_rows=len(topk),
        num_bytes=sum(record.size for record in objects),
        objects=objects,
        statistics=sum_statistics(decode(columns, identity.precision), labels),
        seconds=round(seconds, 6),
        worker=worker,
        created=_now(),
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


def load_commits(store: ObjectStore) -> dict[int, ShardRecord]:
    """All committed shards, from the manifest where there is one, else from the commit records."""
    try:
        manifest = load_record(ManifestRecord, store.get(MANIFEST_PATH), where=f"{store.url}/{MANIFEST_PATH}")
        return {record.shard: _checked_commit(store, MANIFEST_PATH, record) for record in manifest.shards}
    except ObjectNotFoundError:
        paths = [path for path in store.list("commits") if path.endswith(".json")]
    records = (_parse_commit(store, path, data) for path, data in zip(paths, store.get_many(paths), strict=True))
    return {record.shard: record for record in records}


def committed_shards(store: ObjectStore) -> set[int]:
    """Which shards are committed, from the names of the commit records alone."""
    names = (path.rsplit("/", 1)[-1] for path in store.list("commits"))
    return {int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()}


def write_manifest(store: ObjectStore, records: dict[int, ShardRecord]) -> None:
    """Put all commit records into one object, so that opening a cache takes one read."""
    store.put(MANIFEST_PATH, dump_record(ManifestRecord(tuple(records[shard] for shard in sorted(records)))))


def read_rows(store: ObjectStore, identity: CacheIdentity, record: ShardRecord, rows: slice) -> TopKLogProbs:
    """Rows [start, stop) of a committed shard. A read of the whole shard fetches its objects side by side.

    Raises:
        CorruptionError: an object is missing or damaged, or does not hold what the record says.
    """
    objects = CommittedObjects(store, record.objects)
    if (rows.start, rows.stop) == (0, record.num_rows):
        objects.fetch_all()
    prefix = shard_prefix(record.shard, record.attempt)
    where = f"{store.url}/{prefix}"
    try:
        columns = shard_format(identity.container).read(objects, prefix, identity.precision, rows)
    except LogitCacheError:
        raise
    except Exception as e:  # Zarr and Arrow answer bytes that they cannot read with errors of many kinds
        raise CorruptionError(f"{where}: not the {identity.container} shard it should be: {e}") from e
    topk = decode(columns, identity.precision, where=where)
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


def _parse_commit(store: ObjectStore, path: str, data: bytes) -> ShardRecord:
    record = load_record(ShardRecord, data, where=f"{store.url}/{path}")
    if path != commit_path(record.shard):
        raise CorruptionError(f"{store.url}/{path}: is the record of shard {record.shard}")
    return _checked_commit(store, path, record)


def _checked_commit(store: ObjectStore, path: str, record: ShardRecord) -> ShardRecord:
    prefix = shard_prefix(record.shard, record.attempt)
    for item in record.objects:
        if not item.path.startswith(prefix):
            raise CorruptionError(f"{store.url}/{path}: lists {item.path}, expected objects of {prefix}")
    return record


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
