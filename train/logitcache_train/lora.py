"""Low-rank adapters on a frozen student, by peft (LoRA: Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache_storage.errors import InputError

ALL_LINEAR = "all-linear"
"""Every linear layer but the output layer."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter."""


@dataclass(frozen=True)
class LoraSettings:
    """Adapters B A alpha / rank, added to the weights of some layers; only they are trained."""

    rank: int
    alpha: float | None = None
    """None: twice the rank."""
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear`, or ends of the names of layers."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"--lora_rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"--lora_alpha must be > 0, got {self.alpha:g}; it is what B A / rank is multiplied with")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--lora_dropout must be in [0, 1), got {self.dropout:g}")
        if not self.targets or (not isinstance(self.targets, str) and "" in self.targets):
            raise InputError(f"--lora_targets: name {ALL_LINEAR} or layers, as in q_proj,v_proj")


def add_adapters(model: Any, settings: LoraSettings, *, student: str) -> Any:
    """The model with new adapters, which change nothing before they are trained, and all else frozen.

    Every rank must call this with the same random state.

    Args:
        model: a causal language model; its layers are replaced.
        settings: which adapters.
        student: folder or hub id of the model; the saved adapters name it as their base.

    Raises:
        InputError: the targets name no layer of the model, or its output layer.
    """
    import peft

    _check_targets(model, settings.targets)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
    )
    try:
        with quiet_peft():
            adapted = peft.get_peft_model(model, config)
    except ValueError as e:
        raise InputError(f"--lora_targets: peft cannot adapt {type(model).__name__}: {e}") from e
    # So that the adapters find their base from any working directory.
    base = Path(student).expanduser()
    adapted.peft_config["default"].base_model_name_or_path = str(base.resolve()) if base.is_dir() else student
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning of an attribute that peft, and no user, asks transformers for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def _check_targets(model: Any, targets: str | Sequence[str]) -> None:
    if isinstance(targets, str):
        return
    modules = dict(model.named_modules())
    head = next(name for name, module in modules.items() if module is model.get_output_embeddings())
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if head in found:
            raise InputError(f"--lora_targets names {head}, the output layer, which the fused loss needs as it is")
        if not found:
            linear = {n.rsplit(".", 1)[-1] for n, module in modules.items() if hasattr(module, "in_features")}
            there = ", ".join(sorted(linear - {head.rsplit(".", 1)[-1]}))
            raise InputError(f"--lora_targets: the student has no layer {target!r}; its linear layers: {there}")
