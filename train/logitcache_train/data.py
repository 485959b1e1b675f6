"""Samples of one or several caches as a map-style dataset, and the sampler that says which are wanted when.

The sampler hands out whole global batches with the number of the part that is ours; the dataset, maybe in another
process, cuts the part out and reads it. So skipping steps costs nothing, and nothing is read that is not trained on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from torch.utils.data import DataLoader, Dataset, Sampler

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError, StoreUnavailableError
from logitcache_storage.fingerprints import fingerprint
from logitcache_storage.patience import STORE_PATIENCE_SECONDS, patiently
from logitcache_storage.record_json import to_json
from logitcache_train.batches import epoch_order, global_batches, micro_batches, num_global_batches, window_starts
from logitcache_train.collate import TrainingSample
from logitcache_train.columns import NO_FILES, ColumnFiles, column_readers
from logitcache_train.joining import Missing, join_by_key
from logitcache_train.objectives import Objective
from logitcache_train.reading import Needs, ReadAhead, RowReader, Source, TokenSource, check_room

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a global batch, still to be cut out."""

    batch: npt.NDArray[np.int64]
    """Samples of the whole global batch."""
    index: int
    num_parts: int
    coming: tuple[Needs, ...] = ()
    """What the shuffle windows of the batch and the one behind them are read from, where that is read ahead."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank trains on in one forward pass: at least one sample, be it without targets."""

    samples: list[TrainingSample]
    num_items: int
    """Target tokens of the whole global batch."""


class CachedSamples(Dataset[Any]):
    """The samples of one or several caches, with the rows and columns that an objective needs.

    The first cache says which samples there are, and in which shards; the others are joined to it by sample key.
    """

    def __init__(
        self,
        caches: Mapping[str, Sequence[Cache]],
        objective: Objective,
        *,
        window_shards: int,
        missing: Missing = "error",
        also: Sequence[str] = (),
        option: str = "--cache",
        columns: ColumnFiles = NO_FILES,
    ) -> None:
        """Look the samples up; nothing of a shard is read yet.

        Args:
            caches: role to its caches, at least one of each; the first one is the order's.
            objective: says which roles and columns are read.
            window_shards: shards of a shuffle window: for each cache, so many decoded shards stay in memory.
            missing: what to do with samples that one of the caches lacks.
            also: roles that are read besides those of the objective, where they are given.
            option: what a user adds a cache with, for messages.
            columns: per-target data besides the corpus's own.

        Raises:
            InputError: there are no samples, or a cache or a column that the objective needs is not there, or a cache
                keeps no ids and the objective needs them.
            MismatchError: a cache lacks samples of the first one.
        """
        for role in objective.roles:
            if role not in caches:
                raise InputError(
                    f"objective {objective.name!r} needs a {role} cache, given: {', '.join(caches)};"
                    f" add {option} {role}=URL"
                )
        _refuse_without_ids(caches, objective)
        self.primary = next(iter(caches.values()))[0]
        index = self.primary.index
        if not len(index):
            raise InputError(
                f"{self.primary.store.url} has no sample yet; 'logitcache status' says how far its build is"
            )
        roles = dict.fromkeys((*objective.roles, *objective.optional_roles, *also))
        read = {role: caches[role] for role in roles if role in caches}
        joined = join_by_key(self.primary, read, missing=missing)
        self.roles = tuple(read)
        """The roles that are read."""
        self.lacking = joined.lacking
        """URL of each cache that lacks samples of the first one, and how many; they are left out."""
        self._identities = [cache.identity for cache in (self.primary, *(c for each in read.values() for c in each))]
        self._kept = joined.kept
        self.num_tokens, self.num_targets, self.shard = (
            column[self._kept].astype(np.int64) for column in (index.num_tokens, index.num_targets, index.shard)
        )
        self._rows = {
            role: tuple(RowReader(c, at, window_shards) for c, at in zip(read[role], joined.places[role], strict=True))
            for role in read
        }
        self._ahead = self._read_ahead(window_shards)
        self._column_files = columns
        self._columns = column_readers(objective, self.primary, self._kept, columns)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> TrainingSample:
        return self._sample(int(index), 0)

    def __getitems__(self, part: Part) -> MicroBatch:
        """The samples of a part; of an empty part its batch's shortest sample, without targets."""
        if self._ahead is not None:
            self._ahead.follow(part.coming)
        samples = micro_batches(part.batch, self.num_tokens[part.batch], part.num_parts)[part.index]
        num_items = int(self.num_targets[part.batch].sum())
        if len(samples):
            return MicroBatch(self._in_order_of_shards(samples), num_items)
        # Every rank must take part in every step, or the others wait for its gradients for ever.
        shortest = int(part.batch[np.argmin(self.num_tokens[part.batch])])
        return MicroBatch([self._sample(shortest, 0).without_targets()], num_items)

    def needs(self, samples: npt.NDArray[np.int64]) -> Needs | None:
        """What these samples are read from; None where nothing is read ahead."""
        return None if self._ahead is None else self._ahead.needs(samples)

    def order_fingerprint(self) -> str:
        """Of the samples, their shards and what is read of them: where equal, equal settings give equal batches."""
        digest = hashlib.sha256(self.shard.tobytes())
        digest.update(self.primary.keys()[self._kept].tobytes())
        identities = (to_json(identity) for identity in self._identities)
        return fingerprint([digest.hexdigest(), *identities, *filter(None, [self._column_files.fingerprint()])])

    def check_token_ids(self, limit: int, *, student: str) -> None:
        """Refuse a student that has no token of some id in the samples; reads all token ids.

        Raises:
            MismatchError: an id at or above `limit`.
        """
        for first, table in self.primary.scan(["input_ids"]):
            start, stop = np.searchsorted(self._kept, [first, first + len(table)])
            ids = table.column("input_ids").take(self._kept[start:stop] - first).combine_chunks()
            highest = pc.max(ids.flatten()).as_py()
            if highest is not None and highest >= limit:
                place = pc.index(ids.flatten(), highest).as_py()
                sample = start + ids.value_parent_indices()[place].as_py()
                raise MismatchError(
                    f"sample {self._key(sample)} has the token id {highest}, and {student} has {limit} tokens;"
                    " use a student with at least as many tokens as the cache's tokenizer (resize its embeddings)"
                )

    def _in_order_of_shards(self, samples: npt.NDArray[np.int64]) -> list[TrainingSample]:
        """The samples in the order given, read so that no shard is decoded twice for one micro-batch.

        Shards that are in memory come first: where a window begins, a batch has samples of two windows.
        """
        places = range(len(samples))
        readers = [reader for several in self._rows.values() for reader in several]
        by_shard = sorted(places, key=lambda place: [reader.reading_order(int(samples[place])) for reader in readers])
        found = {place: self._sample(int(samples[place]), place) for place in by_shard}
        return [found[place] for place in places]

    def _read_ahead(self, window_shards: int) -> ReadAhead | None:
        """Reads ahead what goes through a disk cache; None where nothing does."""
        readers = [reader for several in self._rows.values() for reader in several]
        caches = {id(cache): cache for cache in (self.primary, *(reader.cache for reader in readers))}
        check_room(caches.values(), window_shards)
        sources: list[Source] = [reader for reader in readers if reader.cache.disk_cache is not None]
        if self.primary.disk_cache is not None:
            sources.insert(0, TokenSource(self.primary, self._kept))
        return ReadAhead(sources) if sources else None

    def _key(self, index: int) -> str:
        return self.primary.key(int(self._kept[index]))

    def _sample(self, index: int, place: int) -> TrainingSample:
        return patiently(lambda: self._read(index, place), seconds=STORE_PATIENCE_SECONDS, on_pause=_say_waiting)

    def _read(self, index: int, place: int) -> TrainingSample:
        row = int(self._kept[index])
        input_ids, positions = self.primary.read_tokens([row])[0]
        columns = {name: read(row, positions, len(input_ids), place) for name, read in self._columns.items()}
        topks = {role: tuple(reader.rows(index) for reader in several) for role, several in self._rows.items()}
        return TrainingSample(self._key(index), input_ids, positions, topks, columns)


def _say_waiting(error: StoreUnavailableError) -> None:
    log.warning("%s; it is asked again, for %.0f minutes at most", error, STORE_PATIENCE_SECONDS / 60)


def _refuse_without_ids(caches: Mapping[str, Sequence[Cache]], objective: Objective) -> None:
    """Of a cache with k = 0, coefficients can read the label's log-prob; there is no distribution to train towards."""
    for cache in caches[objective.role] if objective.role is not None else ():
        if not cache.identity.k:
            raise InputError(
                f"objective {objective.name!r} trains towards the distribution of the {objective.role} cache, and"
                f" {cache.store.url} keeps the label's log-prob alone (k = 0); build it with --k 64 or so"
            )


class GlobalBatchSampler(Sampler[Any]):
    """One rank's parts of every global batch of an epoch, in order."""

    def __init__(
        self,
        samples: CachedSamples,
        *,
        batch_tokens: int,
        window_shards: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulation_steps: int,
    ) -> None:
        self._samples, self._batch_tokens, self._window_shards = samples, batch_tokens, window_shards
        self._seed, self._rank, self._world_size, self._accumulation = seed, rank, world_size, accumulation_steps
        self._epoch = 0
        tokens = samples.num_tokens
        self.num_batches = num_global_batches(int(tokens.sum()), int(tokens.max(initial=0)), batch_tokens)
        """Optimizer steps of an epoch."""

    def __len__(self) -> int:
        """Forward passes of an epoch: optimizer steps times accumulation steps."""
        return self.num_batches * self._accumulation

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Part]:
        order = epoch_order(self._samples.shard, seed=self._seed, epoch=self._epoch, window_shards=self._window_shards)
        starts = global_batches(self._samples.num_tokens[order], self._batch_tokens)
        coming = self._coming(order)
        for start, stop in pairwise(starts):
            windows = coming(start, stop)
            for step in range(self._accumulation):
                part = step * self._world_size + self._rank
                yield Part(order[start:stop], part, self._world_size * self._accumulation, windows)

    def _coming(self, order: npt.NDArray[np.int64]) -> Callable[[int, int], tuple[Needs, ...]]:
        """What is read ahead at a batch [start, stop) of the order."""
        if self._samples.needs(order[:0]) is None:
            return lambda *_: ()
        starts = window_starts(self._samples.shard[order], self._window_shards)

        @lru_cache(maxsize=8)
        def needs(window: int) -> Needs:
            return self._samples.needs(order[starts[window] : starts[window + 1]]) or ()

        def coming(start: int, stop: int) -> tuple[Needs, ...]:
            first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
            return tuple(needs(window) for window in range(first, min(last + 2, len(starts) - 1)))

        return coming


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose sampler is told the epoch; the Trainer calls `set_epoch` where there is one."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
