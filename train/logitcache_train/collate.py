"""A micro-batch as the tensors of one forward pass.

A target at position t is predicted by the hidden state at t - 1: `rows_N` says which, in the flattened output.

Shapes: B samples, L tokens of the longest (padded), T tokens in all (packed), N target positions, k kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitcache_storage.topk import TopKLogProbs
from logitcache_train.atoms import Cached, CachedTopK
from logitcache_train.mixture import CachedMixture, Mean

Layout = Literal["padded", "packed"]
"""How samples lie in the input.

padded: one row each, padded on the right; no mask, because a causal model does not see what comes later
packed: all in one row without padding, told apart by position ids that start again (variable-length attention)
"""


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One sample with everything an objective may look at: L tokens, M of them targets."""

    key: str
    input_ids: npt.NDArray[np.int32]
    """[L]"""
    target_positions: npt.NDArray[np.int32]
    """Where the target tokens stand, [M], ascending, each >= 1."""
    topks: Mapping[str, tuple[TopKLogProbs, ...]] = field(default_factory=dict)
    """Role to its M rows in each cache of that role."""
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Name to per-target data, [M]."""

    def without_targets(self) -> TrainingSample:
        """The same tokens, M = 0."""
        none = np.zeros(0, dtype=np.int64)
        topks = {role: tuple(topk[none] for topk in several) for role, several in self.topks.items()}
        columns = {name: column[none] for name, column in self.columns.items()}
        return TrainingSample(self.key, self.input_ids, self.target_positions[none], topks, columns)


@dataclass(frozen=True)
class Mixing:
    """How several caches of one role become one distribution."""

    mean: Mean = "arithmetic"
    weights: tuple[float, ...] = ()
    """One for each cache, see `CachedMixture`; empty for equal ones."""

    def of(self, topks: Sequence[TopKLogProbs]) -> Cached:
        """The distribution at some positions from the rows of each cache."""
        parts = tuple(map(CachedTopK.from_numpy, topks))
        return parts[0] if len(parts) == 1 else CachedMixture(parts, self.weights or (1.0,) * len(parts), self.mean)


EQUALLY = Mixing()
"""The arithmetic mean of equal weights."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What a forward pass is asked for. Opaque to wrappers that cast the floats they find in inputs (FSDP does)."""

    rows_N: Tensor
    """Index of the hidden state that predicts each target, in the flattened output of the backbone; int64."""
    labels_N: Tensor
    """The target tokens, int64."""
    cached: Mapping[str, Cached]
    """Role to N rows."""
    columns: Mapping[str, Tensor]
    """Name to per-target data, [N]."""
    num_items: int
    """Target tokens of the whole global batch, over all ranks and accumulation steps, >= 1."""
    keys: tuple[str, ...]
    """Key of each sample."""
    num_targets: tuple[int, ...]
    """How many of the N each sample has, in order."""

    def keys_of(self, rows: Sequence[int]) -> list[str]:
        """Keys of the samples that these of the N belong to, each once."""
        places = np.searchsorted(np.cumsum(self.num_targets), rows, side="right")
        return [self.keys[i] for i in dict.fromkeys(places.tolist())]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        """The same on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Targets:
        """The same in page-locked memory; a DataLoader calls this by name."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> Targets:
        return Targets(
            move(self.rows_N),
            move(self.labels_N),
            {role: topk.map(move) for role, topk in self.cached.items()},
            {name: move(column) for name, column in self.columns.items()},
            self.num_items,
            self.keys,
            self.num_targets,
        )


def collate(
    samples: Sequence[TrainingSample], *, num_items: int, layout: Layout, mixing: Mixing = EQUALLY
) -> dict[str, Any]:
    """The inputs of one forward pass.

    Args:
        samples: at least one; all with the same roles and columns.
        num_items: see `Targets`.
        layout: see `Layout`.
        mixing: of roles with several caches.

    Returns:
        `input_ids` [B, L], or `input_ids` and `position_ids` [1, T], int64; and `targets`.
    """
    inputs, starts = (_pack if layout == "packed" else _pad)([sample.input_ids for sample in samples])
    rows = [start + sample.target_positions - 1 for start, sample in zip(starts, samples, strict=True)]
    labels = [sample.input_ids[sample.target_positions] for sample in samples]
    topks = {role: zip(*(sample.topks[role] for sample in samples), strict=True) for role in samples[0].topks}
    columns = {name: np.concatenate([s.columns[name] for s in samples]) for name in samples[0].columns}
    targets = Targets(
        rows_N=_int64(np.concatenate(rows)),
        labels_N=_int64(np.concatenate(labels)),
        cached={role: mixing.of([*map(TopKLogProbs.concatenate, parts)]) for role, parts in topks.items()},
        columns={name: torch.from_numpy(column) for name, column in columns.items()},
        num_items=num_items,
        keys=tuple(sample.key for sample in samples),
        num_targets=tuple(len(sample.target_positions) for sample in samples),
    )
    return {**{name: _int64(array) for name, array in inputs.items()}, "targets": targets}


def _pad(sequences: Sequence[npt.NDArray[np.int32]]) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """The inputs, and where each sequence starts in the flattened output, [B]."""
    lengths = np.array([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    # Whatever stands in the padding is never looked at: token 0 exists in every vocabulary.
    ids_BL = np.zeros((len(lengths), longest), dtype=np.int64)
    ids_BL[np.arange(longest) < lengths[:, None]] = np.concatenate(sequences)
    return {"input_ids": ids_BL}, np.arange(len(lengths)) * longest


def _pack(sequences: Sequence[npt.NDArray[np.int32]]) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """The inputs, and where each sequence starts in the flattened output, [B]."""
    lengths = np.array([len(sequence) for sequence in sequences])
    starts = np.cumsum(lengths) - lengths
    positions_T = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return {"input_ids": np.concatenate(sequences)[None], "position_ids": positions_T[None]}, starts


def _int64(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
