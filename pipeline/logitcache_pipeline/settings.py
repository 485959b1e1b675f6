"""Everything a user can say of a build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from logitcache_pipeline.engines.base import ENGINES
from logitcache_storage.errors import InputError
from logitcache_storage.schema import CONTAINERS, PRECISIONS

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BuildSettings:
    """The command line and the YAML file have one option for each field."""

    teacher: str
    data: tuple[str, ...]
    cache: str
    engine: str = "transformers"
    dtype: str = "auto"
    """"float32", "bfloat16" or "float16"; "auto": bfloat16 for workers with GPUs, float32 without."""
    k: int = 64
    kept_mass: float = 1.0
    precision: str = "u8"
    format: str = "zarr"
    shard_rows: int | None = None
    """Target rows of a shard; None: see `plan.default_shard_rows`."""
    max_length: int | None = None
    """Tokens of a sample; None: as many as the teacher takes."""
    overlong: Any = "truncate"
    prompt_field: str | None = None
    response_field: str | None = None
    workers: int | None = None
    """Ray actors; None: one for each GPU of the cluster, or one where it has none."""
    gpus_per_worker: float | None = None
    """None: one where the cluster has GPUs, none elsewhere."""
    tokens_per_batch: int | None = None
    """Padded tokens the teacher sees at once; None: the engine's choice."""
    max_attempts: int = 3
    shard_deadline: float | None = None
    """Seconds; None: see `run.RunSettings`."""
    ray_address: str | None = None
    """Address of a Ray cluster; None: a local one that lives as long as the build."""
    dry_run: bool = False
    """Read, tokenize and plan, say what there is, and stop."""

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data: expected at least one corpus file, URL or dataset name")
        choices = {"engine": ENGINES, "dtype": DTYPES, "precision": PRECISIONS, "format": CONTAINERS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        if not 0.0 < self.kept_mass <= 1.0:
            raise InputError(f"kept_mass must be above 0 and at most 1, got {self.kept_mass}")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise InputError(f"gpus_per_worker must be at least 0, got {self.gpus_per_worker}")
        if self.shard_deadline is not None and self.shard_deadline <= 0:
            raise InputError(f"shard_deadline must be above 0 seconds, got {self.shard_deadline}")
        for name in ("k", "shard_rows", "workers", "tokens_per_batch", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
