"""Open, read and check a cache of teacher log-probs, without torch and without ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcache_storage.cache import Cache, Sample
    from logitcache_storage.topk import TopKLogProbs

__all__ = ["Cache", "Sample", "TopKLogProbs"]

_MODULES = {"Cache": "cache", "Sample": "cache", "TopKLogProbs": "topk"}


def __getattr__(name: str) -> Any:
    """Import on first use: `logitcache --help` goes through here and needs neither numpy nor zarr."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
