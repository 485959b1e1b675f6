"""What the pipeline asks of a teacher: log-probs at the target positions of token sequences.

Shapes: L tokens of a request, M target positions of a request, k kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.schema import TeacherIdentity
from logitcache_storage.topk import TopKLogProbs


class TeacherLostError(LogitCacheError):
    """The teacher's engine has failed and cannot be asked again; one that is started anew can."""


@dataclass(frozen=True, eq=False)
class ScoringRequest:
    """A token sequence, and where its targets stand."""

    input_ids: npt.NDArray[np.int32]
    """[L] int32."""
    target_positions: npt.NDArray[np.int32]
    """[M] int32, M >= 1, each in 1..L-1; row m of the answer predicts `input_ids[target_positions[m]]`."""

    def __post_init__(self) -> None:
        length, positions = len(self.input_ids), self.target_positions
        for name, array in (("input_ids", self.input_ids), ("target_positions", positions)):
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or len(array) == 0:
                raise InputError(
                    f"{name} must be a row of at least one integer, got {array.dtype} of shape {array.shape}"
                )
        if positions.min() < 1 or positions.max() >= length:
            raise InputError(
                f"target positions must be between 1 and {length - 1} in a sequence of {length} tokens,"
                f" found {positions.min()}..{positions.max()}"
            )


class Teacher(Protocol):
    """A language model that can be asked for its next-token distributions."""

    @property
    def vocab_size(self) -> int:
        """Number of entries of a row of its logits."""

    @property
    def max_length(self) -> int | None:
        """Tokens a request may have at most; None: no limit is known."""

    @property
    def identity(self) -> TeacherIdentity:
        """Which model this is, and in which arithmetic."""

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        """One answer for each request, in their order, with `num_kept` k everywhere; k may be 0.

        Raises:
            InputError: k is not in 0..vocab_size, or a request is too long or holds ids outside the vocabulary.
            LogitCacheError: the model's logits are NaN or infinite.
            TeacherLostError: it cannot score any more.
        """


def check_requests(requests: Sequence[ScoringRequest], k: int, teacher: Teacher) -> None:
    """Refuse what the teacher cannot answer, by the index of the request.

    Raises:
        InputError: see `Teacher.score`.
    """
    if not 0 <= k <= teacher.vocab_size:
        raise InputError(f"k must be between 0 and the teacher's vocabulary size {teacher.vocab_size}, got {k}")
    for i, request in enumerate(requests):
        low, high = int(request.input_ids.min()), int(request.input_ids.max())
        if low < 0 or high >= teacher.vocab_size:
            raise InputError(
                f"request {i} holds token id {low if low < 0 else high}, the teacher's vocabulary is"
                f" 0..{teacher.vocab_size - 1}; tokenize with the teacher's own tokenizer"
            )
        if teacher.max_length is not None and len(request.input_ids) > teacher.max_length:
            raise InputError(
                f"request {i} has {len(request.input_ids)} tokens, the teacher takes {teacher.max_length};"
                " lower max_length"
            )


def load_teacher(
    engine: str, path: str, dtype: str | None = None, device: str | None = None, **options: Any
) -> Teacher:
    """Load a teacher from a folder or hub id.

    Args:
        engine: a name of `ENGINES`.
        path: a model folder or hub id.
        dtype: e.g. "bfloat16"; None: the engine's choice for the device.
        device: e.g. "cuda:0"; None: a GPU if there is one.
        options: what the engine takes besides, e.g. `TransformersTeacher.load`.

    Raises:
        InputError: unknown engine or option, or a model that it cannot load or score exactly.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; choose from {', '.join(sorted(ENGINES))}")
    try:
        return ENGINES[engine](path, dtype=dtype, device=device, **options)
    except TypeError as e:
        if "keyword argument" not in str(e):
            raise
        raise InputError(f"the engine {engine} does not take these engine options: {e}; remove what it names") from e


def _transformers(path: str, **options: Any) -> Teacher:
    from logitcache_pipeline.engines.transformers import TransformersTeacher

    return TransformersTeacher.load(path, **options)


def _vllm(path: str, **options: Any) -> Teacher:
    from logitcache_pipeline.engines.vllm import VllmTeacher

    return VllmTeacher.load(path, **options)


ENGINES: dict[str, Callable[..., Teacher]] = {"transformers": _transformers, "vllm": _vllm}
"""How to load a teacher, by engine; imports happen when one is loaded."""
