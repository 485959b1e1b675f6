"""The one value that travels from teacher to student: sparse next-token distributions.

Shapes: N target positions, k kept ids per position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import InputError


@dataclass(frozen=True, eq=False)
class TopKLogProbs:
    """The teacher's k most likely tokens at each of N target positions, and the mass outside them.

    Row m describes the distribution that predicts the m-th target token. All log-probs are natural
    logarithms (nats) of the full-vocabulary softmax.
    """

    ids: npt.NDArray[np.int32]
    """Token ids in descending order of log-prob, [N, k] int32; 0 beyond `num_kept`."""
    log_probs: npt.NDArray[np.float32]
    """Their log-probs, [N, k] float32, <= 0 and non-increasing; -inf beyond `num_kept`."""
    num_kept: npt.NDArray[np.int32]
    """How many of the k entries are kept, [N] int32, between 1 and k; 0 where k is 0."""
    log_tail: npt.NDArray[np.float32]
    """Log of the mass outside the kept ids, [N] float32, <= 0; -inf where nothing is outside, 0 where k is 0."""
    label_log_prob: npt.NDArray[np.float32]
    """Log-prob of the observed target token, [N] float32, <= 0, whether or not it is among the ids."""

    @classmethod
    def of_labels(cls, label_log_prob: npt.NDArray[np.float32]) -> TopKLogProbs:
        """Rows of k = 0: of each distribution the label's log-prob alone is known, and the tail is all of it."""
        n = len(label_log_prob)
        no_ids, no_log_probs = np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32)
        return cls(no_ids, no_log_probs, np.zeros(n, np.int32), np.zeros(n, np.float32), label_log_prob)

    def __post_init__(self) -> None:
        shapes = {f.name: getattr(self, f.name).shape for f in fields(self)}
        n, k = shapes["ids"] if len(shapes["ids"]) == 2 else (-1, -1)
        expected = {
            "ids": (n, k),
            "log_probs": (n, k),
            "num_kept": (n,),
            "log_tail": (n,),
            "label_log_prob": (n,),
        }
        if n < 0 or shapes != expected:
            raise InputError(f"TopKLogProbs needs ids and log_probs [N, k] and three [N] columns, got {shapes}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | npt.NDArray[np.integer]) -> TopKLogProbs:
        return TopKLogProbs(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def k(self) -> int:
        """Number of entries per row, kept or not."""
        return int(self.ids.shape[1])

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which entries are kept, [N, k] bool."""
        return np.arange(self.k) < self.num_kept[:, None]

    def keep_mass(self, mass: float) -> TopKLogProbs:
        """Keep in each row the smallest set of ids that reaches `mass`; what is dropped joins the tail."""
        probs = np.where(self.kept, np.exp(self.log_probs.astype(np.float64)), 0.0)
        num_needed = (np.cumsum(probs, axis=1) < mass).sum(axis=1) + 1
        num_kept = np.minimum(num_needed, self.num_kept).astype(np.int32)
        keep = np.arange(self.k) < num_kept[:, None]
        with np.errstate(divide="ignore"):
            log_dropped = np.log(np.where(keep, 0.0, probs).sum(axis=1))
        return TopKLogProbs(
            np.where(keep, self.ids, 0).astype(np.int32),
            np.where(keep, self.log_probs, np.float32(-np.inf)),
            num_kept,
            np.minimum(np.logaddexp(self.log_tail, log_dropped), 0.0).astype(np.float32),
            self.label_log_prob,
        )

    @staticmethod
    def concatenate(parts: Sequence[TopKLogProbs]) -> TopKLogProbs:
        """Join parts of equal k along the rows."""
        return TopKLogProbs(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(TopKLogProbs)))

    def equals(self, other: TopKLogProbs) -> bool:
        """Whether every column is equal to the last bit."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
