"""What users import: open a cache by URL, look at its samples, read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.commit import load_commits, load_identity, read_rows
from logitcache_storage.errors import CacheNotFoundError, CorruptionError, InputError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.samples import ROWS_PER_GROUP, SAMPLES_SCHEMA, SamplesTable, read_parquet_object
from logitcache_storage.schema import CacheIdentity, PlanRecord, ShardRecord
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA, Vocabulary
from logitcache_storage.zarr_shard import CHUNK_ROWS


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of the corpus with what the teacher thought of each of its target tokens.

    L tokens, M of them targets. Row m of `topk` is the distribution that predicts
    `input_ids[target_positions[m]]`; the teacher saw `input_ids[:target_positions[m]]`.
    """

    key: str
    """Hash of token ids and targets, 32 hex digits; equal in every cache of the same corpus."""
    source_id: str
    """Where the record stood in the corpus, e.g. "train.jsonl:17"."""
    input_ids: npt.NDArray[np.int32]
    """[L]"""
    target_positions: npt.NDArray[np.int32]
    """Where the target tokens stand, [M], ascending, each >= 1."""
    topk: TopKLogProbs
    """M rows."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The corpus's own columns."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The observed target tokens, [M]."""
        return self.input_ids[self.target_positions]


class Cache:
    """A read-only view of the committed samples of a cache, as of when it was opened."""

    def __init__(
        self, store: ObjectStore, identity: CacheIdentity, plan: PlanRecord, shards: Mapping[int, ShardRecord]
    ) -> None:
        self.store = store
        self.identity = identity
        """Teacher, tokenizer and corpus fingerprints, k, vocabulary size, precision."""
        self.plan = plan
        """Everything that will be in the cache when the build is done."""
        self.shards = dict(shards)
        """Commit records of the shards that are in it now."""
        self._table = SamplesTable(store, plan)
        self._plan_index, self.samples = self._load_index()
        self._shard = self.samples.column("shard").to_numpy()
        self._first_row = self.samples.column("first_row").to_numpy()
        self._num_targets = self.samples.column("num_targets").to_numpy()

    @classmethod
    def open(cls, url: str, storage_options: Mapping[str, Any] | None = None) -> Cache:
        """Open the cache at a URL.

        Args:
            url: a folder, or any URL that fsspec knows, e.g. `s3://bucket/cache`.
            storage_options: handed to fsspec (credentials, endpoint).

        Raises:
            CacheNotFoundError: there is none, or its build has not written the plan yet.
            MismatchError: it is of another format version.
            CorruptionError: its metadata is damaged.
        """
        store = open_store(str(url), storage_options)
        identity = load_identity(store)
        plan = load_plan(store)
        if plan is None:
            raise CacheNotFoundError(
                f"{store.url}: the build has not written its plan yet; let it run, or run it again to continue"
            )
        return cls(store, identity, plan, load_commits(store))

    def __len__(self) -> int:
        """Number of committed samples."""
        return int(self.samples.num_rows)

    def __getitem__(self, index: int) -> Sample:
        return self.read([index])[0]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), ROWS_PER_GROUP):
            yield from self.read(range(start, min(len(self), start + ROWS_PER_GROUP)))

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the plan is committed."""
        return len(self.shards) == len(self.plan.shard_num_rows)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each token id looks like."""
        return Vocabulary(read_parquet_object(self.store, self.plan.vocabulary).read(VOCABULARY_SCHEMA.names))

    def index_of(self, key: str) -> int:
        """Index of the first sample with this key; a prefix of at least 6 hex digits will do.

        Raises:
            InputError: no such key, or more than one key begins so.
        """
        wanted = key.lower()
        found = [i for i, k in enumerate(self._keys) if k.startswith(wanted)] if len(wanted) >= 6 else []
        if not found or any(self._keys[i] != self._keys[found[0]] for i in found):
            problem = "no sample has" if not found else f"{len(found)} samples begin with"
            raise InputError(f"{problem} the key {key!r} in {self.store.url}; give 6 to 32 hex digits of one key")
        return found[0]

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at these indices, in the order asked; reads only the chunks that hold them.

        Raises:
            IndexError: an index outside the cache.
            CorruptionError: an object is damaged; nothing of it is returned.
        """
        wanted = [self._checked_index(i) for i in indices]
        tokens = self.read_tokens(wanted)
        rows = self._read_rows(sorted(set(wanted), key=lambda i: (self._shard[i], self._first_row[i])))
        described = self.samples.take(pa.array(wanted, pa.int64())).to_pylist()
        return [
            Sample(
                key=about["key"].hex(),
                source_id=about["source_id"],
                input_ids=input_ids,
                target_positions=positions,
                topk=rows[i],
                columns={name: value for name, value in about.items() if name not in SAMPLES_SCHEMA.names},
            )
            for i, about, (input_ids, positions) in zip(wanted, described, tokens, strict=True)
        ]

    def read_tokens(self, indices: Sequence[int]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
        """(input_ids [L], target_positions [M]) of these samples, without what the teacher thought."""
        return [self._table.tokens(int(self._plan_index[self._checked_index(i)])) for i in indices]

    def read_shard(self, shard: int) -> TopKLogProbs:
        """All rows of a committed shard; sample i has rows [first_row, first_row + num_targets) of its shard."""
        record = self.shards[shard]
        return read_rows(self.store, self.identity, record, slice(0, record.num_rows))

    @cached_property
    def _keys(self) -> list[str]:
        return [key.hex() for key in self.samples.column("key").to_pylist()]

    def _checked_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a cache with {len(self)} committed samples")
        return int(index) % len(self)

    def _load_index(self) -> tuple[npt.NDArray[np.int64], pa.Table]:
        """Where each sample of a committed shard stands in the plan, and the index of those samples."""
        sizes = self.plan.shard_num_rows
        for number, record in self.shards.items():
            if number >= len(sizes) or record.num_rows != sizes[number]:
                raise CorruptionError(f"{self.store.url}: shard {number} has {record.num_rows} rows, not the plan's")
        committed = np.zeros(len(sizes), dtype=bool)
        committed[list(self.shards)] = True
        table = self._table.index()
        there = np.flatnonzero(committed[table.column("shard").to_numpy()])
        return there, table if len(there) == table.num_rows else table.take(there)

    def _read_rows(self, samples: Sequence[int]) -> dict[int, TopKLogProbs]:
        """Rows of distinct samples in order of (shard, row); neighbours within a chunk share one read."""
        rows: dict[int, TopKLogProbs] = {}
        run: list[int] = []
        for i in [*samples, None]:
            if run and (i is None or not self._near(run[-1], i)):
                rows |= self._read_run(run)
                run = []
            if i is not None:
                run.append(i)
        return rows

    def _near(self, before: int, after: int) -> bool:
        gap = int(self._first_row[after]) - int(self._first_row[before] + self._num_targets[before])
        return bool(self._shard[before] == self._shard[after]) and gap < CHUNK_ROWS

    def _read_run(self, run: list[int]) -> dict[int, TopKLogProbs]:
        record = self.shards[int(self._shard[run[0]])]
        start = int(self._first_row[run[0]])
        stop = max(int(self._first_row[i] + self._num_targets[i]) for i in run)
        topk = read_rows(self.store, self.identity, record, slice(start, stop))
        return {
            i: topk[int(self._first_row[i]) - start : int(self._first_row[i]) - start + int(self._num_targets[i])]
            for i in run
        }
