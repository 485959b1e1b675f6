"""The head of a language model: logits from hidden states, and the gradients that flow back through it.

Shapes: N target positions, n of a chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WEIGHT_TILE = 8192
"""Rows of dW that are widened to float32 at a time, where the products are narrower than that."""


@dataclass(frozen=True, eq=False)
class Head:
    """z = scale (h W^T + b), then softcap tanh(z / softcap) if there is a cap."""

    weight_VD: Tensor
    """In the dtype of the products."""
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def finish_logits(self, products_nV: Tensor, ids_nS: Tensor | None = None) -> Tensor:
        """Make logits of products h W^T, in place; of the products at `ids_nS` only, [n, S], where these are given."""
        z = products_nV
        if self.bias_V is not None:
            z.add_(self.bias_V if ids_nS is None else self.bias_V[ids_nS])
        if self.scale != 1:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z_nV: Tensor, out: Tensor | None = None) -> Tensor:
        """The derivative of the cap where it gave the logits `z_nV`: 1 - tanh^2."""
        assert self.softcap is not None
        return torch.div(z_nV, self.softcap, out=out).square_().neg_().add_(1)


@dataclass(frozen=True, eq=False)
class HeadGradients:
    """Sums over chunks in the wide dtype; None where nobody asks for them."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, sources: tuple[Tensor | None, ...], dtype: torch.dtype) -> HeadGradients:
        """Zeros for each of hidden states, weight and bias that requires a gradient."""
        wanted = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in sources)
        zeros = (
            torch.zeros_like(t, dtype=dtype, requires_grad=False) if t is not None and want else None
            for t, want in zip(sources, wanted, strict=True)
        )
        return cls(*zeros)

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three in order."""
        return self.hidden_ND, self.weight_VD, self.bias_V

    @property
    def wanted(self) -> bool:
        """Whether there is any to add to."""
        return any(t is not None for t in self.tensors)

    def add(self, rows: slice, g_nV: Tensor, hidden_nD: Tensor, head: Head) -> None:
        """Add a chunk's share, dh = g W, dW += g^T h and db += sum g, from the gradient at h W^T + b."""
        num_tokens = len(head.weight_VD)
        if self.bias_V is not None:
            self.bias_V[:num_tokens] += g_nV.sum(0, dtype=self.bias_V.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = g_nV @ head.weight_VD
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == g_nV.dtype:
            self.weight_VD[:num_tokens].addmm_(g_nV.T, hidden_nD)
            return
        for tokens in (slice(i, i + WEIGHT_TILE) for i in range(0, num_tokens, WEIGHT_TILE)):
            self.weight_VD[:num_tokens][tokens] += g_nV[:, tokens].T @ hidden_nD


class Precomputed(torch.autograd.Function):
    """A loss, summed, whose gradients are known but for the divisor and the factor that comes from above."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, divisor: float | Tensor, *tensors: Tensor | None) -> Tensor:
        """Divide; `tensors` are the three sources and the gradients of each."""
        sources, gradients = tensors[:3], tensors[3:]
        ctx.divisor = divisor
        ctx.dtypes = [None if t is None else t.dtype for t in sources]
        ctx.save_for_backward(*gradients)
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Scale the gradients in place: a second dW would be the largest tensor of the step."""
        # The division is left to this point because float16 gradients divided by many tokens would underflow
        # before a loss scale could lift them.
        scale = grad_output / ctx.divisor
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled, None, None, None
