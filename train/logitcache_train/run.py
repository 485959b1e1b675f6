"""One training run from settings to a saved student: load, check, train, save."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from logitcache_storage.cache import Cache
from logitcache_storage.disk_cache import DiskCache
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.progress import Meter, progress
from logitcache_storage.terminal import format_count
from logitcache_train.collate import Layout
from logitcache_train.columns import ColumnFiles
from logitcache_train.data import CachedSamples
from logitcache_train.held_out import HELD_OUT_METRICS
from logitcache_train.joining import check_same_tokenizers
from logitcache_train.loading import check_student, load_student
from logitcache_train.lora import add_adapters
from logitcache_train.record import check_same_run, checkpoint_to_resume, read_record, run_record, write_record
from logitcache_train.settings import DEFAULT_LOCAL_CACHE_BYTES, TrainSettings
from logitcache_train.student import choose_layout, make_student
from logitcache_train.trainer import CachedTargetTrainer
from logitcache_train.unfinished import Caches, agreed, check_finished


@dataclass(frozen=True, eq=False)
class _Data:
    """What a run reads."""

    caches: Caches
    eval_caches: Caches
    samples: CachedSamples
    held_out: CachedSamples | None


def train(settings: TrainSettings) -> None:
    """Train a student and save it, with its tokenizer, as an ordinary checkpoint in `settings.output`.

    With `settings.lora` the checkpoint holds the adapters.

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
    data = _open_data(settings, checkpoint)
    _check_output(settings.output)
    model, tokenizer, layout = _ready_student(settings, data)
    batch_tokens = resolve_batch_tokens(settings, data.samples, checkpoint)
    record = run_record(settings, data.caches, data.eval_caches, data.samples, batch_tokens)
    if checkpoint is not None:
        check_same_run(record, checkpoint)
    try:
        trainer = CachedTargetTrainer(
            model,
            arguments,
            data.samples,
            tokenizer,
            held_out=data.held_out,
            batch_tokens=batch_tokens,
            window_shards=settings.window_shards,
            layout=layout,
            mixing=settings.mixing,
            save_record=lambda folder: write_record(Path(folder), {**record, "layout": layout}),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"the Trainer cannot work with these arguments: {e}") from e
    notes = [] if checkpoint is None else [f"on from {checkpoint}"]
    notes += _notes(settings, data)
    if idle_devices:
        notes.append(f"{idle_devices} more GPUs are idle; torchrun --nproc_per_node N -m logitcache_train uses them")
    _run(trainer, settings, checkpoint, notes)


def resolve_batch_tokens(settings: TrainSettings, samples: CachedSamples, checkpoint: Path | None) -> int:
    """Input tokens of a global batch: as asked, as in the checkpoint, or as many as the Trainer's batch size means.

    The last is per_device_train_batch_size * ranks * gradient_accumulation_steps samples of mean length.
    """
    if settings.batch_tokens is not None:
        return settings.batch_tokens
    if checkpoint is not None:
        return int(read_record(checkpoint)["batch_tokens"])
    arguments = settings.arguments
    batch_size: int = (
        arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    )
    mean_length = float(samples.num_tokens.mean())
    return max(1, round(batch_size * mean_length))


def _open_data(settings: TrainSettings, checkpoint: Path | None) -> _Data:
    disk = None
    if settings.local_cache is not None:
        disk = DiskCache(settings.local_cache, settings.local_cache_bytes or DEFAULT_LOCAL_CACHE_BYTES)

    def opened(urls: Mapping[str, Sequence[str]]) -> Caches:
        return {
            role: [Cache.open(url, settings.storage_options, disk_cache=disk) for url in several]
            for role, several in urls.items()
        }

    caches, eval_caches = opened(settings.caches), opened(settings.eval_caches)
    if settings.allow_partial:
        caches = agreed(caches, None if checkpoint is None else read_record(checkpoint))
        eval_caches = agreed(eval_caches, None)
    else:
        check_finished(caches)
        check_finished(eval_caches)
    check_same_tokenizers([cache for each in (caches, eval_caches) for several in each.values() for cache in several])
    columns = ColumnFiles(settings.columns, settings.storage_options)
    samples = CachedSamples(
        caches,
        settings.objective,
        window_shards=settings.window_shards,
        missing=settings.missing,
        columns=columns,
    )
    held_out = None
    if eval_caches:
        held_out = CachedSamples(
            eval_caches,
            settings.objective,
            # They are read from the first shard to the last.
            window_shards=1,
            missing=settings.missing,
            also=("teacher",),
            option="--eval_cache",
            columns=columns,
        )
    return _Data(caches, eval_caches, samples, held_out)


def _check_output(folder: Path) -> None:
    """Before the student is loaded and trained, that it can be saved; a refused run leaves no folder behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--output {folder}: {there} is no folder that can be written; give another one")


def _ready_student(settings: TrainSettings, data: _Data) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Layout]:
    """The student, checked, its tokenizer, and how its batches lie."""
    arguments = settings.arguments
    model, tokenizer = load_student(settings)
    seen = [data.samples] if data.held_out is None else [data.samples, data.held_out]
    vocab_size = check_student(model, tokenizer, data.caches, seen, name=settings.student)
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    # FSDP takes what it shards from the host, where a student may be larger than a GPU; flash attention needs the GPU.
    if not arguments.fsdp or "flash" in str(model.config._attn_implementation):
        model.to(arguments.device)
    layout = choose_layout(model, settings.packing, autocast=autocast)
    make_student(model, settings.objective, vocab_size=vocab_size)
    # The Trainer writes this into the config that is saved with the student; our forward pass asks for no cache itself.
    arguments.use_cache = bool(getattr(model.config, "use_cache", True))
    if settings.lora is not None:
        # The same adapters on every rank.
        set_seed(arguments.seed)
        model = add_adapters(model, settings.lora, student=settings.student)
    return model, tokenizer, layout


def _notes(settings: TrainSettings, data: _Data) -> list[str]:
    """What a user should know of the data before it is trained on."""
    notes = []
    for role, several in data.caches.items():
        for cache in several:
            if not cache.is_complete:
                there = f"{len(cache)} of {cache.plan.num_samples} samples are there"
                notes.append(f"the {role} cache is unfinished: {there}")
            elif len(cache) < cache.plan.num_samples:
                lost = cache.plan.num_samples - len(cache)
                notes.append(f"the {role} cache lacks {lost:,} samples that could not be scored: 'logitcache status'")
            if cache.identity.role != role:
                notes.append(f"{cache.store.url} was built as {cache.identity.role}, and is read as {role} here")
        if role not in data.samples.roles:
            notes.append(f"objective {settings.objective.name!r} reads no distribution of the {role} cache")
    for what, samples in (("samples", data.samples), ("held-out samples", data.held_out)):
        if samples is not None and samples.lacking:
            lacking = ", ".join(f"{url} lacks {count:,}" for url, count in samples.lacking.items())
            dropped = len(samples.primary) - len(samples)
            notes.append(f"{dropped:,} of {len(samples.primary):,} {what} are left out: {lacking}")
    return notes


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
        with _errors_as_raised():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(settings.output))
    trainer.save_state()
    if is_main:
        print(f"saved {settings.output} after {trainer.state.global_step} steps")
    # NCCL complains of a group that nobody destroys. Gloo's destructor, called now, can deadlock with its own threads:
    # it holds the interpreter's lock, for which a thread may wait to drop the last collective's tensors.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        torch.distributed.destroy_process_group()


@contextmanager
def _errors_as_raised() -> Iterator[None]:
    """Of loader workers; a DataLoader puts a worker's whole traceback into the message."""
    try:
        yield
    except LogitCacheError as e:
        _, found, message = str(e).rpartition(f"\n{type(e).__module__}.{type(e).__qualname__}: ")
        if not found:
            raise
        raise type(e)(message.rstrip()) from e


class _Lines(TrainerCallback):  # type: ignore[misc]
    """Moves the meter, and gives every log and every evaluation of the Trainer a line."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.set_total(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.advance()
        # A run shorter than --logging_steps has its line, too.
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        rate = logs.get("target_tokens_per_second", 0.0)
        left_out = ("epoch", "target_tokens_per_second")
        numbers = [f"{name} {value:.4g}" for name, value in logs.items() if name not in left_out]
        self._meter.note(
            f"step {state.global_step} of {state.max_steps}: {', '.join(numbers)}, {format_count(rate)} tok/s"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        found = {name: metrics[f"eval_{name}"] for name in HELD_OUT_METRICS if f"eval_{name}" in metrics}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self._meter.note(f"held-out after step {state.global_step}: {numbers}")
