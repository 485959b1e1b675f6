"""The passes as Triton kernels: one over tiles of the vocabulary for the sums, one for the gradient.

The chunk stays in the dtype of the products and each pass reads it once; logits exist in float32 in registers only.
A token of S is one whose product is -inf.

Shapes: n rows of a chunk, b of them at a time, S slots of the support, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from logitcache_train.atoms import Support
from logitcache_train.head import Head
from logitcache_train.kernels.tail import DenseAtoms, TailFactors, TailSums, largest

TILE = 4096
"""Tokens per step of a program."""
NUM_WARPS = 8
LARGEST_ROWS = 256
"""Rows that `largest` widens to float32 at a time."""


@dataclass(frozen=True, eq=False)
class TritonTail:
    """See `tail.TailPasses`."""

    head: Head
    atoms: DenseAtoms

    @property
    def work_bytes(self) -> int:
        """None: a tile lives in registers."""
        return 0

    def reduce(self, z_nV: Tensor, support: Support) -> TailSums:
        """The sums of `tail.TailSums`; sets the chunk to -inf on S."""
        z_nV.scatter_(1, support.ids_NS, -torch.inf)
        num_rows, num_tokens = z_nV.shape
        sums_6n = torch.empty(6, num_rows, dtype=torch.float32, device=z_nV.device)
        if num_rows > 0:
            _reduce_kernel[(num_rows,)](
                z_nV, self.head.bias_V, sums_6n, num_rows, num_tokens, z_nV.stride(0), **self._constants
            )
        max_n, exp_n, count_n, z_n, sharp_n, sharp_z_n = sums_6n
        # A product of -inf that is not of S: its mean logit is -inf, which the kernel takes for a token of S.
        lost_n = count_n < num_tokens - support.is_outcome_NS.sum(-1)
        uniform, sharpened = self.atoms.uniform, self.atoms.beta is not None
        return TailSums(
            max_n,
            exp_n,
            z_n.masked_fill(lost_n, -torch.inf) if uniform else None,
            sharp_n if sharpened else None,
            sharp_z_n if sharpened else None,
        )

    def largest(self, z_nV: Tensor, support: Support, k: int) -> Tensor:
        """The min(k, V) largest logits outside S."""
        return torch.cat([self._largest(z_bV, k) for z_bV in torch.split(z_nV, LARGEST_ROWS)])

    def write_gradient(self, z_nV: Tensor, support: Support, sums: TailSums, factors: TailFactors) -> None:
        """Overwrite the chunk by the gradient outside S, and by 0 on S."""
        num_rows, num_tokens = z_nV.shape
        if num_rows > 0:
            _gradient_kernel[(num_rows, triton.cdiv(num_tokens, TILE))](
                z_nV,
                self.head.bias_V,
                sums.max_n,
                factors.exp_n,
                factors.uniform_n,
                factors.sharp_n,
                num_tokens,
                z_nV.stride(0),
                **self._constants,
            )

    def _largest(self, products_bV: Tensor, k: int) -> Tensor:
        z_bV = self.head.finish_logits(products_bV.to(torch.float32, copy=True))
        return largest(z_bV.masked_fill_(products_bV == -torch.inf, -torch.inf), k)

    @property
    def _constants(self) -> dict[str, Any]:
        return {
            "SCALE": self.head.scale,
            "SOFTCAP": self.head.softcap,
            "UNIFORM": self.atoms.uniform,
            "BETA": self.atoms.beta,
            "TILE": TILE,
            "num_warps": NUM_WARPS,
        }


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # 1 - 2 / (e^2x + 1) cancels near 0, where the series has all its digits: the next term is below 1e-8 of the sum.
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit  # type: ignore[untyped-decorator]
def _logits(  # type: ignore[no-untyped-def]
    row_ptr, bias_ptr, columns, num_tokens, SCALE: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Logits of a tile, what the cap's tanh gave, and which tokens are outside S; -inf elsewhere."""
    inside = columns < num_tokens
    product = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    outside = product != float("-inf")
    z = product
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    z *= SCALE
    tanh = z
    if SOFTCAP is not None:
        tanh = _tanh(z / SOFTCAP)
        z = SOFTCAP * tanh
    return tl.where(outside, z, float("-inf")), tanh, outside


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    bias_ptr,
    sums_ptr,
    num_rows,
    num_tokens,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIFORM: tl.constexpr,
    BETA: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: its sums relative to the largest logit so far, moved whenever a tile has a larger one."""
    row = tl.program_id(0).to(tl.int64)
    largest_z = float("-inf")
    exp_sum, count, z_sum, sharp_sum, sharp_z_sum = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, num_tokens, TILE):
        columns = start + tl.arange(0, TILE)
        z, _, outside = _logits(z_ptr + row * stride, bias_ptr, columns, num_tokens, SCALE, SOFTCAP)
        new_largest = tl.maximum(largest_z, tl.max(z, axis=0))
        # Nothing seen yet: sums are 0, and may be moved by any finite number.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        move = tl.where(largest_z == float("-inf"), 0.0, largest_z - reference)
        u = z - reference
        exp_sum = exp_sum * tl.exp(move) + tl.sum(tl.exp(u), axis=0)
        finite_u = tl.where(outside, u, 0.0)
        if BETA is not None:
            sharp = tl.exp(u / BETA)
            decay = tl.exp(move / BETA)
            sharp_z_sum = (sharp_z_sum + sharp_sum * move) * decay + tl.sum(sharp * finite_u, axis=0)
            sharp_sum = sharp_sum * decay + tl.sum(sharp, axis=0)
        if UNIFORM:
            z_sum += count * move + tl.sum(finite_u, axis=0)
            count += tl.sum(outside.to(tl.float32), axis=0)
        largest_z = new_largest
    sums_ptr += row
    tl.store(sums_ptr, largest_z)
    tl.store(sums_ptr + num_rows, exp_sum)
    tl.store(sums_ptr + 2 * num_rows, count)
    tl.store(sums_ptr + 3 * num_rows, z_sum)
    tl.store(sums_ptr + 4 * num_rows, sharp_sum)
    tl.store(sums_ptr + 5 * num_rows, sharp_z_sum)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    bias_ptr,
    max_ptr,
    exp_ptr,
    uniform_ptr,
    sharp_ptr,
    num_tokens,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIFORM: tl.constexpr,
    BETA: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    z, tanh, outside = _logits(row_ptr, bias_ptr, columns, num_tokens, SCALE, SOFTCAP)
    u = z - tl.load(max_ptr + row)
    g = tl.load(exp_ptr + row) * tl.exp(u)
    if BETA is not None:
        g -= tl.load(sharp_ptr + row) * tl.exp(u / BETA)
    if UNIFORM:
        g -= tl.load(uniform_ptr + row)
    if SOFTCAP is not None:
        g *= 1 - tanh * tanh
    g = tl.where(outside, g * SCALE, 0.0)
    tl.store(row_ptr + columns, g.to(z_ptr.dtype.element_ty), mask=columns < num_tokens)
