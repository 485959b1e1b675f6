"""Writes the golden caches of format version 1 that are not there. Those that are must stay readable as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from logitcache_storage import Cache
from logitcache_storage.objects import open_store
from logitcache_storage.testing import extend_cache, make_identity, make_samples, write_cache
from logitcache_storage.topk import TopKLogProbs

FOLDER = Path(__file__).parent

CACHES = {
    "v1-zarr-u8": {"container": "zarr", "precision": "u8", "id_layout": "plain"},
    "v1-zarr-fp32": {"container": "zarr", "precision": "fp32", "id_layout": "plain"},
    "v1-arrow-u10": {"container": "arrow", "precision": "u10", "id_layout": "plain"},
    "v1-arrow-fp16": {"container": "arrow", "precision": "fp16", "id_layout": "plain"},
    "v1-zarr-u8-ascending": {"container": "zarr", "precision": "u8", "id_layout": "ascending"},
    "v1-zarr-fp16-ascending": {"container": "zarr", "precision": "fp16", "id_layout": "ascending"},
    "v1-arrow-u8-split-statistics": {"container": "arrow", "precision": "u8", "id_layout": "split"},
    "v1-arrow-u10-split": {"container": "arrow", "precision": "u10", "id_layout": "split", "vocab_size": 70_000},
    "v1-zarr-u10-ascending-excluded": {"container": "zarr", "precision": "u10", "id_layout": "ascending"},
    "v1-zarr-u8-ascending-extended": {"container": "zarr", "precision": "u8", "id_layout": "ascending"},
    "v1-arrow-fp32-split-labels": {"container": "arrow", "precision": "fp32", "k": 0, "role": "reference"},
}
"""The first four were written before there was more than one id layout, and the first seven but one before there were
statistics of samples. The last three: one sample is lacking; two plans; no ids."""

if __name__ == "__main__":
    for name, about in CACHES.items():
        if (FOLDER / name).exists():
            continue
        identity = make_identity(**{"k": 4, "vocab_size": 30, **about})
        samples, topks = make_samples(4, k=4, vocab_size=identity.vocab_size, seed=1)
        topks = [topk.keep_mass(0.97) if i % 2 else topk for i, topk in enumerate(topks)]
        if identity.k == 0:
            topks = [TopKLogProbs.of_labels(topk.label_log_prob) for topk in topks]
        columns = {} if name.endswith("extended") else {"weight": [1.0, 0.5, 0.25, 0.0]}
        options = {"columns": columns, "vocabulary": [f"t{i} " for i in range(30)]}
        lacking = {1: "made up"} if name.endswith("excluded") else {}
        write_cache(str(FOLDER / name), samples, topks, identity=identity, excluded=lacking, **options)
        if name.endswith("extended"):
            extend_cache(open_store(str(FOLDER / name)), *make_samples(2, k=4, vocab_size=identity.vocab_size, seed=2))
        cache = Cache.open(str(FOLDER / name))
        rows = TopKLogProbs.concatenate([cache.read_shard(shard) for shard in sorted(cache.shards)])
        expected = {"ids": rows.ids.tolist(), "probs": np.exp(rows.log_probs).round(7).astype(float).tolist()}
        (FOLDER / f"{name}.json").write_text(json.dumps(expected) + "\n")
