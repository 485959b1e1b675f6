"""Samples of one or several caches as a map-style dataset, and the sampler that says which are wanted when.

The sampler hands out whole global batches with the number of the part that is ours; the dataset, maybe in another
process, cuts the part out and reads it. So skipping steps costs nothing, and nothing is read that is not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, Sampler

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.fingerprints import fingerprint
from logitcache_storage.schema import to_json
from logitcache_train.batches import epoch_order, global_batches, micro_batches, num_global_batches
from logitcache_train.collate import TrainingSample
from logitcache_train.columns import column_readers
from logitcache_train.objectives import Objective
from logitcache_train.reading import RowReader


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a global batch, still to be cut out."""

    batch: npt.NDArray[np.int64]
    """Samples of the whole global batch."""
    index: int
    num_parts: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank trains on in one forward pass: at least one sample, be it without targets."""

    samples: list[TrainingSample]
    num_items: int
    """Target tokens of the whole global batch."""


class CachedSamples(Dataset[Any]):
    """The samples of a cache, with the rows and columns that an objective needs.

    With several caches the first one says which samples there are; the others are joined to it by sample key.
    """

    def __init__(self, caches: Mapping[str, Cache], objective: Objective, *, window_shards: int) -> None:
        """Look the samples up; nothing of a shard is read yet.

        Args:
            caches: role to cache, at least one; the first one is the order's.
            objective: says which roles and columns are read.
            window_shards: shards of a shuffle window: for each role, so many decoded shards stay in memory.

        Raises:
            InputError: there are no samples, or a cache or a column that the objective needs is not there.
            MismatchError: a cache lacks samples of the first one.
        """
        for role in objective.roles:
            if role not in caches:
                raise InputError(
                    f"objective {objective.name!r} needs a {role} cache, given: {', '.join(caches)};"
                    f" add --cache {role}=URL"
                )
        self.primary = next(iter(caches.values()))
        table = self.primary.samples
        if not table.num_rows:
            raise InputError(
                f"{self.primary.store.url} has no sample yet; 'logitcache status' says how far its build is"
            )
        self.num_tokens = table.column("num_tokens").to_numpy().astype(np.int64)
        self.num_targets = table.column("num_targets").to_numpy().astype(np.int64)
        self.shard = table.column("shard").to_numpy()
        wanted = (*objective.roles, *(role for role in objective.optional_roles if role in caches))
        self._rows = {role: RowReader(caches[role], self.primary, role, window_shards) for role in wanted}
        self._columns = column_readers(objective, self.primary)
        self._keys = table.column("key")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> TrainingSample:
        return self._sample(int(index), 0)

    def __getitems__(self, part: Part) -> MicroBatch:
        """The samples of a part; of an empty part its batch's shortest sample, without targets."""
        samples = micro_batches(part.batch, self.num_tokens[part.batch], part.num_parts)[part.index]
        num_items = int(self.num_targets[part.batch].sum())
        if len(samples):
            return MicroBatch(self._in_order_of_shards(samples), num_items)
        # Every rank must take part in every step, or the others wait for its gradients for ever.
        shortest = int(part.batch[np.argmin(self.num_tokens[part.batch])])
        return MicroBatch([self._sample(shortest, 0).without_targets()], num_items)

    def order_fingerprint(self) -> str:
        """Of what decides which samples there are: equal fingerprints and settings give equal batches."""
        # A plan is a pure function of what the identity says.
        return fingerprint([to_json(self.primary.identity), sorted(self.primary.shards)])

    def check_token_ids(self, limit: int, *, student: str) -> None:
        """Refuse a student that has no token of some id in the samples; reads all token ids.

        Raises:
            MismatchError: an id at or above `limit`.
        """
        for i in range(len(self)):
            input_ids = self.primary.read_tokens([i])[0][0]
            if int(input_ids.max()) >= limit:
                raise MismatchError(
                    f"sample {self._key(i)} has the token id {int(input_ids.max())}, and {student} has {limit} tokens;"
                    " use a student with at least as many tokens as the cache's tokenizer (resize its embeddings)"
                )

    def _in_order_of_shards(self, samples: npt.NDArray[np.int64]) -> list[TrainingSample]:
        """The samples in the order given, read so that no shard is decoded twice for one micro-batch.

        Shards that are in memory come first: where a window begins, a batch has samples of two windows.
        """
        places = range(len(samples))
        readers = list(self._rows.values())
        by_shard = sorted(places, key=lambda place: [reader.reading_order(int(samples[place])) for reader in readers])
        found = {place: self._sample(int(samples[place]), place) for place in by_shard}
        return [found[place] for place in places]

    def _key(self, index: int) -> str:
        return str(self._keys[index].as_py().hex())

    def _sample(self, index: int, place: int) -> TrainingSample:
        input_ids, positions = self.primary.read_tokens([index])[0]
        columns = {name: read(index, positions, len(input_ids), place) for name, read in self._columns.items()}
        topks = {role: reader.rows(index) for role, reader in self._rows.items()}
        return TrainingSample(self._key(index), input_ids, positions, topks, columns)


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
        for start, stop in pairwise(starts):
            for step in range(self._accumulation):
                part = step * self._world_size + self._rank
                yield Part(order[start:stop], part, self._world_size * self._accumulation)


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose sampler is told the epoch; the Trainer calls `set_epoch` where there is one."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
