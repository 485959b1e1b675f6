"""One training run from settings to a saved student: load, check, train, save."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.fingerprints import check_same_tokenizer, tokenizer_identity
from logitcache_storage.progress import Meter, progress
from logitcache_storage.schema import to_json
from logitcache_storage.terminal import format_count
from logitcache_train.collate import Layout
from logitcache_train.data import CachedSamples
from logitcache_train.settings import TrainSettings
from logitcache_train.student import check_head, choose_layout, make_student
from logitcache_train.trainer import CachedTargetTrainer

RECORD_NAME = "logitcache.json"
"""Stands beside the weights of every checkpoint: the resolved settings and the identity of each cache."""

EXACT = ("objective", "batch_tokens", "window_shards", "seed", "samples")
"""Entries of the record that must be equal for a resumed run to go on exactly where it was."""


def train(settings: TrainSettings) -> None:
    """Train a student and save it, with its tokenizer, as an ordinary checkpoint in `settings.output`.

    Raises:
        InputError: student, caches, objective and settings do not go together; nothing was trained.
        MismatchError: another tokenizer, or a checkpoint of another run.
        LogitCacheError: the loss of a step is no number.
    """
    transformers_logging.disable_progress_bar()
    arguments = settings.arguments
    # Several devices in one process would be nn.DataParallel, which cuts inputs along a dimension that targets lack.
    idle_devices, arguments._n_gpu = max(arguments.n_gpu - 1, 0), min(arguments.n_gpu, 1)
    checkpoint = checkpoint_to_resume(settings)
    caches = {role: Cache.open(url, settings.storage_options) for role, url in settings.caches.items()}
    samples = CachedSamples(caches, settings.objective, window_shards=settings.window_shards)
    model, tokenizer, layout = _ready_student(settings, caches, samples)
    batch_tokens = resolve_batch_tokens(settings, samples, checkpoint)
    record = run_record(settings, caches, samples, batch_tokens)
    if checkpoint is not None:
        check_same_run(record, checkpoint)
    trainer = CachedTargetTrainer(
        model,
        arguments,
        samples,
        tokenizer,
        batch_tokens=batch_tokens,
        window_shards=settings.window_shards,
        layout=layout,
        save_record=lambda folder: _write_record(Path(folder), {**record, "layout": layout}),
    )
    notes = []
    if idle_devices:
        notes.append(f"{idle_devices} more GPUs are idle; torchrun --nproc_per_node N -m logitcache_train uses them")
    for role, cache in caches.items():
        if not cache.is_complete:
            notes.append(f"the {role} cache is unfinished: {len(cache)} of {cache.plan.num_samples} samples are there")
    _run(trainer, settings, checkpoint, notes)


def _ready_student(
    settings: TrainSettings, caches: Mapping[str, Cache], samples: CachedSamples
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Layout]:
    """The student on its device, checked, its tokenizer, and how its batches lie."""
    arguments = settings.arguments
    model, tokenizer = load_student(settings)
    vocab_size = check_student(model, tokenizer, caches, samples, name=settings.student)
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    layout = choose_layout(model.to(arguments.device), settings.packing, autocast=autocast)
    make_student(model, settings.objective, vocab_size=vocab_size)
    # The Trainer writes this into the config that is saved with the student; our forward pass asks for no cache itself.
    arguments.use_cache = bool(getattr(model.config, "use_cache", True))
    return model, tokenizer, layout


def checkpoint_to_resume(settings: TrainSettings) -> Path | None:
    """The checkpoint that the run goes on from; None for a new run.

    Raises:
        InputError: there is none where one was asked for, or there is one and nobody said what to do with it.
    """
    asked = str(settings.arguments.resume_from_checkpoint)
    last = get_last_checkpoint(settings.output) if settings.output.is_dir() else None
    if asked.lower() in ("none", "false"):
        if last is not None:
            raise InputError(
                f"{last} is there from an earlier run; go on from it with --resume_from_checkpoint true,"
                " or choose another folder with --output"
            )
        return None
    if asked.lower() == "true":
        if last is None:
            raise InputError(f"{settings.output} has no checkpoint to go on from; leave out --resume_from_checkpoint")
        return Path(last)
    if not (Path(asked) / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {asked}: no trainer_state.json there; name a folder checkpoint-N")
    return Path(asked)


def load_student(settings: TrainSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in training dtype on the CPU, and its tokenizer.

    Raises:
        InputError: no causal language model there, or an incomplete one.
    """
    path = settings.student
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise InputError(f"--student {path}: no such folder")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as e:
        raise InputError(f"cannot load a causal language model with its tokenizer from {path!r}: {e}") from e
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{path!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]!r}:"
            " they would be random; use the complete checkpoint of a causal language model"
        )
    return model, tokenizer


def check_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caches: Mapping[str, Cache],
    samples: CachedSamples,
    *,
    name: str,
) -> int:
    """V, the tokens that carry mass: the rows of the head that are tokens of every cache's vocabulary, too.

    Raises:
        InputError: a cache keeps more tokens than the student has, or a sample is longer than the student can read.
        MismatchError: another tokenizer, or a sample has a token that the student lacks.
    """
    found = tokenizer_identity(tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template)
    for cache in caches.values():
        check_same_tokenizer(found, cache.identity.tokenizer, student=name)
    check_head(model)
    head_rows: int = len(model.get_output_embeddings().weight)
    vocab_size = min(head_rows, *(cache.identity.vocab_size for cache in caches.values()))
    for role, cache in caches.items():
        if cache.identity.k > vocab_size:
            raise InputError(
                f"the {role} cache keeps k = {cache.identity.k} tokens, and {name} has a vocabulary of {vocab_size};"
                " build the cache with a smaller --k"
            )
    num_tokens: int = min(vocab_size, len(model.get_input_embeddings().weight))
    if max(tokenizer.get_vocab().values()) >= num_tokens:
        samples.check_token_ids(num_tokens, student=name)
    longest, limit = int(samples.num_tokens.max(initial=0)), _max_length(model)
    if limit is not None and longest > limit:
        raise InputError(
            f"the cache has samples of up to {longest} tokens, and {name} reads {limit} (max_position_embeddings);"
            f" build the cache with --max-length {limit}"
        )
    return vocab_size


def resolve_batch_tokens(settings: TrainSettings, samples: CachedSamples, checkpoint: Path | None) -> int:
    """Input tokens of a global batch: as asked, as in the checkpoint, or as many as the Trainer's batch size means.

    The last is per_device_train_batch_size * ranks * gradient_accumulation_steps samples of mean length.
    """
    if settings.batch_tokens is not None:
        return settings.batch_tokens
    if checkpoint is not None:
        return int(_read_record(checkpoint)["batch_tokens"])
    arguments = settings.arguments
    batch_size: int = (
        arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    )
    mean_length = float(samples.num_tokens.mean())
    return max(1, round(batch_size * mean_length))


def run_record(
    settings: TrainSettings, caches: Mapping[str, Cache], samples: CachedSamples, batch_tokens: int
) -> dict[str, Any]:
    """Everything that a run was made of, as JSON values; nothing secret."""
    arguments = settings.arguments
    return {
        "logitcache": _version(),
        "student": settings.student,
        "objective": {"name": settings.objective.name, **settings.objective.values},
        "batch_tokens": batch_tokens,
        "window_shards": settings.window_shards,
        "seed": arguments.seed if arguments.data_seed is None else arguments.data_seed,
        "samples": samples.order_fingerprint(),
        "dtype": settings.dtype,
        "attn_implementation": settings.attn_implementation,
        "world_size": arguments.world_size,
        "caches": {
            role: {"url": re.sub(r"//[^/@]*@", "//", cache.store.url), "identity": to_json(cache.identity)}
            for role, cache in caches.items()
        },
        "training_arguments": arguments.to_dict(),
    }


def check_same_run(record: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of a run with other batches or another objective.

    The number of ranks, the accumulation steps and the layout may differ: the global batches stay the same.

    Raises:
        MismatchError: names every entry that differs.
    """
    saved = _read_record(checkpoint)
    different = [
        f"{name}: {record[name]}, there {saved.get(name)}" for name in EXACT if record[name] != saved.get(name)
    ]
    if different:
        raise MismatchError(
            f"{checkpoint} belongs to another run ({'; '.join(different)}); use the settings of that run,"
            f" or begin a new one from its weights with --student {checkpoint} and another --output"
        )


def _run(trainer: CachedTargetTrainer, settings: TrainSettings, checkpoint: Path | None, notes: Sequence[str]) -> None:
    is_main = trainer.is_world_process_zero()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    done = 0 if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    # Every logging step has its line, which says all that the meter's own lines would.
    with progress("training", unit="steps", done=done, quiet=not is_main, every=math.inf) as meter:
        for note in notes:
            meter.note(note)
        trainer.add_callback(_Lines(meter))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(settings.output))
    trainer.save_state()
    if is_main:
        print(f"saved {settings.output} after {trainer.state.global_step} steps")
    # NCCL complains of a group that nobody destroys. Gloo's destructor, called now, can deadlock with its own threads:
    # it holds the interpreter's lock, for which a thread may wait to drop the last collective's tensors.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        torch.distributed.destroy_process_group()


class _Lines(TrainerCallback):  # type: ignore[misc]
    """Moves the meter, and gives every log of the Trainer a line."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.set_total(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        rate = logs.get("target_tokens_per_second", 0.0)
        left_out = ("epoch", "target_tokens_per_second")
        numbers = [f"{name} {value:.4g}" for name, value in logs.items() if name not in left_out]
        self._meter.note(
            f"step {state.global_step} of {state.max_steps}: {', '.join(numbers)}, {format_count(rate)} tok/s"
        )


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def _read_record(checkpoint: Path) -> dict[str, Any]:
    try:
        record = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{checkpoint / RECORD_NAME} cannot be read: {e}; only a checkpoint of 'logitcache train' can be resumed"
        ) from e
    if not isinstance(record, dict) or "batch_tokens" not in record:
        raise InputError(f"{checkpoint / RECORD_NAME} is no record of a run; resume from another checkpoint")
    return record


def _max_length(model: PreTrainedModel) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _version() -> str:
    try:
        return version("logitcache")
    except PackageNotFoundError:
        return "unknown"
