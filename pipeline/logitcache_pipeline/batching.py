"""Which sequences go through the model together, and how they lie in its input.

Shapes: n sequences of a batch, T tokens in its longest (padded) or in all of them (packed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Layout = Literal["padded", "packed"]
"""How a batch lies in the input.

padded: one row each, padded on the right; no mask, because a causal model does not see what comes later
packed: all in one row without padding, told apart by attention of variable length
"""


def token_budget_batches(
    lengths: Sequence[int], tokens_per_batch: int, *, layout: Layout, never_across: int | None = None
) -> list[list[int]]:
    """Indices of the sequences in batches, longest first, of similar length, each within the token budget.

    A batch costs its padded tokens (packed: its tokens); a sequence above the budget is a batch by itself.

    Args:
        lengths: tokens of each sequence, each >= 1.
        tokens_per_batch: the budget.
        layout: see `Layout`.
        never_across: no batch holds both sequences up to this length and longer ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    cost = 0
    for i in order:
        first = lengths[batches[-1][0]] if batches else 0
        cost += lengths[i] if layout == "packed" else first
        crosses = never_across is not None and lengths[i] <= never_across < first
        if not batches or cost > tokens_per_batch or crosses:
            batches.append([])
            cost = lengths[i]
        batches[-1].append(i)
    return batches


def num_input_tokens(lengths: Sequence[int], layout: Layout) -> int:
    """What a batch of these lengths costs: its tokens, padded ones included."""
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)


def collate(
    sequences: Sequence[npt.NDArray[np.int32]], layout: Layout
) -> tuple[dict[str, npt.NDArray[Any] | int], npt.NDArray[np.int64]]:
    """The model's inputs for a batch, and where each sequence starts in its flattened output, [n].

    Returns:
        `input_ids` [n, T] int64; packed: `input_ids` and `position_ids` [1, T] int64, and the borders of the sequences
        under transformers' names for attention of variable length, with which no layer has to look for them (on a GPU
        that would be a wait in each).
    """
    lengths = np.array([len(s) for s in sequences])
    if layout == "packed":
        borders = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
        inputs = {
            "input_ids": np.concatenate(sequences).astype(np.int64)[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": borders.astype(np.int32),
            "cu_seq_lens_k": borders.astype(np.int32),
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
        }
        return inputs, borders[:-1]
    n, T = len(lengths), int(lengths.max())
    real_nT = np.arange(T) < lengths[:, None]
    ids_nT = np.zeros((n, T), dtype=np.int64)
    ids_nT[real_nT] = np.concatenate(sequences)
    return {"input_ids": ids_nT}, np.arange(n) * T
