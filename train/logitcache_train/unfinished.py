"""Caches whose build has not ended: refused, or trained on as far as they are.

A cache that grows is seen in another state by each rank, and by each start of a run that is resumed. Batches follow
from the samples that there are, so all of them go by the same shards: those that every rank saw, or those of the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError

Caches = Mapping[str, Sequence[Cache]]
"""Role to its caches."""


def check_finished(caches: Caches) -> None:
    """Refuse caches that lack shards of their plan.

    Raises:
        InputError: names the first of them, and says how far it is.
    """
    for role, several in caches.items():
        for cache in several:
            if not cache.is_complete:
                url = cache.store.url
                raise InputError(
                    f"the {role} cache {url} is unfinished: {len(cache):,} of {cache.plan.num_samples:,} samples are"
                    f" there; let its build end ('logitcache status {url}' says how far it is and what was lost), or"
                    " train on the samples that are there now with --allow_partial"
                )


def agreed(caches: Caches, resumed: Mapping[str, Any] | None) -> Caches:
    """The caches as every rank sees them; to be called by all ranks.

    Args:
        caches: as this rank has opened them.
        resumed: the record of the checkpoint that the run goes on from; its shards are kept to, where they are there.
    """
    ours = {role: [set(cache.shards) for cache in several] for role, several in caches.items()}
    seen = [ours]
    if torch.distributed.is_initialized():
        seen = [ours] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(seen, ours)
    common = {role: [reduce(set.__and__, sets) for sets in zip(*(s[role] for s in seen), strict=True)] for role in ours}
    before = (resumed or {}).get("caches", {})
    for role, several in common.items():
        # Where there are other caches than there were, the run is refused anyway.
        for shards, about in zip(several, before.get(role, []), strict=False):
            if about.get("shards") is not None:
                shards &= set(about["shards"])
    return {
        role: [_with_shards(*pair) for pair in zip(several, common[role], strict=True)]
        for role, several in caches.items()
    }


def _with_shards(cache: Cache, shards: set[int]) -> Cache:
    if len(shards) == len(cache.shards):
        return cache
    kept = {shard: cache.shards[shard] for shard in sorted(shards)}
    return Cache(cache.store, cache.identity, cache.plan, kept, cache.disk_cache)
