"""Adding further data to a cache: what must be equal, and what of the data is in the cache already.

An extension is a plan of its own behind those that are there. Its records become samples as those of the first corpus
did; a sample that the cache has already is left out, so a corpus that has grown may be given whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitcache_pipeline.columns import JSON_COLUMN
from logitcache_pipeline.plan import plan_schema
from logitcache_pipeline.tokenize import Excluded, TokenizedSample
from logitcache_storage.commit import load_identity
from logitcache_storage.errors import CacheNotFoundError, CorpusError, MismatchError
from logitcache_storage.objects import ObjectStore
from logitcache_storage.plans import Plans, join_plans, load_plans
from logitcache_storage.samples import SAMPLES_SCHEMA, read_parquet_object
from logitcache_storage.schema import CacheIdentity, CorpusIdentity, ObjectRecord, PlanRecord

_WIDER = {(pa.int64(), pa.float64()), (pa.list_(pa.int64()), pa.list_(pa.float64()))}
"""Types of columns whose values are values of another type, too."""


@dataclass(frozen=True, eq=False)
class Base:
    """The cache that an extension stands behind."""

    store: ObjectStore
    identity: CacheIdentity
    plans: Plans

    @property
    def num_plans(self) -> int:
        """Number of the plan that comes next."""
        return 1 + len(self.plans.extensions)

    @property
    def plan(self) -> PlanRecord:
        """Everything that is planned so far."""
        return join_plans(self.plans, where=self.store.url)

    def number_of(self, corpus: CorpusIdentity) -> int | None:
        """Number of the plan of this corpus; None where the cache has none."""
        if corpus.fingerprint == self.identity.corpus.fingerprint:
            return 0
        return self.plans.number_of(corpus.fingerprint)

    def check_same(self, asked: CacheIdentity) -> None:
        """Refuse settings other than the cache's; only the data may be others.

        Raises:
            MismatchError: names every field that differs.
        """
        ours = self.identity.corpus
        same_data = replace(asked.corpus, fingerprint=ours.fingerprint, num_records=ours.num_records)
        if differences := self.identity.differences(replace(asked, corpus=same_data)):
            listing = "\n  ".join(differences)
            raise MismatchError(
                f"{self.store.url} was made with other settings (field: in the cache, asked for):\n  {listing}\n"
                "an extension needs those of the cache; give them, or build a cache of its own"
            )


def load_base(store: ObjectStore) -> Base:
    """What an extension of the cache on a store must know.

    Raises:
        CacheNotFoundError: there is no cache, or its first plan is not written yet.
    """
    identity, plans = load_identity(store), load_plans(store)
    if plans is None:
        raise CacheNotFoundError(
            f"{store.url}: its first build has not written its plan yet; run that to the end, then extend the cache"
        )
    return Base(store, identity, plans)


class KnownSamples:
    """Which samples a cache has; 16 bytes each."""

    def __init__(self, keys: npt.NDArray[np.bytes_]) -> None:
        self._keys = np.sort(keys)

    @classmethod
    def of(cls, base: Base) -> KnownSamples:
        """All that are planned."""
        return cls(np.concatenate([_keys_of(base.store, part.object) for part in base.plan.parts]))

    def __contains__(self, key: str) -> bool:
        wanted = np.array([bytes.fromhex(key)], "S16")
        place = int(np.searchsorted(self._keys, wanted)[0])
        return place < len(self._keys) and bool(self._keys[place] == wanted[0])

    def left_out(self, samples: Iterable[TokenizedSample | Excluded]) -> Iterator[TokenizedSample | Excluded]:
        """The samples, with those that the cache has excluded."""
        for sample in samples:
            is_known = isinstance(sample, TokenizedSample) and sample.key in self
            yield Excluded(sample.source_id, "in_cache") if is_known else sample


def fitted_columns(columns: pa.Schema, base: Base) -> pa.Schema:
    """The columns of further data (`columns.extra_columns`) as those of the cache; what the data lacks is null.

    Raises:
        CorpusError: a column that the cache has not, or has with another type.
    """
    found = read_parquet_object(base.store, base.plans.first.parts[0].object).schema_arrow
    cached = pa.schema([_as_planned(f) for f in found if f.name not in SAMPLES_SCHEMA.names])
    stored = plan_schema(columns).names[len(SAMPLES_SCHEMA) :]
    sources = dict(zip(stored, columns, strict=True))
    if unknown := sorted(sources.keys() - set(cached.names)):
        raise CorpusError(
            f"the data has a column {sources[unknown[0]].name!r}, and the cache has"
            f" {', '.join(map(repr, cached.names)) or 'none'}; rename or remove it, or build a cache of its own"
        )
    for name, source in sources.items():
        if not _fits(source, cached.field(name)):
            raise CorpusError(
                f"column {source.name!r}: found {_type_name(source)}, the cache has {_type_name(cached.field(name))};"
                " convert it in the data, or build a cache of its own"
            )
    return pa.schema([f.with_name(sources[f.name].name if f.name in sources else f.name) for f in cached])


def _keys_of(store: ObjectStore, record: ObjectRecord) -> npt.NDArray[np.bytes_]:
    column = read_parquet_object(store, record).read(["key"]).column(0).combine_chunks()
    return np.frombuffer(column.buffers()[1], "S16")[column.offset : column.offset + len(column)]


def _as_planned(field: pa.Field) -> pa.Field:
    """Without what Parquet has made of it: metadata of its own, and other names inside lists."""
    kind = pa.list_(field.type.value_type) if pa.types.is_list(field.type) else field.type
    return pa.field(field.name, kind, metadata=JSON_COLUMN if _is_json(field) else None)


def _fits(source: pa.Field, cached: pa.Field) -> bool:
    if _is_json(source) or _is_json(cached):
        return _is_json(cached)
    return source.type == cached.type or (source.type, cached.type) in _WIDER


def _is_json(field: pa.Field) -> bool:
    return JSON_COLUMN.items() <= dict(field.metadata or {}).items()


def _type_name(field: pa.Field) -> str:
    return "mixed or nested values" if _is_json(field) else str(field.type)
