"""transformers' Trainer with cached targets: its loop, checkpoints, DDP and logging, our batches, loss and metrics.

What is not the Trainer's own:
- the train loader is made here, aware of its rank, and never prepared by accelerate, whose dispatch and sharding
  assume batches of equal shape;
- the loss is the sum over a micro-batch divided by the target tokens of the whole global batch, which the pure order
  knows without communication; so it is neither averaged over accumulation steps nor over ranks;
- skipping to a step skips global batches, not data, so the Trainer's own resume is exact;
- evaluation sums over every target of the held-out caches, on all ranks, and divides once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_train.collate import EQUALLY, Layout, Mixing, collate
from logitcache_train.data import CachedSamples, EpochLoader, GlobalBatchSampler, MicroBatch
from logitcache_train.held_out import HELD_OUT_METRICS, HeldOutSampler
from logitcache_train.positions import BadRowsError
from logitcache_train.shipping import ship

LOGGED_METRICS = ("p_label", "gamma", "teacher_tail", "target_entropy")
"""Logged as means over target tokens since the last log, beside the Trainer's own loss and gradient norm."""


class CachedTargetTrainer(Trainer):  # type: ignore[misc]
    """Trains a student made by `student.make_student` on the samples of a cache."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        samples: CachedSamples,
        tokenizer: PreTrainedTokenizerBase,
        *,
        held_out: CachedSamples | None = None,
        batch_tokens: int,
        window_shards: int,
        layout: Layout,
        mixing: Mixing = EQUALLY,
        save_record: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        """As Trainer, and:

        Args:
            model: a student.
            args: the Trainer's arguments.
            samples: what to train on.
            tokenizer: saved with every checkpoint.
            held_out: what to evaluate on.
            batch_tokens: input tokens of a global batch, over all ranks and accumulation steps.
            window_shards: shards of a shuffle window.
            layout: how micro-batches lie in the input, from `student.choose_layout`.
            mixing: of several teachers.
            save_record: called with the folder of every checkpoint, on the process that saves.
            kwargs: handed to Trainer.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples,
            eval_dataset=held_out,
            processing_class=tokenizer,
            **kwargs,
        )
        self._check_parallelism()
        self._samples = samples
        self._collate = partial(_collate, layout=layout, mixing=mixing)
        self._save_record = save_record
        self._sampler = GlobalBatchSampler(
            samples,
            batch_tokens=batch_tokens,
            window_shards=window_shards,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            accumulation_steps=args.gradient_accumulation_steps,
        )
        self._sums = _Sums()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches; not to be prepared by accelerate."""
        return self._loader(self._samples, self._sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This rank's part of the held-out samples; not to be prepared by accelerate."""
        samples: CachedSamples = self.eval_dataset if eval_dataset is None else eval_dataset
        sampler = HeldOutSampler(
            samples,
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return self._loader(samples, sampler)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Means over all held-out targets of all ranks, of `held_out.HELD_OUT_METRICS`."""
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums: dict[str, list[Tensor]] = {}
        num_targets, start = 0, time.perf_counter()
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs in map(self._prepare_inputs, dataloader):
                for name, total in self._forward(model, inputs, held_out=True)["metrics"].items():
                    if name in HELD_OUT_METRICS:
                        sums.setdefault(name, []).append(total)
                num_targets += len(inputs["targets"].labels_N)
        # In float64, so that neither the number of ranks nor that of targets shows in the last digits of a mean.
        ours = [*(sum(torch.stack(totals).tolist()) for totals in sums.values()), float(num_targets)]
        *totals, count = (sum(column) for column in zip(*gather_object([ours]), strict=True))
        self._sums.leave_out(time.perf_counter() - start)
        metrics = {f"{metric_key_prefix}_{name}": total / count for name, total in zip(sums, totals, strict=True)}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The micro-batch's share of the mean over the global batch's target tokens."""
        outputs = self._forward(model, inputs)
        self._sums.add(outputs["metrics"], len(inputs["targets"].labels_N))
        # DDP and FSDP average gradients over ranks, and the Trainer averages the logged loss over them.
        loss: Tensor = outputs["loss"] * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add our metrics to the Trainer's; called on all ranks."""
        if "loss" in logs:
            logs.update(self._sums.means(self.accelerator.reduce))
            self._sums = _Sums()
        super().log(logs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer, with the record of the run beside the weights.

        Raises:
            LogitCacheError: the last step has ruined the weights; checkpoints saved before are whole.
        """
        self._check_weights()
        super().save_model(*args, **kwargs)
        if self.args.should_save:
            self._save_record(str(args[0] if args else kwargs.get("output_dir") or self.args.output_dir))

    def _check_weights(self) -> None:
        """Of a step behind which nothing is saved, the loss of the next one would say it."""
        for name, parameter in self.model.named_parameters():
            # Of a sharded parameter, this rank's part.
            part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not torch.isfinite(part).all():
                raise LogitCacheError(
                    f"the student is of no use, and is not saved: {name} holds NaN or infinite values after step"
                    f" {self.state.global_step}; try a lower learning rate or a wider dtype"
                )

    def _check_parallelism(self) -> None:
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1 or self.is_deepspeed_enabled:
            raise InputError(
                "tensor, context and sequence parallelism and DeepSpeed cut a batch in ways that cached targets do not"
                " follow; use DDP (torchrun) or --fsdp"
            )
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise InputError("--fsdp: accelerate shards models on GPUs only, and would use DDP here; leave it out")
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if getattr(plugin, "mixed_precision_policy", None) is not None and plugin.fsdp_version == 2:
            # Or the loss and the sums of metrics would be rounded to the narrow dtype.
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    def _loader(self, samples: CachedSamples, sampler: Sampler[Any]) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return EpochLoader(
            samples,
            batch_sampler=sampler,
            collate_fn=self._collate,
            # Not the global one, from which every iterator would draw: an evaluation must not change the training.
            generator=torch.Generator(),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """The student's outputs; rows that cannot be trained on are named by their samples."""
        try:
            return model(**inputs, **kwargs)
        except BadRowsError as e:
            keys = ", ".join(inputs["targets"].keys_of(e.rows[:8]))
            step = self.state.global_step
            where = f"step {step + 1}" if model.training else f"evaluation after step {step}"
            raise LogitCacheError(f"{where}, samples {keys}: {e}") from e

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        tensors = {name: value for name, value in inputs.items() if name != "targets"}
        pinned = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        targets = inputs["targets"].to(self.args.device, non_blocking=pinned)
        return {**super()._prepare_inputs(tensors), "targets": targets}


class _Sums:
    """Sums of metrics over this rank's target tokens since they were last asked for; stays on the device till then."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, sums: Mapping[str, Tensor], count: int) -> None:
        if not self._sums:
            self._sums = {name: sums[name].float() for name in LOGGED_METRICS if name in sums}
        else:
            self._sums = {name: total + sums[name] for name, total in self._sums.items()}
        self._count += count

    def leave_out(self, seconds: float) -> None:
        """Of the time that counts: an evaluation took it."""
        self._start += seconds

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the target tokens of all ranks, and how many of those there were per second; one reduction."""
        seconds = time.perf_counter() - self._start
        some = next(iter(self._sums.values()))
        values = torch.stack([*self._sums.values(), some.new_tensor(float(self._count))])
        *sums, count = reduce(values).tolist()
        means = {name: total / max(count, 1) for name, total in zip(self._sums, sums, strict=True)}
        return {**means, "target_tokens_per_second": count / max(seconds, 1e-9)}


def _collate(micro: MicroBatch, *, layout: Layout, mixing: Mixing) -> Any:
    return ship(collate(micro.samples, num_items=micro.num_items, layout=layout, mixing=mixing))
