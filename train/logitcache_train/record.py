"""What a run was made of, saved with every checkpoint; and which checkpoint a run goes on from.

A run that is resumed must see the very batches that the checkpoint's run would have seen, or be refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.record_json import to_json
from logitcache_train.data import CachedSamples
from logitcache_train.settings import TrainSettings

RECORD_NAME = "logitcache.json"
"""Stands beside the weights of every checkpoint: the resolved settings and the identity of each cache."""

EXACT = ("objective", "objective_row", "mixing", "lora", "batch_tokens", "window_shards", "seed", "samples")
"""Entries of the record that must be equal for a resumed run to go on exactly where it was."""

SHARDED_WEIGHTS = "pytorch_model_fsdp*"
"""Files and folders that only checkpoints of FSDP have."""


def run_record(
    settings: TrainSettings,
    caches: Mapping[str, Sequence[Cache]],
    eval_caches: Mapping[str, Sequence[Cache]],
    samples: CachedSamples,
    batch_tokens: int,
) -> dict[str, Any]:
    """Everything that a run was made of, as JSON values; nothing secret."""
    arguments = settings.arguments
    num_teachers = len(caches.get("teacher", ()))
    record = {
        "logitcache": _version(),
        "student": settings.student,
        "objective": {"name": settings.objective.name, **settings.objective.values},
        "objective_row": settings.objective_row,
        "mixing": asdict(settings.mixing) if num_teachers > 1 else None,
        "missing": settings.missing,
        "columns": list(settings.columns),
        "lora": None if settings.lora is None else asdict(settings.lora),
        "batch_tokens": batch_tokens,
        "window_shards": settings.window_shards,
        "seed": arguments.seed if arguments.data_seed is None else arguments.data_seed,
        "num_samples": len(samples),
        "samples": samples.order_fingerprint(),
        "dtype": settings.dtype,
        "attn_implementation": settings.attn_implementation,
        "world_size": arguments.world_size,
        "caches": _described(caches),
        "eval_caches": _described(eval_caches),
        "training_arguments": arguments.to_dict(),
    }
    # As it will be read back: tuples are lists there.
    return dict(json.loads(json.dumps(record, default=str)))


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Put the record beside a checkpoint's weights."""
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        InputError: there is none.
    """
    try:
        record = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{checkpoint / RECORD_NAME} cannot be read: {e}; only a checkpoint of 'logitcache train' can be resumed"
        ) from e
    if not isinstance(record, dict) or "batch_tokens" not in record:
        raise InputError(f"{checkpoint / RECORD_NAME} is no record of a run; resume from another checkpoint")
    return record


def checkpoint_to_resume(settings: TrainSettings) -> Path | None:
    """The checkpoint that the run goes on from; None for a new run.

    With `auto` the last whole one of the output folder, or none: the same command for the first start and after a loss.

    Raises:
        InputError: there is none where one was asked for, there is one and nobody said what to do with it, or it is
            sharded and the run is not, or the other way round.
    """
    asked = str(settings.arguments.resume_from_checkpoint)
    if asked.lower() == "auto":
        checkpoint = _last_whole_checkpoint(settings.output)
        return None if checkpoint is None else _check_sharding(checkpoint, settings)
    last = get_last_checkpoint(settings.output) if settings.output.is_dir() else None
    if asked.lower() in ("none", "false"):
        if last is not None:
            raise InputError(
                f"{last} is there from an earlier run; go on from it with --resume_from_checkpoint true,"
                " or choose another folder with --output"
            )
        return None
    if asked.lower() == "true" and last is None:
        raise InputError(f"{settings.output} has no checkpoint to go on from; leave out --resume_from_checkpoint")
    checkpoint = Path(str(last)) if asked.lower() == "true" else Path(asked)
    if not (checkpoint / "trainer_state.json").is_file():
        raise InputError(
            f"--resume_from_checkpoint {asked}: no trainer_state.json there; name another folder checkpoint-N, or say"
            " auto, which takes the last whole one of the output folder"
        )
    return _check_sharding(checkpoint, settings)


def _last_whole_checkpoint(output: Path) -> Path | None:
    """None where there is none. The Trainer writes the state last, so one without it was being written at the end."""
    states = output.glob("checkpoint-*/trainer_state.json")
    steps = {path.parent.name.removeprefix("checkpoint-"): path.parent for path in states}
    last = max((step for step in steps if step.isdecimal()), key=int, default=None)
    return None if last is None else steps[last]


def _check_sharding(checkpoint: Path, settings: TrainSettings) -> Path:
    was_sharded = any(checkpoint.glob(SHARDED_WEIGHTS))
    if was_sharded != bool(settings.arguments.fsdp):
        raise InputError(
            f"{checkpoint} is of a run {'with' if was_sharded else 'without'} --fsdp, whose optimizer state is laid out"
            f" in another way; resume it {'with' if was_sharded else 'without'} --fsdp"
        )
    return checkpoint


def check_same_run(record: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of a run with other batches or another objective.

    The number of ranks, the accumulation steps and the layout may differ: the global batches stay the same.

    Raises:
        MismatchError: names every entry that differs.
    """
    saved = read_record(checkpoint)
    different = [name for name in EXACT if record[name] != saved.get(name)]
    if different:
        found = "; ".join(f"{name}: {_shown(record, name)}, there {_shown(saved, name)}" for name in different)
        grown = " (of a cache that has grown since, --allow_partial takes the same samples)"
        raise MismatchError(
            f"{checkpoint} belongs to another run ({found}); use the settings of that"
            f" run{grown if 'samples' in different else ''},"
            f" or begin a new one from its weights with --student {checkpoint} and another --output"
        )


def _shown(record: Mapping[str, Any], name: str) -> str:
    """An entry in a message: of the samples how many, and where their fingerprint begins."""
    value = str(record.get(name))
    return f"{record.get('num_samples')} (fingerprint {value[:12]})" if name == "samples" else value


def _described(caches: Mapping[str, Sequence[Cache]]) -> dict[str, list[dict[str, Any]]]:
    return {
        role: [
            {
                "url": re.sub(r"//[^/@]*@", "//", cache.store.url),
                "identity": to_json(cache.identity),
                # What `unfinished.agreed` goes by when the run is resumed and the cache has grown.
                "shards": None if cache.is_complete else sorted(cache.shards),
            }
            for cache in several
        ]
        for role, several in caches.items()
    }


def _version() -> str:
    try:
        return version("logitcache")
    except PackageNotFoundError:
        return "unknown"
