"""What there is to see of a cache, as plain values: a page of samples, one sample with its positions.

Every view draws from here, and `--json` is this.
"""

from __future__ import annotations

import codecs
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from logitcache_storage.cache import Cache, Sample
from logitcache_storage.errors import InputError
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.statistics import row_statistics
from logitcache_storage.visible import visible
from logitcache_storage.vocabulary import Vocabulary

MIN_KEY_DIGITS, KEY_DIGITS, MAX_INDEX_DIGITS = 6, 32, 18
SAMPLES_AT_ONCE = 64
"""Whose rows are in memory together where many are listed."""
NUM_READERS = 8
"""Samples that are looked up side by side: they stand anywhere, and a remote store answers slowly."""


def find_sample(cache: Cache, which: str) -> int:
    """Index of the sample called by its index or by its key (at least 6 hex digits).

    Digits that could be either are an index.

    Raises:
        InputError: there is no such sample.
    """
    is_index = which.removeprefix("-").isdecimal() and len(which) <= MAX_INDEX_DIGITS
    if is_index and -len(cache) <= int(which) < len(cache):
        return int(which) % len(cache)
    is_key = MIN_KEY_DIGITS <= len(which) <= KEY_DIGITS and all(c in "0123456789abcdefABCDEF" for c in which)
    if is_key and (not is_index or cache.indices_of(which)):
        return cache.index_of(which)
    there = f"0 to {len(cache) - 1}" if len(cache) else "none yet"
    raise InputError(
        f"no sample {which[:50]!r} in {cache.store.url}; committed samples: {there};"
        f" give one of these, or at least {MIN_KEY_DIGITS} hex digits of a sample's key"
    )


def rows_within(rows: slice, count: int, *, of: str) -> slice:
    """The part of a range of rows that is there.

    Raises:
        InputError: nothing of it is.
    """
    start, stop = rows.start or 0, count if rows.stop is None else min(rows.stop, count)
    if start >= stop:
        raise InputError(f"no row {start} in {of}, which has {count} rows; give A:B with A from 0 to {count - 1}")
    return slice(start, stop)


def listing_data(cache: Cache, rows: slice) -> list[dict[str, Any]]:
    """The samples of a range: key, source, sizes, mean label log-prob (nats)."""
    starts = range(rows.start, rows.stop, SAMPLES_AT_ONCE)
    samples = (sample for i in starts for sample in cache.read(range(i, min(i + SAMPLES_AT_ONCE, rows.stop))))
    return [{"index": i, **_sample_facts(sample)} for i, sample in enumerate(samples, rows.start)]


def table_data(cache: Cache, table: SampleTable, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Some samples with their statistics: `key`, `source_id` and all of `SampleTable.facts`; reads no row."""
    wanted = [int(index) for index in indices]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = [about for (about,) in pool.map(lambda index: cache.describe([index]), wanted)]
    return [
        {"key": about["key"].hex(), "source_id": about["source_id"], **table.facts(index)}
        for index, about in zip(wanted, found, strict=True)
    ]


def sample_data(sample: Sample, index: int, vocabulary: Vocabulary, *, rows: slice, top: int) -> dict[str, Any]:
    """One sample: what it is, its text in segments, and its positions with the teacher's choices.

    Args:
        sample: what to show.
        index: of the sample in its cache.
        vocabulary: of the cache.
        rows: which of its target positions, counted from 0 over the targets alone.
        top: how many choices of the teacher at each.
    """
    return {
        "index": index,
        **_sample_facts(sample),
        "columns": sample.columns,
        "segments": segments(sample, vocabulary),
        "rows": positions(sample, vocabulary, rows, top),
    }


def segments(sample: Sample, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The text, cut where targets begin and end: `target`, `start` and `stop` (tokens), `texts` by token.

    A character spelled by several tokens stands with the token that completes it; bytes that are no UTF-8 are
    kept as surrogates (PEP 383).
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    texts = [decoder.decode(vocabulary.text(int(token))) for token in sample.input_ids]
    texts[-1] += decoder.decode(b"", final=True)
    is_target = np.zeros(len(sample.input_ids), dtype=bool)
    is_target[sample.target_positions] = True
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(is_target)]
    return [
        {"target": bool(is_target[start]), "start": start, "stop": stop, "texts": texts[start:stop]}
        for start, stop in itertools.pairwise(edges)
    ]


def positions(sample: Sample, vocabulary: Vocabulary, rows: slice, top: int) -> list[dict[str, Any]]:
    """Target positions: label, its rank (None outside the kept ids), log-probs in nats, top choices."""
    topk, labels = sample.topk[rows], sample.labels[rows]
    found = row_statistics(topk, labels)
    return [
        {
            "row": rows.start + i,
            "position": int(sample.target_positions[rows.start + i]),
            "label": token_data(vocabulary, int(labels[i])),
            "label_rank": int(found.label_rank[i]) or None,
            "label_log_prob": float(topk.label_log_prob[i]),
            "entropy": float(found.entropy[i]),
            "tail": math.exp(float(topk.log_tail[i])),
            "num_kept": int(topk.num_kept[i]),
            "top": [
                {**token_data(vocabulary, int(token)), "log_prob": float(log_prob)}
                for token, log_prob in _choices(topk.ids[i], topk.log_probs[i], min(top, int(topk.num_kept[i])))
            ],
        }
        for i in range(len(labels))
    ]


def token_data(vocabulary: Vocabulary, token: int) -> dict[str, Any]:
    """A token: `id`, `text`, and `bytes` in hex where they are no valid UTF-8 on their own, else None."""
    data = vocabulary.text(token)
    text = data.decode("utf-8", "replace")
    return {"id": token, "text": text, "bytes": None if text.encode() == data else data.hex()}


def token_text(token: dict[str, Any]) -> str:
    """A token of `token_data` on one line."""
    return visible(bytes.fromhex(token["bytes"]) if token["bytes"] else token["text"])


def _sample_facts(sample: Sample) -> dict[str, Any]:
    return {
        "key": sample.key,
        "source_id": sample.source_id,
        "num_tokens": len(sample.input_ids),
        "num_targets": len(sample.target_positions),
        "mean_label_log_prob": float(sample.topk.label_log_prob.astype(np.float64).mean()),
    }


def _choices(ids: Sequence[int], log_probs: Sequence[float], count: int) -> list[tuple[int, float]]:
    return list(zip(ids[:count], log_probs[:count], strict=True))
