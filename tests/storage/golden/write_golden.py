"""Writes the golden caches of format version 1 that are not there. Those that are must stay readable as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from logitcache_storage import Cache
from logitcache_storage.testing import make_identity, make_samples, write_cache

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
}
"""The first four were written before there was more than one id layout; only one has statistics of its samples."""

if __name__ == "__main__":
    for name, about in CACHES.items():
        if (FOLDER / name).exists():
            continue
        identity = make_identity(**{"k": 4, "vocab_size": 30, **about})
        samples, topks = make_samples(4, k=4, vocab_size=identity.vocab_size, seed=1)
        topks = [topk.keep_mass(0.97) if i % 2 else topk for i, topk in enumerate(topks)]
        options = {"columns": {"weight": [1.0, 0.5, 0.25, 0.0]}, "vocabulary": [f"t{i} " for i in range(30)]}
        write_cache(str(FOLDER / name), samples, topks, identity=identity, **options)
        rows = Cache.open(str(FOLDER / name)).read_shard(0)
        expected = {"ids": rows.ids.tolist(), "probs": np.exp(rows.log_probs).round(7).astype(float).tolist()}
        (FOLDER / f"{name}.json").write_text(json.dumps(expected) + "\n")
