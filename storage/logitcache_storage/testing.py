"""For tests, here and in projects that build on this one: made-up rows, a whole cache, a store that fails.

Everything is real but the numbers: `write_cache` goes through the same commit protocol as a build.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.commit import (
    commit_shard,
    committed_shards,
    create_or_continue,
    load_commits,
    load_identity,
    new_attempt,
    write_manifest,
)
from logitcache_storage.errors import StoreError
from logitcache_storage.fingerprints import fingerprint, sample_key, tokenizer_identity
from logitcache_storage.id_layouts import default_id_layout
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import (
    Plans,
    commit_extension,
    commit_plan,
    join_plans,
    load_plan,
    load_plans,
    write_parquet,
    write_samples,
)
from logitcache_storage.samples import SAMPLES_SCHEMA, target_positions
from logitcache_storage.schema import (
    CacheIdentity,
    CorpusIdentity,
    ExcludedSample,
    ExtensionRecord,
    ObjectRecord,
    PlanRecord,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA

PlannedTokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""(input_ids [L], target_ranges [R, 2]) of one sample."""


def make_topk(
    num_rows: int, k: int, vocab_size: int, *, seed: int = 0, labels: npt.NDArray[np.int32] | None = None
) -> TopKLogProbs:
    """Rows of peaked random distributions over the whole vocabulary, truncated exactly."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, vocab_size)) * rng.uniform(0.5, 4.0, size=(num_rows, 1))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(log_probs, ids, axis=1)
    outside = log_probs.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.exp(outside).sum(1))
    if labels is None:
        labels = rng.integers(vocab_size, size=num_rows).astype(np.int32)
    return TopKLogProbs(
        ids.astype(np.int32),
        kept.astype(np.float32),
        np.full(num_rows, k, np.int32),
        log_tail.astype(np.float32),
        np.take_along_axis(log_probs, labels[:, None].astype(np.int64), axis=1)[:, 0].astype(np.float32),
    )


def make_identity(**changes: Any) -> CacheIdentity:
    """An identity of made-up fingerprints; keyword arguments replace fields."""
    fields: dict[str, Any] = {
        "teacher": TeacherIdentity("teacher", "", "w" * 64, "c" * 64, "float32", "transformers"),
        "tokenizer": tokenizer_identity({}, {}, None),
        "corpus": CorpusIdentity("f" * 64, 0, {}),
        "vocab_size": 50,
        "k": 8,
        "kept_mass": 1.0,
        "precision": "u8",
        "container": "zarr",
        "shard_rows": 64,
        **changes,
    }
    layout = default_id_layout(fields["container"], fields["vocab_size"])
    return CacheIdentity(**{"id_layout": layout, **fields})


def write_cache(
    url: str | ObjectStore,
    samples: Sequence[PlannedTokens],
    topks: Sequence[TopKLogProbs],
    *,
    identity: CacheIdentity | None = None,
    tokenizer: TokenizerIdentity | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    vocabulary: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    commit_shards: int | None = None,
    excluded: Mapping[int, str] | None = None,
) -> CacheIdentity:
    """Write a cache of given samples and rows, or continue one that was interrupted.

    Args:
        url: where to; or a store.
        samples: tokens and target ranges of each sample.
        topks: the rows of each sample, one per target.
        identity: of the cache; `k` is taken from the rows where it is not given.
        tokenizer: put into a default identity.
        columns: extra columns, one value per sample.
        vocabulary: spelling of each token id.
        storage_options: handed to fsspec.
        commit_shards: leave the build unfinished after this many shards.
        excluded: samples that could not be scored, by number, and why.
    """
    store = open_store(url, storage_options) if isinstance(url, str) else url
    if identity is None:
        identity = make_identity(k=topks[0].k, **({"tokenizer": tokenizer} if tokenizer else {}))
    create_or_continue(store, identity)
    table, shard_num_rows = _plan_table(samples, identity.shard_rows, columns or {})
    words = list(vocabulary) if vocabulary is not None else [f"t{i} " for i in range(identity.vocab_size)]
    if load_plan(store) is None:
        record = write_parquet(store, f"vocabulary/{new_attempt()}.parquet", _vocabulary_table(words))
        commit_plan(store, _write_plan(store, table, shard_num_rows, record))
    _commit_shards(store, identity, table, samples, topks, commit_shards, excluded or {})
    if commit_shards is None:
        write_manifest(store, load_commits(store))
    return identity


def extend_cache(store: ObjectStore, samples: Sequence[PlannedTokens], topks: Sequence[TopKLogProbs]) -> None:
    """Add further samples and rows to a cache whose shards are all committed, or continue to.

    Args:
        store: where the cache is.
        samples: tokens and target ranges of each new sample.
        topks: the rows of each.
    """
    identity, corpus = load_identity(store), fingerprint([sample_key(*sample) for sample in samples])
    plans = load_plans(store)
    assert plans is not None
    number = plans.number_of(corpus)
    before = join_plans(Plans(plans.first, plans.extensions[: number - 1] if number else plans.extensions), where="")
    first_shard = len(before.shard_num_rows)
    table, shard_num_rows = _plan_table(samples, identity.shard_rows, {}, first_shard)
    if number is None:
        plan = _write_plan(store, table, shard_num_rows, before.vocabulary)
        extension = ExtensionRecord(CorpusIdentity(corpus, len(samples), {}), first_shard, plan)
        if not commit_extension(store, 1 + len(plans.extensions), extension):
            return extend_cache(store, samples, topks)  # behind the one that was faster
    _commit_shards(store, identity, table, samples, topks, None, {})
    planned = load_plan(store)
    assert planned is not None
    records = load_commits(store, len(planned.shard_num_rows))  # and not a manifest from before
    if len(records) == len(planned.shard_num_rows):
        write_manifest(store, records)
    return None


def make_samples(
    num_samples: int, k: int, vocab_size: int, *, seed: int = 0, max_targets: int = 12
) -> tuple[list[PlannedTokens], list[TopKLogProbs]]:
    """Random samples of one or two target ranges each, and rows for them."""
    rng = np.random.default_rng(seed)
    samples, topks = [], []
    for i in range(num_samples):
        prompt, first, gap, second = rng.integers(1, 6), rng.integers(1, max_targets), rng.integers(0, 4), 0
        second = int(rng.integers(1, 5)) if gap else 0
        ids = rng.integers(vocab_size, size=prompt + first + gap + second).astype(np.int32)
        ranges = [(prompt, prompt + first)] + ([(prompt + first + gap, len(ids))] if second else [])
        target_ranges = np.asarray(ranges, dtype=np.int32)
        labels = ids[target_positions(target_ranges.ravel())]
        samples.append((ids, target_ranges))
        topks.append(make_topk(len(labels), k, vocab_size, seed=seed * 100_003 + i, labels=labels))
    return samples, topks


class FlakyStore:
    """A store whose n-th writes fail, counted over `put` and `create` from 1; reads pass through.

    With `after=True` the object is written and the error raised all the same, as when an answer is lost.
    """

    def __init__(self, store: ObjectStore, fail_writes: set[int], *, after: bool = False) -> None:
        self._store = store
        self._fail_writes = fail_writes
        self._after = after
        self._lock = threading.Lock()
        self.num_writes = 0
        self.url = store.url

    def put(self, path: str, data: bytes) -> None:
        """As ObjectStore.put, or StoreError."""
        self._write(self._store.put, path, data)

    def create(self, path: str, data: bytes) -> None:
        """As ObjectStore.create, or StoreError."""
        self._write(self._store.create, path, data)

    def _write(self, write: Any, path: str, data: bytes) -> None:
        with self._lock:  # writers may run side by side
            self.num_writes += 1
            number = self.num_writes
        fails = number in self._fail_writes
        if not fails or self._after:
            write(path, data)
        if fails:
            raise StoreError(f"{self.url}/{path}: write {number} fails on purpose")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _commit_shards(
    store: ObjectStore,
    identity: CacheIdentity,
    table: pa.Table,
    samples: Sequence[PlannedTokens],
    topks: Sequence[TopKLogProbs],
    num_shards: int | None,
    excluded: Mapping[int, str],
) -> None:
    """Commit the first shards of the table that are not committed yet."""
    shard_of = table.column("shard").to_pylist()
    for shard in sorted(set(sorted(set(shard_of))[:num_shards]) - committed_shards(store)):
        planned = [i for i, s in enumerate(shard_of) if s == shard]
        inside = [i for i in planned if i not in excluded]
        labels = np.concatenate([samples[i][0][target_positions(samples[i][1].ravel())] for i in inside])
        topk = TopKLogProbs.concatenate([topks[i] for i in inside])
        sample_rows = [len(topks[i]) for i in inside]
        lacking = [_excluded(table, i, excluded[i]) for i in planned if i in excluded]
        commit_shard(
            store,
            identity,
            shard,
            topk,
            labels,
            seconds=0.0,
            worker="test",
            sample_rows=sample_rows,
            excluded=lacking,
        )


def _excluded(table: pa.Table, sample: int, reason: str) -> ExcludedSample:
    (planned,) = table.slice(sample, 1).to_pylist()
    return ExcludedSample(
        first_row=planned["first_row"],
        num_rows=planned["num_targets"],
        key=planned["key"].hex(),
        source_ids=(planned["source_id"],),
        reason=reason,
    )


def _plan_table(
    samples: Sequence[PlannedTokens], shard_rows: int, columns: Mapping[str, Sequence[Any]], first_shard: int = 0
) -> tuple[pa.Table, tuple[int, ...]]:
    rows, sizes = [], [0]
    for i, (ids, ranges) in enumerate(samples):
        num_targets = int((ranges[:, 1] - ranges[:, 0]).sum())
        if sizes[-1] and sizes[-1] + num_targets > shard_rows:
            sizes.append(0)
        rows.append(
            {
                "key": bytes.fromhex(sample_key(ids, ranges)),
                "source_id": f"test:{i + 1}",
                "shard": first_shard + len(sizes) - 1,
                "first_row": sizes[-1],
                "num_tokens": len(ids),
                "num_targets": num_targets,
                "input_ids": ids,
                "target_ranges": ranges.ravel(),
            }
        )
        sizes[-1] += num_targets
    table = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table, tuple(sizes)


def _write_plan(
    store: ObjectStore, table: pa.Table, shard_num_rows: tuple[int, ...], vocabulary: ObjectRecord
) -> PlanRecord:
    """The plan of a table whose samples were written."""
    return PlanRecord(
        num_samples=table.num_rows,
        num_tokens=sum(table.column("num_tokens").to_pylist()),
        num_rows=sum(shard_num_rows),
        shard_num_rows=shard_num_rows,
        report={},
        parts=write_samples(store, new_attempt(), [table]),
        vocabulary=vocabulary,
    )


def _vocabulary_table(words: Sequence[str]) -> pa.Table:
    return pa.table(
        {"token": list(words), "text": [w.encode() for w in words], "special": [False] * len(words)},
        schema=VOCABULARY_SCHEMA,
    )
