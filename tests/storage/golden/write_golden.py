"""Writes the golden caches of format version 1. Not to be run again: what is here must stay readable as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from logitcache_storage import Cache, TopKLogProbs
from logitcache_storage.testing import make_identity, make_samples, write_cache

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    samples, topks = make_samples(4, k=4, vocab_size=30, seed=1)
    topks = [topk.keep_mass(0.97) if i % 2 else topk for i, topk in enumerate(topks)]
    for container, precision in [("zarr", "u8"), ("zarr", "fp32"), ("arrow", "u10"), ("arrow", "fp16")]:
        name = f"v1-{container}-{precision}"
        identity = make_identity(container=container, precision=precision, k=4, vocab_size=30)
        write_cache(str(FOLDER / name), samples, topks, identity=identity, columns={"weight": [1.0, 0.5, 0.25, 0.0]})
        rows = TopKLogProbs.concatenate(topks)
        probs = np.exp(Cache.open(str(FOLDER / name)).read_shard(0).log_probs)
        expected = {"ids": rows.ids.tolist(), "probs": probs.round(7).astype(float).tolist()}
        (FOLDER / f"{name}.json").write_text(json.dumps(expected) + "\n")
