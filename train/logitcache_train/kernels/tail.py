"""What the fused loss asks of a pass over the vocabulary, and the choice of who does it.

For a row with the support S, and everything outside S relative to the largest logit there, u_a = z_a - max:

    exp_n     = sum_a exp(u_a)             z_n       = sum_a u_a                  for `uniform`
    sharp_n   = sum_a exp(u_a / beta)      sharp_z_n = sum_a u_a exp(u_a / beta)  for `sharpened`

These are all that the loss needs to know of the tail. Then its gradient has three numbers per row,

    g_a = exp_n' exp(u_a) - uniform_n' - sharp_n' exp(u_a / beta)      a outside S

times the derivative of the soft cap and the scale. A tail has its own maximum, so sums are at least 1 where there is
a tail, however unlikely it is against S.

Shapes: n rows of a chunk, S slots of the support, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from logitcache_train.atoms import Support
from logitcache_train.head import Head

LARGEST_TILE = 128
"""Tokens of which the largest logit is found before tiles compete: a topk over all of V costs six times as much."""

NO_TRITON = "triton is not installed: the fused loss runs without its GPU kernels, more slowly; pip install triton"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TailSums:
    """The sums above, [n] each, 0 where there is no tail; those of atoms that nobody uses are None."""

    max_n: Tensor
    """The largest logit outside S, -inf where there is none."""
    exp_n: Tensor
    z_n: Tensor | None
    sharp_n: Tensor | None
    sharp_z_n: Tensor | None


@dataclass(frozen=True, eq=False)
class TailFactors:
    """The factors of the gradient above, [n] each; None for atoms that nobody uses."""

    exp_n: Tensor
    uniform_n: Tensor | None
    sharp_n: Tensor | None


@dataclass(frozen=True, eq=False)
class DenseAtoms:
    """Which of the atoms that reach over the whole vocabulary are used."""

    uniform: bool
    beta: float | None
    """The temperature of `sharpened`, None where it is not used."""


class TailPasses(Protocol):
    """The passes over a chunk `z_nV` of products h W^T, in any float dtype; arithmetic is in float32 or wider."""

    @property
    def work_bytes(self) -> int:
        """Bytes of work space that are held besides the chunk."""

    def reduce(self, z_nV: Tensor, support: Support) -> TailSums:
        """The sums; may set the chunk to -inf on S, and changes nothing else."""

    def largest(self, z_nV: Tensor, support: Support, k: int) -> Tensor:
        """The min(k, V) largest logits of each row outside S, padded by -inf; after `reduce`."""

    def write_gradient(self, z_nV: Tensor, support: Support, sums: TailSums, factors: TailFactors) -> None:
        """Overwrite the chunk by the gradient at h W^T + b; what is left on S has no meaning."""


def choose_passes(head: Head, atoms: DenseAtoms, max_rows: int) -> TailPasses:
    """Triton's for a head on CUDA in float32 or narrower where it is installed, else torch's.

    Args:
        head: the head.
        atoms: which sums and factors are needed.
        max_rows: rows of the largest chunk.
    """
    weight_VD = head.weight_VD
    if weight_VD.is_cuda and weight_VD.dtype != torch.float64 and _has_triton():
        from logitcache_train.kernels.triton_tail import TritonTail

        return TritonTail(head, atoms)
    from logitcache_train.kernels.eager import EagerTail

    return EagerTail.allocate(head, atoms, max_rows)


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning(NO_TRITON)
    return found


def largest(z_nV: Tensor, k: int) -> Tensor:
    """The min(k, V) largest values of each row, in descending order.

    Tiles compete by their largest value: k of them hold the k largest of the row.
    """
    k, num_tiles = min(k, z_nV.shape[1]), z_nV.shape[1] // LARGEST_TILE
    if num_tiles <= k:
        return z_nV.topk(k).values
    whole = num_tiles * LARGEST_TILE
    tiles_ntT = z_nV[:, :whole].reshape(-1, num_tiles, LARGEST_TILE)
    best_nk1 = tiles_ntT.amax(-1).topk(k).indices[:, :, None]
    candidates = tiles_ntT.gather(1, best_nk1.expand(-1, -1, LARGEST_TILE)).flatten(1)
    return torch.cat([candidates, z_nV[:, whole:]], dim=1).topk(k).values
