"""Several caches of one corpus, joined by sample key, whatever order each was built in.

Shapes: P samples of the first cache, S of them that every cache has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError

Missing = Literal["error", "drop"]
"""What to do with samples that some cache lacks: refuse, or leave them out."""


@dataclass(frozen=True, eq=False)
class Joined:
    """The samples that every cache has, in the order of the first one."""

    places: Mapping[str, tuple[npt.NDArray[np.int64], ...]]
    """Role to where the samples stand in each of its caches, [S]."""
    kept: npt.NDArray[np.int64]
    """Where they stand in the first cache, [S]."""
    lacking: Mapping[str, int]
    """URL of each cache that lacks samples of the first one, and how many."""


def join_by_key(primary: Cache, caches: Mapping[str, Sequence[Cache]], *, missing: Missing) -> Joined:
    """Join caches to the samples of `primary`.

    Raises:
        MismatchError: a cache lacks samples of `primary`, and `missing` is `error`.
        InputError: no sample is in every cache.
    """
    found = {role: [_find(cache, primary) for cache in several] for role, several in caches.items()}
    everywhere = np.ones(len(primary), dtype=bool)
    lacking: dict[str, int] = {}
    for role, several in caches.items():
        for cache, places in zip(several, found[role], strict=True):
            absent = np.flatnonzero(places < 0)
            if len(absent) and missing == "error":
                raise MismatchError(
                    f"the {role} cache {cache.store.url} lacks {len(absent)} of the {len(primary)} samples of"
                    f" {primary.store.url}, the first with key {primary.key(int(absent[0]))}; build both caches from"
                    " the same corpus with the same tokenizer, to their end, or leave such samples out with"
                    " --missing drop"
                )
            if len(absent):
                lacking[cache.store.url] = len(absent)
                everywhere[absent] = False
    kept = np.flatnonzero(everywhere)
    if not len(kept):
        raise InputError(
            f"none of the {len(primary)} samples of {primary.store.url} is in every cache ({', '.join(lacking)}):"
            " nothing is left to train on; build the caches from the same corpus with the same tokenizer"
        )
    at_kept = {role: tuple(places[kept] for places in several) for role, several in found.items()}
    return Joined(at_kept, kept, lacking)


def check_same_tokenizers(caches: Sequence[Cache]) -> None:
    """Refuse caches whose token ids do not mean the same.

    Raises:
        MismatchError: vocabulary or special tokens of two caches differ.
    """
    first = caches[0]
    for cache in caches[1:]:
        for part in ("vocabulary", "special_tokens"):
            ours, theirs = (getattr(c.identity.tokenizer, part) for c in (first, cache))
            if ours != theirs:
                raise MismatchError(
                    f"{first.store.url} and {cache.store.url} are caches of tokenizers with different"
                    f" {part.replace('_', ' ')}: {ours[:12]} and {theirs[:12]};"
                    " use caches of teachers that share the student's tokenizer"
                )


def _find(cache: Cache, primary: Cache) -> npt.NDArray[np.int64]:
    """Where each sample of `primary` stands in `cache`, [P]; -1 where it does not."""
    if cache is primary:
        return np.arange(len(primary))
    ours, theirs = (_arrow(c.keys()) for c in (primary, cache))
    found = pc.index_in(ours, value_set=theirs).fill_null(-1)
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)


def _arrow(keys: npt.NDArray[np.void]) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(keys))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(keys.itemsize), len(keys), [None, data])
