"""Ask the teacher again about some samples of a cache, and compare. Runs in this process, without Ray.

`logitcache verify --rescore` finds `rescore_samples` through the entry point `rescore` of the group `logitcache.hooks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from logitcache_pipeline.engines.base import ScoringRequest, Teacher, load_teacher
from logitcache_pipeline.fingerprint import teacher_identity
from logitcache_storage.agreement import ARITHMETIC_NATS, Agreement, Difference, RescoreReport, agreement, agrees
from logitcache_storage.cache import Cache, Sample
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.progress import progress
from logitcache_storage.schema import CacheIdentity

SAMPLES_AT_ONCE = 32
SPARE_IDS = 64
"""Ids asked for beyond the cache's k: one that was kept and has slipped a few ranks is still found."""


def rescore_samples(
    cache: Cache,
    num_samples: int,
    *,
    teacher: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> RescoreReport:
    """Score random committed samples again and compare them with the cache.

    Args:
        cache: an open cache.
        num_samples: how many, at least 1; all where the cache has fewer.
        teacher: folder or hub id of the model; None: where the cache's identity found it.
        engine_options: for `load_teacher`; None: the engine's defaults.
        seed: of the choice of samples.
        quiet: show no progress.

    Raises:
        InputError: the cache has no samples, or the teacher cannot be loaded.
        MismatchError: it is another model than the cache's.
        CorruptionError: an object of a chosen sample is damaged.
    """
    if num_samples < 1:
        raise InputError(f"rescore: expected at least 1 sample, got {num_samples}")
    if not len(cache):
        raise InputError(f"{cache.store.url} has no committed sample to score again; 'logitcache status' says why")
    path = teacher or cache.identity.teacher.id
    model = _load(path, cache.identity, engine_options or {})
    chosen = np.random.default_rng(seed).choice(len(cache), min(num_samples, len(cache)), replace=False)
    indices = np.sort(chosen).tolist()
    parts: list[Agreement] = []
    places: list[_Place] = []
    with progress("rescoring", total=len(indices), unit="samples", quiet=quiet) as meter:
        for start in range(0, len(indices), SAMPLES_AT_ONCE):
            samples = cache.read(indices[start : start + SAMPLES_AT_ONCE])
            parts += _compare(samples, model, cache.identity)
            places += [_Place(s.key, s.source_id, int(p)) for s in samples for p in s.target_positions]
            meter.advance(len(samples))
    return _report(path, seed, len(indices), Agreement.join(parts), places, cache.identity)


class _Place(NamedTuple):
    """Where a row stands."""

    key: str
    source_id: str
    position: int


def _load(path: str, identity: CacheIdentity, options: Mapping[str, Any]) -> Teacher:
    cached = identity.teacher
    if cached.dtype not in ARITHMETIC_NATS:
        known = ", ".join(ARITHMETIC_NATS)
        raise InputError(f"the cache's teacher has the dtype {cached.dtype!r}, can score again in {known}")
    if path == cached.id and cached.revision:  # its branch may have moved on since
        options = {"revision": cached.revision, **options}
    loading = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    try:
        found = teacher_identity(path, dtype=cached.dtype, engine=cached.engine, **loading)
    except ValueError as e:  # ours, and the hub's client's for what cannot be a name
        raise InputError(f"the teacher {path!r} cannot be read: {e}; say where it is with --teacher") from e
    if differences := identity.differences(replace(identity, teacher=found)):
        listing = "\n  ".join(differences)
        raise MismatchError(
            f"{path} is not the teacher of the cache (field: in the cache, found):\n  {listing}\n"
            "give the checkpoint that the cache was made with: --teacher; if code of its own belongs to it, with"
            """ --engine-options '{"trust_remote_code": true}'"""
        )
    teacher = load_teacher(cached.engine, path, cached.dtype, **options)
    if teacher.vocab_size != identity.vocab_size:
        raise MismatchError(f"{path}: its head has {teacher.vocab_size} rows, the cache's {identity.vocab_size}")
    return teacher


def _compare(samples: Sequence[Sample], teacher: Teacher, identity: CacheIdentity) -> list[Agreement]:
    requests = [ScoringRequest(sample.input_ids, sample.target_positions) for sample in samples]
    answers = teacher.score(requests, min(identity.k + SPARE_IDS, identity.vocab_size) if identity.k else 0)
    return [
        agreement(sample.topk, answer, precision=identity.precision, dtype=identity.teacher.dtype)
        for sample, answer in zip(samples, answers, strict=True)
    ]


def _report(
    path: str, seed: int, num_samples: int, rows: Agreement, places: Sequence[_Place], identity: CacheIdentity
) -> RescoreReport:
    dtype, has_ids = identity.teacher.dtype, identity.k > 0
    worst = int(np.argmax(rows.severity))
    return RescoreReport(
        teacher=path,
        seed=seed,
        num_samples=num_samples,
        num_rows=len(places),
        kept=Difference(float(rows.kept.max()), float(rows.kept_sum.sum() / rows.num_kept.sum())) if has_ids else None,
        label=Difference(float(rows.label.max()), float(rows.label.mean())),
        tail=Difference(float(rows.tail.max()), float(rows.tail.mean())) if has_ids else None,
        kl_mean=float(rows.kl.mean()) if has_ids else None,
        kl_largest=float(rows.kl.max()) if has_ids else None,
        top_1_agreement=float(rows.same_top_1.mean()) if has_ids else None,
        allowed=ARITHMETIC_NATS[dtype],
        agrees=agrees(rows, dtype=dtype),
        worst_key=places[worst].key,
        worst_source_id=places[worst].source_id,
        worst_position=places[worst].position,
        worst_severity=float(rows.severity[worst]),
    )
