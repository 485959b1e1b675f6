"""`logitcache build` with a teacher that has no model and suffers what its samples say.

    python faulty_build.py FOLDER build --teacher ...

    "... raises"     an exception, whenever the sample is scored
    "... kills"      the worker's process ends
    "... hangs"      nothing happens any more
    "... once"       none of these after the first time
    "... waits"      until FOLDER/go is there

and nothing of the kind once the first word of the sample stands in FOLDER/mended.

Where FOLDER has a file `hungry`, the teacher is the engine transformers instead, and its batches of more than
MOST_TOKENS tokens ask for more memory than there is; FOLDER/batches has the tokens of each.

FOLDER remembers what has happened, and is the same for every driver and worker.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import logitcache_pipeline.build as build_module
from logitcache_pipeline.engines.base import ScoringRequest
from logitcache_pipeline.fingerprint import teacher_identity
from logitcache_pipeline.testing import MAX_LENGTH, VOCAB_SIZE
from logitcache_pipeline.worker import ScoringWorker
from logitcache_storage.cli import main
from logitcache_storage.topk import TopKLogProbs

MOST_TOKENS = 60


def rows_of(input_ids: Any, target_positions: Any, k: int) -> TopKLogProbs:
    """What the teacher says of a sample: each row follows from the token before it, and where that stands."""
    rows = []
    for position in target_positions:
        logits = 3 * np.random.default_rng([position, input_ids[position - 1]]).normal(size=VOCAB_SIZE)
        log_probs = logits - np.logaddexp.reduce(logits)
        ids = np.argsort(-log_probs, kind="stable")
        tail = np.logaddexp.reduce(log_probs[ids[k:]])
        rows.append((ids[:k], log_probs[ids[:k]], tail, log_probs[input_ids[position]]))
    ids, kept, tails, labels = (np.array(column) for column in zip(*rows, strict=True))
    return TopKLogProbs(
        ids.astype(np.int32),
        kept.astype(np.float32),
        np.full(len(ids), k, np.int32),
        tails.astype(np.float32),
        labels.astype(np.float32),
    )


class SufferingTeacher:
    """See above."""

    vocab_size, max_length = VOCAB_SIZE, MAX_LENGTH

    def __init__(self, path: str, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.identity = teacher_identity(path, dtype="float32", engine="transformers")
        self._tokenizer, self._folder = Tokenizer.from_file(f"{path}/tokenizer.json"), folder

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        for request in requests:
            self._suffer(self._tokenizer.decode(request.input_ids.tolist()))
        return [rows_of(request.input_ids, request.target_positions, k) for request in requests]

    def _suffer(self, text: str) -> None:
        words = text.partition(".")[0].split()
        happened, mended = self._folder / words[0], self._folder / "mended"
        if ("once" in words and happened.exists()) or (mended.exists() and words[0] in mended.read_text().split()):
            return
        with happened.open("a") as f:
            f.write(f"{os.getpid()}\n")
        if "raises" in words:
            raise RuntimeError(f"{words[0]} is bad")
        if "kills" in words:
            os._exit(1)
        while "hangs" in words or ("waits" in words and not (self._folder / "go").exists()):
            time.sleep(0.05)


class SufferingWorker(ScoringWorker):
    """A worker with that teacher."""

    folder = Path()

    @property
    def _teacher(self) -> Any:
        if "suffering" not in vars(self):
            self.suffering = SufferingTeacher(self._settings.path, self.folder)
        return self.suffering


class HungryWorker(ScoringWorker):
    """A worker of which the allocator refuses what large batches ask for."""

    folder = Path()

    @property
    def _teacher(self) -> Any:
        if "hungry" not in vars(self):
            self.hungry: Any = super()._teacher
            self.hungry._model.base_model.register_forward_pre_hook(self._allocate, with_kwargs=True)
        return self.hungry

    def _allocate(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        num_tokens = kwargs["input_ids"].numel()
        with (self.folder / "batches").open("a") as f:
            f.write(f"{num_tokens}\n")
        torch.empty(2**50 if num_tokens > MOST_TOKENS else 0, dtype=torch.uint8)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    worker = HungryWorker if (folder / "hungry").exists() else SufferingWorker
    worker.folder = folder
    build_module.ScoringWorker = worker  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
