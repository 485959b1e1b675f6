"""What users import: open a cache by URL, look at its samples, read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_storage.commit import load_commits, load_identity, read_rows, shard_prefix
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import CacheNotFoundError, CorruptionError, InputError
from logitcache_storage.excluded import committed_samples, excluded_samples
from logitcache_storage.fingerprints import fingerprint
from logitcache_storage.local_rows import from_buffer, num_row_bytes, to_buffers
from logitcache_storage.manifest import Manifest
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.plans import load_plan
from logitcache_storage.record_json import to_json
from logitcache_storage.sample_index import SampleIndex
from logitcache_storage.samples import ROWS_PER_GROUP, SAMPLES_SCHEMA, SamplesTable, read_vocabulary
from logitcache_storage.schema import CacheIdentity, PlanRecord, ShardRecord
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.vocabulary import Vocabulary
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
    spelling: Callable[[], Vocabulary] | None = field(default=None, repr=False)
    """Gives the vocabulary that its tokens are shown with."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The observed target tokens, [M]."""
        return self.input_ids[self.target_positions]

    def _repr_html_(self) -> str | None:
        from logitcache_storage.inspect.notebook import sample_html

        return sample_html(self)

    def __getstate__(self) -> dict[str, Any]:
        # Numbers travel to another process, and not the cache behind the spelling.
        return {**self.__dict__, "spelling": None}


class Cache:
    """A read-only view of the committed samples of a cache, as of when it was opened."""

    def __init__(
        self,
        store: ObjectStore,
        identity: CacheIdentity,
        plan: PlanRecord,
        shards: Mapping[int, ShardRecord],
        disk_cache: DiskCache | None = None,
    ) -> None:
        self.store = store
        self.identity = identity
        """Teacher, tokenizer and corpus fingerprints, k, vocabulary size, precision."""
        self.plan = plan
        """Everything that will be in the cache when the build is done."""
        self.shards = shards
        """Commit records of the shards that are in it now."""
        self.disk_cache = disk_cache
        """Where decoded shards and samples are kept for all processes of this node; None: nowhere."""
        self.excluded = excluded_samples(shards)
        """Shard to those of its samples that could not be scored; they are not in the cache."""
        self._table = SamplesTable(store, plan, disk_cache)
        committed = self._check_shards()
        self._plan_index, self.index = committed_samples(
            self._table.places(), committed, self.excluded, where=store.url
        )

    @classmethod
    def open(
        cls, url: str, storage_options: Mapping[str, Any] | None = None, *, disk_cache: DiskCache | None = None
    ) -> Cache:
        """Open the cache at a URL.

        Args:
            url: a folder, or any URL that fsspec knows, e.g. `s3://bucket/cache`.
            storage_options: handed to fsspec (credentials, endpoint).
            disk_cache: keeps whole shards, decoded, and the samples that were read; several caches may share one.

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
        return cls(store, identity, plan, load_commits(store, len(plan.shard_num_rows)), disk_cache)

    index: SampleIndex
    """Shard, first row, number of tokens and of targets of every committed sample, as numpy arrays."""

    def __len__(self) -> int:
        """Number of committed samples."""
        return len(self.index)

    @cached_property
    def samples(self) -> pa.Table:
        """Every column of every committed sample but its tokens: key, source_id, ..., the corpus's own.

        All of it is read when it is first asked for: of many millions of samples ask `index` and `describe` instead.
        """
        table = self._table.index()
        if self._plan_index is None:
            return table
        first_row = pa.array(self.index.first_row, pa.int32())  # as it is stored, not as it was planned
        names = table.column_names
        return table.take(self._plan_index).set_column(
            names.index("first_row"), SAMPLES_SCHEMA.field("first_row"), first_row
        )

    @cached_property
    def column_names(self) -> list[str]:
        """The columns of `samples`."""
        return self._table.column_names()

    def describe(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The columns of `samples` for these samples, one dictionary each."""
        found = self._table.describe([self._planned(i) for i in indices])
        return [{**about, "first_row": int(self.index.first_row[i])} for i, about in zip(indices, found, strict=True)]

    def scan(self, names: Sequence[str], first: int = 0) -> Iterator[tuple[int, pa.Table]]:
        """(index of its first sample, these columns of the samples table) of runs of up to 1,024 samples, in order.

        It begins with the run that the sample `first` stands in. Nothing of it stays in memory.
        """
        if first >= len(self):
            return
        for planned, table in self._table.scan(names, self._planned(first)):
            if self._plan_index is None:
                yield planned, table
                continue
            start, stop = np.searchsorted(self._plan_index, [planned, planned + len(table)]).tolist()
            if start == len(self):
                return
            yield start, table.take(self._plan_index[start:stop] - planned)

    def keys(self) -> npt.NDArray[np.void]:
        """The key of every sample, 16 bytes each, [n]."""
        keys = self._table.keys()
        return keys if self._plan_index is None else keys[self._plan_index]

    def key(self, index: int) -> str:
        """The key of a sample, 32 hex digits."""
        return self._table.key(self._planned(index)).hex()

    def _repr_html_(self) -> str | None:
        from logitcache_storage.inspect.notebook import cache_html

        return cache_html(self)

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
        return Vocabulary(read_vocabulary(self.store, self.plan.vocabulary, self.identity.vocab_size))

    def index_of(self, key: str) -> int:
        """Index of the first sample with this key; a prefix of at least 6 hex digits will do.

        Raises:
            InputError: no such key, or more than one key begins so.
        """
        found = self.indices_of(key)
        if not found or any(k != found[0][1] for _, k in found):
            problem = "no sample has" if not found else f"{len(found)} samples begin with"
            raise InputError(f"{problem} the key {key!r} in {self.store.url}; give 6 to 32 hex digits of one key")
        return found[0][0]

    def indices_of(self, prefix: str) -> list[tuple[int, bytes]]:
        """(index, key) of all samples whose key begins with these 6 to 32 hex digits; none where they are others."""
        wanted = prefix.lower()
        found = self._table.find(wanted) if re.fullmatch("[0-9a-f]{6,32}", wanted) else []
        if self._plan_index is None:
            return found
        # The committed samples are in the order of the plan.
        places = np.searchsorted(self._plan_index, [sample for sample, _ in found]).tolist()
        in_range = [(i, sample, k) for i, (sample, k) in zip(places, found, strict=True) if i < len(self)]
        return [(i, k) for i, sample, k in in_range if self._plan_index[i] == sample]

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at these indices, in the order asked; reads only the chunks that hold them.

        Raises:
            IndexError: an index outside the cache.
            CorruptionError: an object is damaged; nothing of it is returned.
        """
        wanted = [self._checked_index(i) for i in indices]
        tokens = self.read_tokens(wanted)
        rows = self._read_rows(sorted(set(wanted), key=lambda i: (self.index.shard[i], self.index.first_row[i])))
        described = self.describe(wanted)
        return [
            Sample(
                key=about["key"].hex(),
                source_id=about["source_id"],
                input_ids=input_ids,
                target_positions=positions,
                topk=rows[i],
                columns={name: value for name, value in about.items() if name not in SAMPLES_SCHEMA.names},
                spelling=lambda: self.vocabulary,
            )
            for i, about, (input_ids, positions) in zip(wanted, described, tokens, strict=True)
        ]

    def read_tokens(self, indices: Sequence[int]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
        """(input_ids [L], target_positions [M]) of these samples, without what the teacher thought."""
        return [self._table.tokens(self._planned(i)) for i in indices]

    def read_shard(self, shard: int) -> TopKLogProbs:
        """All rows of a committed shard; sample i has rows [first_row, first_row + num_targets) of its shard.

        With a disk cache the arrays are read-only, in memory that all processes of the node share.

        Raises:
            KeyError: the shard is not committed.
            CorruptionError: an object is damaged, or a local file, again and again.
        """
        record = self.shards[shard]
        if self.disk_cache is None:
            return self._decode(record)
        data = self.disk_cache.get(
            self._local_name(record),
            lambda: to_buffers(self._decode(record)),
            source=self._source(record),
            num_bytes=num_row_bytes(record.num_rows, self.identity.k),
        )
        return from_buffer(data, record.num_rows, self.identity.k)

    def read_shard_ahead(self, shard: int) -> TopKLogProbs | None:
        """As `read_shard`, into the disk cache; None where another process is at it, or there is no room."""
        record = self.shards[shard]
        assert self.disk_cache is not None
        data = self.disk_cache.get_ahead(
            self._local_name(record),
            lambda: to_buffers(self._decode(record)),
            source=self._source(record),
            num_bytes=num_row_bytes(record.num_rows, self.identity.k),
        )
        return None if data is None else from_buffer(data, record.num_rows, self.identity.k)

    def token_groups(self, indices: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
        """What `read_tokens_ahead` is to be asked for before these samples are read."""
        return self._table.groups_of(indices if self._plan_index is None else self._plan_index[indices])

    def read_tokens_ahead(self, part: int, group: int) -> memoryview | None:
        """Bring a group of samples into the disk cache, to stay there while the result is kept; None as above."""
        return self._table.read_ahead(part, group)

    def num_local_bytes(self, num_shards: int) -> int:
        """Bytes that the largest so many shards take in a disk cache, with their samples of mean length."""
        sizes = np.sort(np.asarray(self.plan.shard_num_rows))[::-1]
        # The samples of a shard stand side by side, and begin and end within a row group.
        num_groups = min(2 * num_shards, -(-self.plan.num_samples // ROWS_PER_GROUP))
        group_bytes = 4 * self.plan.num_tokens * ROWS_PER_GROUP // max(self.plan.num_samples, 1)
        return num_row_bytes(int(sizes[:num_shards].sum()), self.identity.k) + num_groups * group_bytes

    def _decode(self, record: ShardRecord) -> TopKLogProbs:
        return read_rows(self.store, self.identity, record, slice(0, record.num_rows))

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(to_json(self.identity))[:16]

    def _local_name(self, record: ShardRecord) -> str:
        return f"{self._fingerprint}-{record.shard:05d}-{record.attempt}.rows"

    def _source(self, record: ShardRecord) -> str:
        return f"{self.store.url}/{shard_prefix(record.shard, record.attempt)}"

    def _planned(self, index: int) -> int:
        """Where a sample stands in the plan."""
        checked = self._checked_index(index)
        return checked if self._plan_index is None else int(self._plan_index[checked])

    def _checked_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a cache with {len(self)} committed samples")
        return int(index) % len(self)

    def _check_shards(self) -> npt.NDArray[np.bool_]:
        """Which shards of the plan are committed, [S]."""
        sizes = np.asarray(self.plan.shard_num_rows, dtype=np.int64)
        if isinstance(self.shards, Manifest):
            numbers, num_rows = self.shards.column("shard"), self.shards.column("num_rows")
        else:
            numbers = np.array(list(self.shards), dtype=np.int64)
            num_rows = np.array([record.num_rows for record in self.shards.values()], dtype=np.int64)
        outside = numbers >= len(sizes)
        num_planned = num_rows.astype(np.int64)
        for shard, samples in self.excluded.items():
            num_planned[numbers == shard] += sum(sample.num_rows for sample in samples)
        wrong = numbers[outside | (sizes[np.where(outside, 0, numbers)] != num_planned)] if len(sizes) else numbers
        if len(wrong):
            number = int(wrong[0])
            rows = int(num_rows[numbers == number][0])
            raise CorruptionError(f"{self.store.url}: shard {number} has {rows} rows, not the plan's")
        committed = np.zeros(len(sizes), dtype=bool)
        committed[numbers] = True
        return committed

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
        gap = int(self.index.first_row[after]) - self._stop_row(before)
        return bool(self.index.shard[before] == self.index.shard[after]) and gap < CHUNK_ROWS

    def _stop_row(self, sample: int) -> int:
        return int(self.index.first_row[sample]) + int(self.index.num_targets[sample])

    def _read_run(self, run: list[int]) -> dict[int, TopKLogProbs]:
        record = self.shards[int(self.index.shard[run[0]])]
        start = int(self.index.first_row[run[0]])
        stop = max(self._stop_row(i) for i in run)
        topk = read_rows(self.store, self.identity, record, slice(start, stop))
        return {i: topk[int(self.index.first_row[i]) - start : self._stop_row(i) - start] for i in run}
