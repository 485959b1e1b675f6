"""Train a student from cached teacher log-probs, with the target distribution of your choice.

Importing this package is light; the losses bring torch with them when they are first used.
"""

from typing import TYPE_CHECKING, Any

from logitcache_train.objectives import OBJECTIVES, Objective, Parameter, objective

if TYPE_CHECKING:
    from logitcache_train.atoms import CachedTopK
    from logitcache_train.custom import objective_from_mapping
    from logitcache_train.fused import fused_target_loss
    from logitcache_train.loss import target_loss
    from logitcache_train.mixture import CachedMixture

__all__ = [
    "OBJECTIVES",
    "CachedMixture",
    "CachedTopK",
    "Objective",
    "Parameter",
    "fused_target_loss",
    "objective",
    "objective_from_mapping",
    "target_loss",
]

_LAZY = {
    "CachedMixture": "mixture",
    "CachedTopK": "atoms",
    "fused_target_loss": "fused",
    "objective_from_mapping": "custom",
    "target_loss": "loss",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
