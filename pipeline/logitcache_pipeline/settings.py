"""Everything a user can say of a build."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from logitcache_pipeline.engines.base import ENGINES
from logitcache_storage.errors import InputError
from logitcache_storage.schema import CONTAINERS, PRECISIONS

ROLES = ("teacher", "reference")
LOG_FORMATS = ("text", "json")
OVERLONG = ("truncate", "skip", "refuse")

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BuildSettings:
    """The command line and the YAML file have one option for each field."""

    teacher: str
    data: tuple[str, ...]
    cache: str
    engine: str = "transformers"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher, here and in every worker."""
    dtype: str = "auto"
    """"float32", "bfloat16" or "float16"; "auto": bfloat16 for workers with GPUs, float32 without."""
    tensor_parallel: int = 1
    """Devices that share one copy of the model; for the engine vllm."""
    nodes_per_worker: int = 1
    """Nodes that those devices lie on; above 1 a worker has a placement group, and vLLM's Ray executor in it."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Handed to the engine as they are, e.g. vLLM's gpu_memory_utilization."""
    role: str = "teacher"
    """What the cache is for: `teacher`, or `reference` for a base, reference or old policy."""
    k: int = 64
    """0: the label's log-prob alone, for roles other than teacher."""
    kept_mass: float = 1.0
    precision: str = "u8"
    format: str = "zarr"
    shard_rows: int | None = None
    """Target rows of a shard; None: see `plan.default_shard_rows`."""
    max_length: int | None = None
    """Tokens of a sample; None: as many as the teacher takes."""
    overlong: str = "truncate"
    prompt_field: str | None = None
    response_field: str | None = None
    workers: int | None = None
    """Ray actors; None: one for each GPU of the cluster, or one where it has none."""
    gpus_per_worker: float | None = None
    """None: one where the cluster has GPUs, none elsewhere."""
    tokens_per_batch: int | None = None
    """Tokens the teacher sees at once, padding included; None: the engine's choice."""
    compile: bool = False
    """Put the model through torch.compile, see `TransformersTeacher.load`; vLLM decides for itself."""
    max_attempts: int = 3
    shard_deadline: float | None = None
    """Seconds; None: see `run.RunSettings`."""
    start_deadline: float | None = None
    """Seconds that a worker may load the teacher; None: two hours."""
    ray_address: str | None = None
    """Address of a Ray cluster; None: a local one that lives as long as the build."""
    extend: bool = False
    """Add the data to the cache that is there; `dtype` and `shard_rows` that are not given are the cache's."""
    allow_quarantine: int = 0
    """Lost samples, those of lost shards counted, with which a build still counts as done."""
    retry_quarantine: bool = False
    """Score the shards again that are committed without some of their samples."""
    log_format: str = "text"
    """"text": lines for people; "json": one JSON object a line."""
    dry_run: bool = False
    """Read, tokenize and plan, say what there is and what it will take, and stop."""
    sample_rows: int | None = None
    """Target rows that a dry run scores to estimate bytes; 0: none; None: see `estimate.default_sample_rows`."""
    calibrate: float | None = None
    """Seconds for which a dry run scores to measure the rate of this machine; None: it does not."""
    price_per_gpu_hour: float | None = None
    """In any currency; with `calibrate`."""

    @property
    def loading_options(self) -> dict[str, Any]:
        """What `from_pretrained` is told wherever something of the teacher is loaded, under transformers' names."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def teacher_options(self) -> dict[str, Any]:
        """What the engine is told besides path and dtype."""
        options = self.engine_options | self.loading_options
        if self.tokens_per_batch is not None:
            options["tokens_per_batch"] = self.tokens_per_batch
        if self.compile:
            options["compile"] = True
        if self.engine == "vllm":
            options["tensor_parallel"] = self.tensor_parallel
            options["nodes_per_worker"] = self.nodes_per_worker
        return options

    @property
    def devices_per_worker(self) -> float | None:
        """GPUs of a worker, as asked for or as tensor parallelism needs; None: what the cluster makes of it."""
        if self.gpus_per_worker is None and self.tensor_parallel > 1:
            return float(self.tensor_parallel)
        return self.gpus_per_worker

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data: expected at least one corpus file, URL or dataset name")
        choices = {
            "engine": ENGINES,
            "role": ROLES,
            "dtype": DTYPES,
            "precision": PRECISIONS,
            "format": CONTAINERS,
            "log_format": LOG_FORMATS,
            "overlong": OVERLONG,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        if not 0.0 < self.kept_mass <= 1.0:
            raise InputError(f"kept_mass must be above 0 and at most 1, got {self.kept_mass}")
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker < math.inf:
            raise InputError(f"gpus_per_worker must be at least 0, got {self.gpus_per_worker}")
        for name in ("shard_deadline", "start_deadline"):
            if (seconds := getattr(self, name)) is not None and not seconds > 0:
                raise InputError(f"{name} must be above 0 seconds, got {seconds}")
        counts = ("tensor_parallel", "nodes_per_worker", "shard_rows", "workers", "tokens_per_batch", "max_attempts")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self._check_k()
        self._check_engine()
        self._check_estimate()

    def _check_k(self) -> None:
        if self.k < 0 or (self.k == 0 and self.role == "teacher"):
            raise InputError(
                f"k must be at least 1, got {self.k}; 0 keeps the label's log-prob alone, which is all that some"
                " objectives ask of an old policy or a reference (psft, iw_sft): with --role reference"
            )

    def _check_engine(self) -> None:
        if own := sorted(self.engine_options.keys() & self.__dataclass_fields__):
            option = f"--{own[0].replace('_', '-')}"
            raise InputError(f"engine_options has {own[0]!r}, which has an option of its own; give it with {option}")
        if self.engine != "vllm" and self.tensor_parallel > 1:
            raise InputError(
                f"the engine {self.engine} runs on one device, got tensor_parallel {self.tensor_parallel};"
                " use --engine vllm for a model that needs several"
            )
        if "pipeline_parallel_size" in self.engine_options:
            raise InputError(
                "engine_options has 'pipeline_parallel_size', and no model is run in stages here; leave it out, and"
                " spread the model over N GPUs of M nodes with --tensor-parallel N --nodes-per-worker M"
            )
        self._check_nodes()
        if self.engine == "vllm" and self.compile:
            raise InputError(
                "the engine vllm compiles by itself; leave compile out, or say what it shall do with"
                """ --engine-options '{"compilation_config": ...}'"""
            )
        if self.tensor_parallel > 1 and self.gpus_per_worker not in (None, 0, self.tensor_parallel):
            raise InputError(
                f"gpus_per_worker is {self.gpus_per_worker:g}, and a worker needs {self.tensor_parallel} GPUs for"
                f" tensor_parallel {self.tensor_parallel}; leave --gpus-per-worker out"
            )

    def _check_nodes(self) -> None:
        if self.tensor_parallel % self.nodes_per_worker:
            raise InputError(
                f"nodes_per_worker is {self.nodes_per_worker}, which does not divide tensor_parallel"
                f" {self.tensor_parallel}; let each node hold as many of a worker's GPUs"
            )
        if self.nodes_per_worker > 1 and self.gpus_per_worker == 0:
            raise InputError(
                f"gpus_per_worker is 0, and nodes_per_worker {self.nodes_per_worker}: only GPUs are spread over nodes;"
                " leave one of the two out"
            )

    def _check_estimate(self) -> None:
        for name in ("sample_rows", "calibrate", "price_per_gpu_hour"):
            if getattr(self, name) is not None and not self.dry_run:
                raise InputError(f"{name} is for an estimate before the build; give it with --dry-run, or leave it out")
        if self.calibrate is not None and not 0 < self.calibrate < math.inf:
            raise InputError(f"calibrate must be above 0 seconds, got {self.calibrate}")
        if self.price_per_gpu_hour is not None:
            if not 0 <= self.price_per_gpu_hour < math.inf:
                raise InputError(f"price_per_gpu_hour must be at least 0, got {self.price_per_gpu_hour}")
            if self.calibrate is None:
                raise InputError("price_per_gpu_hour needs a measured rate; add --calibrate SECONDS")
            if self.devices_per_worker == 0:
                raise InputError("price_per_gpu_hour is given, and workers have no GPU; leave one of the two out")
        for name in ("sample_rows", "allow_quarantine"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
