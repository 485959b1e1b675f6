"""Turns a causal language model into a student: given targets, its forward pass returns the fused loss.

Only the instance's `forward` is replaced. So DDP, FSDP, LoRA and activation checkpointing wrap it as they wrap any
model, and `save_pretrained` and `generate` do not notice. Without targets the original forward pass runs.

What differs between architectures is checked on random tokens before the first step, and a model that fails is
refused by name: that it is causal (so padding on the right needs no mask), that backbone and head together give its
own logits, and that a sample never attends to its neighbour in a batch.

Shapes: B samples, L tokens, N target positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from logitcache_storage.errors import InputError
from logitcache_train.collate import Layout, TrainingSample, collate
from logitcache_train.fused import fused_loss_and_metrics
from logitcache_train.head import Head
from logitcache_train.held_out import held_out_metrics
from logitcache_train.objectives import Objective

Packing = Literal["auto", "on", "off"]

CHECK_LENGTH = 16
CHECK_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Norm of the difference over the norm of the centred logits: what rounding in this dtype can explain in a deep model,
and far less than what a wrong head or a neighbour's token makes."""


@dataclass(frozen=True)
class HeadSettings:
    """What a head does besides h W^T + b: z = scale (h W^T + b), then softcap tanh(z / softcap) if there is a cap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadSettings:
        """From a model's config, under the names that architectures give these numbers."""

        def number(name: str, default: float) -> float:
            value = getattr(config, name, None)
            return float(value) if isinstance(value, int | float) else default

        # Cohere; Falcon-H1; Granite. Then Gemma, RecurrentGemma, xLSTM.
        scale = number("logit_scale", 1.0) * number("lm_head_multiplier", 1.0) / number("logits_scaling", 1.0)
        caps = (number(name, 0.0) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
        return cls(scale, max(caps) or None)


def make_student(model: Any, objective: Objective, *, vocab_size: int) -> None:
    """Replace the model's forward pass by one that takes `targets` (`collate.Targets`).

    With targets it returns `loss`, the sum over them divided by `targets.num_items`, and `metrics`: each metric of
    `logitcache_train.loss.target_metrics` summed over them; with `held_out=True`, too, those of
    `held_out.held_out_metrics`. Without targets the model's own forward pass runs.

    Args:
        model: a causal language model of transformers.
        objective: what to train for.
        vocab_size: V, tokens that carry mass: logits at or above it are left out.

    Raises:
        InputError: the output layer is no linear layer.
    """
    check_head(model)
    settings = HeadSettings.of(model.config.get_text_config())
    original = model.forward.__func__

    def forward(self: Any, *args: Any, targets: Any = None, held_out: bool = False, **inputs: Any) -> Any:
        if targets is None:
            return original(self, *args, **inputs)
        # Adapters hand on every argument of their own, given or not.
        inputs = {name: value for name, value in inputs.items() if value is not None}
        hidden_ND = gather_hidden(self, inputs, targets.rows_N)

        def observe(head: Head, products_nV: Tensor, rows: slice) -> dict[str, Tensor]:
            teacher = targets.cached.get("teacher")
            here = None if teacher is None else teacher[rows]
            return held_out_metrics(head, products_nV, targets.labels_N[rows], here)

        def loss_and_metrics(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> dict[str, Any]:
            loss, metrics = fused_loss_and_metrics(
                hidden_ND,
                weight_VD,
                targets.labels_N,
                objective,
                targets.cached,
                targets.columns,
                targets.num_items,
                bias=bias_V,
                logit_softcap=settings.softcap,
                logit_scale=settings.scale,
                vocab_size=vocab_size,
                observe=observe if held_out else None,
            )
            return {"loss": loss, "metrics": {name: values_N.sum() for name, values_N in metrics.items()}}

        return self.get_output_embeddings()(hidden_ND, loss_and_metrics)

    head = model.get_output_embeddings()
    head.forward = MethodType(_head_forward, head)
    # `generate` reads the signature. Not functools.wraps: accelerate unwraps along `__wrapped__`, past this function.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    # Bound to the instance by MethodType, so that a deep copy of the model is bound to the copy.
    model.forward = MethodType(forward, model)


def _head_forward(self: nn.Linear, hidden: Tensor, reduce: Callable[..., Any] | None = None) -> Any:
    """The linear layer, or whatever `reduce` makes of hidden states, weight and bias.

    The loss calls the head as a module, because hooks may have to bring its weight together first (FSDP's do).
    """
    if reduce is None:
        return nn.functional.linear(hidden, self.weight, self.bias)
    return reduce(hidden, self.weight, self.bias)


def check_head(model: Any) -> None:
    """Refuse a model whose logits are made in a way that the fused loss does not know.

    Raises:
        InputError: the output layer is no linear layer, or the model trains on a loss of its own besides.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{_name(model)} has an encoder besides its decoder; use a causal language model")
    head = model.get_output_embeddings()
    # Subclasses (quantised, LoRA) compute something else than h W^T + b from their `weight`.
    if type(head) is not nn.Linear:
        raise InputError(
            f"{_name(model)} has an output layer of {type(head).__module__}.{type(head).__name__}, expected a plain"
            " linear layer;"
            " use a causal language model whose head is neither quantised nor adapted"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            f"{_name(model)} adds a load-balancing loss of its routers (output_router_logits in its config), which"
            " would be lost; set output_router_logits to false in config.json to train without it"
        )


def gather_hidden(model: Any, inputs: dict[str, Tensor], rows_N: Tensor) -> Tensor:
    """Final hidden states at these rows of the flattened output of the backbone, [N, D]."""
    hidden_BLD: Tensor = model.base_model(**inputs, use_cache=False)[0]
    return hidden_BLD.flatten(0, 1).index_select(0, rows_N)


@torch.no_grad()
def choose_layout(model: Any, packing: Packing, *, autocast: torch.dtype | None = None) -> Layout:
    """How samples are laid out for this model; runs the checks of this file on random tokens, in eval mode.

    Args:
        model: a causal language model, before or after `make_student`.
        packing: `auto` packs for attention of variable length (flash attention) and pads elsewhere, because packing
            costs a [T, T] mask there; `on` packs if the check allows it; `off` pads.
        autocast: the dtype that training casts to, if it does.

    Raises:
        InputError: the model fails a check, or may not be packed though asked to.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            return _checked_layout(_Check(model, autocast or model.dtype), packing)
    finally:
        model.train(was_training)


def _checked_layout(check: _Check, packing: Packing) -> Layout:
    check.head_and_causality()
    attention = str(getattr(check.model.config, "_attn_implementation", None))
    if packing == "on" or (packing == "auto" and "flash" in attention):
        if check.keeps_apart("packed"):
            return "packed"
        if packing == "on":
            raise InputError(
                f"--packing on: {_name(check.model)} does not keep samples apart in a packed batch under the attention"
                f" {attention!r} (found on random tokens);"
                " use --packing off, or --attn_implementation flash_attention_2"
            )
    if not check.keeps_apart("padded"):
        raise check.refusal("a sample gives other logits in a padded batch than alone")
    return "padded"


class _Check:
    """Two random sequences, and the model's own logits for each alone."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self._settings = model, HeadSettings.of(model.config.get_text_config())
        self._tolerance = CHECK_TOLERANCE.get(dtype, CHECK_TOLERANCE[torch.bfloat16])
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = min(CHECK_LENGTH, (limit or CHECK_LENGTH + 1) - 1)
        tokens = np.random.default_rng(0).integers(len(model.get_input_embeddings().weight), size=(2, length))
        self._sequences = [tokens[0].astype(np.int32), tokens[1][: max(length // 2, 1)].astype(np.int32)]
        self._own = [self._logits_of(sequence) for sequence in self._sequences]

    def head_and_causality(self) -> None:
        """Refuse a model whose logits are no numbers, look ahead, or are not made from backbone and head as we do."""
        if not all(logits_LV.isfinite().all() for logits_LV in self._own):
            raise self.refusal("its logits are NaN or infinite, as of damaged weights")
        whole = self._sequences[0]
        half = whole[: max(len(whole) // 2, 1)]
        if not self._close(self._logits_of(half), self._own[0][: len(half)]):
            raise self.refusal("it is not causal: the logits at a token depend on later tokens")
        if not self._close(self._from_hidden([whole], "padded"), self._own[0]):
            raise self.refusal("its head is more than a linear layer with the soft-cap and scale of its config")

    def keeps_apart(self, layout: Layout) -> bool:
        """Whether both sequences in one batch give the logits that they give alone."""
        if layout == "packed" and "position_ids" not in inspect.signature(self.model.base_model.forward).parameters:
            return False
        # The longer first and last: a neighbour before a sequence and one behind it may both leak.
        orders = ((0, 1), (1, 0))
        return all(
            self._close(
                self._from_hidden([self._sequences[i] for i in order], layout), torch.cat([self._own[i] for i in order])
            )
            for order in orders
        )

    def refusal(self, reason: str) -> InputError:
        return InputError(
            f"{_name(self.model)} cannot be a student: {reason} (found on random tokens);"
            " use a causal language model of another architecture"
        )

    def _logits_of(self, sequence: npt.NDArray[np.int32]) -> Tensor:
        ids_1L = torch.from_numpy(sequence.astype(np.int64))[None].to(self.model.device)
        logits_1LV: Tensor = self.model(input_ids=ids_1L, use_cache=False).logits
        return logits_1LV[0].float()

    def _from_hidden(self, sequences: Sequence[npt.NDArray[np.int32]], layout: Layout) -> Tensor:
        """Logits at every position, from the very batch and the very rows that training takes."""
        # A row predicts the token behind it, so each sequence gets one more, which nothing attends to.
        longer = [np.append(sequence, np.int32(0)) for sequence in sequences]
        samples = [TrainingSample("", ids, np.arange(1, len(ids), dtype=np.int32)) for ids in longer]
        inputs = collate(samples, num_items=1, layout=layout)
        targets = inputs.pop("targets").to(self.model.device)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        hidden_ND = gather_hidden(self.model, inputs, targets.rows_N)
        logits_NV: Tensor = self._settings.scale * self.model.get_output_embeddings()(hidden_ND).float()
        cap = self._settings.softcap
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        centred = expected - expected.mean(-1, keepdim=True)
        same_shape = found.shape == expected.shape
        return same_shape and bool((found - expected).norm() <= self._tolerance * centred.norm())


def _name(model: Any) -> str:
    return f"{model.config.name_or_path or 'the model'} ({type(model).__name__})"
