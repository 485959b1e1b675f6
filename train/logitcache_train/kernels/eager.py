"""The passes in torch, for any device.

They go over the chunk in blocks of a few rows, which stay in the processor's cache from the first elementwise
operation to the last: each pass reads the chunk from memory once, in whatever dtype it is.

Shapes: n rows of a chunk, b rows of a block, S slots of the support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from logitcache_train.atoms import Support
from logitcache_train.head import Head
from logitcache_train.kernels.tail import DenseAtoms, TailFactors, TailSums, largest
from logitcache_train.loss import reduction_dtype

BLOCK_BYTES = 1 << 23
"""Bytes of a block: several fit into the last level of cache, and a row's share of the calls stays small."""


@dataclass(frozen=True, eq=False)
class EagerTail:
    """See `tail.TailPasses`."""

    head: Head
    atoms: DenseAtoms
    z_bV: Tensor
    """Work space in the wide dtype for the logits of a block."""
    sharp_bV: Tensor | None
    slope_bV: Tensor | None

    @classmethod
    def allocate(cls, head: Head, atoms: DenseAtoms, max_rows: int) -> EagerTail:
        """With the work space for chunks of at most `max_rows` rows."""
        num_tokens, dtype = len(head.weight_VD), reduction_dtype(head.weight_VD.dtype)
        rows = max(min(BLOCK_BYTES // (dtype.itemsize * num_tokens), max_rows), 1)

        def work() -> Tensor:
            return head.weight_VD.new_empty(rows, num_tokens, dtype=dtype)

        return cls(
            head,
            atoms,
            z_bV=work(),
            sharp_bV=None if atoms.beta is None else work(),
            slope_bV=None if head.softcap is None else work(),
        )

    @property
    def work_bytes(self) -> int:
        """Bytes that are held besides the chunk."""
        return sum(t.nbytes for t in (self.z_bV, self.sharp_bV, self.slope_bV) if t is not None)

    def reduce(self, z_nV: Tensor, support: Support) -> TailSums:
        """The sums of `tail.TailSums`; the chunk stays as it is."""
        parts = [self._reduce(z_bV, ids_bS) for z_bV, ids_bS, _ in self._blocks(z_nV, support.ids_NS)]

        def joined(name: str) -> Any:
            column = [getattr(part, name) for part in parts]
            return None if column[0] is None else torch.cat(column)

        return TailSums(*(joined(f.name) for f in fields(TailSums)))

    def largest(self, z_nV: Tensor, support: Support, k: int) -> Tensor:
        """The min(k, V) largest logits outside S."""
        return torch.cat([largest(z_bV, k) for z_bV, _, _ in self._blocks(z_nV, support.ids_NS)])

    def write_gradient(self, z_nV: Tensor, support: Support, sums: TailSums, factors: TailFactors) -> None:
        """Overwrite the chunk by the gradient outside S."""
        for z_bV, _, rows in self._blocks(z_nV, support.ids_NS):
            slope_bV = None
            if self.slope_bV is not None:
                slope_bV = self.head.slope(z_bV, out=self.slope_bV[: len(z_bV)])
            g_bV = z_bV.sub_(_finite(sums.max_n[rows])[:, None])
            sharp_bV = None
            if factors.sharp_n is not None:
                sharp_bV = self._sharpen(z_bV).mul_(factors.sharp_n[rows, None])
            g_bV.exp_().mul_(factors.exp_n[rows, None])
            if sharp_bV is not None:
                g_bV.sub_(sharp_bV)
            if factors.uniform_n is not None:
                g_bV.sub_(factors.uniform_n[rows, None])
            if slope_bV is not None:
                g_bV.mul_(slope_bV)
            if self.head.scale != 1:
                g_bV.mul_(self.head.scale)
            z_nV[rows] = g_bV

    def _blocks(self, z_nV: Tensor, ids_nS: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Logits of a few rows in the work space, -inf on S; the slots of S; which rows."""
        step = len(self.z_bV)
        for start in range(0, max(len(z_nV), 1), step):
            rows = slice(start, start + step)
            ids_bS = ids_nS[rows]
            z_bV = self.z_bV[: len(ids_bS)].copy_(z_nV[rows])
            self.head.finish_logits(z_bV)
            yield z_bV.scatter_(1, ids_bS, -torch.inf), ids_bS, rows

    def _reduce(self, z_bV: Tensor, ids_bS: Tensor) -> TailSums:
        max_b = z_bV.amax(-1)
        u_bV = z_bV.sub_(_finite(max_b)[:, None])
        z_b = sharp_b = sharp_z_b = None
        if self.atoms.uniform:
            z_b = u_bV.scatter_(1, ids_bS, 0).sum(-1)
        if self.sharp_bV is not None:
            sharp_bV = self._sharpen(u_bV.scatter_(1, ids_bS, 0)).scatter_(1, ids_bS, 0)
            sharp_b = sharp_bV.sum(-1)
            sharp_z_b = sharp_bV.mul_(u_bV).sum(-1)
        u_bV.scatter_(1, ids_bS, -torch.inf)
        return TailSums(max_b, u_bV.exp_().sum(-1), z_b, sharp_b, sharp_z_b)

    def _sharpen(self, u_bV: Tensor) -> Tensor:
        assert self.sharp_bV is not None and self.atoms.beta is not None
        return torch.mul(u_bV, 1 / self.atoms.beta, out=self.sharp_bV[: len(u_bV)]).exp_()


def _finite(max_b: Tensor) -> Tensor:
    """0 for rows without a tail, whose -inf - -inf would be NaN."""
    return max_b.masked_fill(max_b == -torch.inf, 0)
