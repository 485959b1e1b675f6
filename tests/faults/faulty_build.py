"""`logitcache build` with a teacher that has no model and suffers what its samples say.

    python faulty_build.py FOLDER build --teacher ...

    "... raises"     an exception, whenever the sample is scored
    "... kills"      the worker's process ends
    "... hangs"      nothing happens any more
    "... once"       none of these after the first time
    "... waits"      until FOLDER/go is there
    "... eats"       it is scored by the engine transformers, whose batches of more than MOST_TOKENS tokens ask for more
                     memory than there is; FOLDER/batches has the tokens of each

and nothing of the kind once the first word of the sample stands in FOLDER/mended.

FOLDER remembers what has happened, and is the same for every driver and worker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import logitcache_pipeline.build as build_module
from logitcache_pipeline.engines.base import ScoringRequest, load_teacher
from logitcache_pipeline.fingerprint import teacher_identity
from logitcache_pipeline.testing import MAX_LENGTH, VOCAB_SIZE
from logitcache_pipeline.worker import ScoringWorker
from logitcache_storage.cli import main
from logitcache_storage.errors import StoreUnavailableError
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
        self._loading: threading.Thread | None = None

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        texts = [self._tokenizer.decode(request.input_ids.tolist()).partition(".")[0].split() for request in requests]
        for words in texts:
            self._suffer(words)
        rows = [rows_of(request.input_ids, request.target_positions, k) for request in requests]
        if eating := [i for i, words in enumerate(texts) if "eats" in words]:
            for i, answer in zip(eating, self._real().score([requests[i] for i in eating], k), strict=True):
                rows[i] = answer
        return rows

    def _real(self) -> Any:
        """The engine. Importing torch takes seconds, meanwhile the driver is told to ask again, as if for the store."""
        if self._loading is None:
            self._loading = threading.Thread(target=self._load, daemon=True)
            self._loading.start()
        self._loading.join(1)
        if self._loading.is_alive():
            raise StoreUnavailableError("torch is being imported")
        return self._engine

    def _load(self) -> None:
        engine: Any = load_teacher("transformers", self.identity.id, "float32", "cpu")
        engine._model.base_model.register_forward_pre_hook(self._allocate, with_kwargs=True)
        self._engine = engine

    def _allocate(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        num_tokens = kwargs["input_ids"].numel()
        with (self._folder / "batches").open("a") as f:
            f.write(f"{num_tokens}\n")
        torch.empty(2**50 if num_tokens > MOST_TOKENS else 0, dtype=torch.uint8)

    def _suffer(self, words: Sequence[str]) -> None:
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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    SufferingWorker.folder = folder
    build_module.ScoringWorker = SufferingWorker  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
