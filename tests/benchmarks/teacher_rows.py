"""Rows to measure encodings with: synthetic ones whose statistics are stated, and those of a real teacher.

torch is imported for the latter only: processes whose memory is measured draw synthetic ones.

Shapes: N rows, k kept ids, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitcache_storage import TopKLogProbs

K = 64
VOCAB_SIZE = 151_936

ID_EXPONENT = 0.7
"""Ids are drawn with a probability that falls with this power of the id, as in a BPE, whose early merges are frequent.
Their bytes under a byte shuffle and zstd are then those of 138 per row that the measure was set with; even draws take
6% more."""


def synthetic_rows(num_rows: int = 4096, seed: int = 0) -> tuple[TopKLogProbs, npt.NDArray[np.float64]]:
    """Rows without context, V = 151,936, k = 64, and the entropy of each over the whole vocabulary, [N] nats.

    Logits fall with the log of the rank: the r-th is -s log G_r, with G_r the r-th arrival of a Poisson process. These
    are the extremes of V independent draws with exponential tails; their softmax is Pitman and Yor's
    Poisson-Dirichlet(1/s). s is log-normal, and in three rows of four the first logit is raised by 1.2. What lies
    beyond rank k is the integral of x^-s from G_k to V. At 4,096 rows the entropy is 0.35 nats in the median and 0.89
    in the mean, and 84% of the rows have a token of more than 0.6.
    """
    rng = np.random.default_rng(seed)
    s = np.exp(rng.normal(1.2, 0.6, size=(num_rows, 1)))
    arrivals = np.cumsum(rng.exponential(size=(num_rows, K)), axis=1)
    logits = -s * np.log(arrivals)
    logits[:, 0] += 1.2 * (rng.uniform(size=num_rows) >= 0.25)
    start, t = arrivals[:, -1:], 1 - s
    tail = (VOCAB_SIZE**t - start**t) / t
    tail_of_logs = VOCAB_SIZE**t * (np.log(VOCAB_SIZE) / t - t**-2) - start**t * (np.log(start) / t - t**-2)
    log_total = np.log(np.exp(logits).sum(1, keepdims=True) + tail)
    log_probs = logits - log_total
    entropy = -(np.exp(log_probs) * log_probs).sum(1, keepdims=True)
    entropy += np.exp(-log_total) * (s * tail_of_logs + log_total * tail)
    label = np.minimum(rng.geometric(0.7, size=num_rows) - 1, K - 1)
    topk = TopKLogProbs(
        ids=_distinct_ids(rng, num_rows),
        log_probs=log_probs.astype(np.float32),
        num_kept=np.full(num_rows, K, np.int32),
        log_tail=np.log(np.maximum(tail, np.finfo(float).tiny) * np.exp(-log_total))[:, 0].astype(np.float32),
        label_log_prob=log_probs[np.arange(num_rows), label].astype(np.float32),
    )
    return topk, entropy[:, 0]


def _distinct_ids(rng: np.random.Generator, num_rows: int) -> npt.NDArray[np.int32]:
    cumulative = np.cumsum(np.arange(1, VOCAB_SIZE + 1.0) ** -ID_EXPONENT)

    def draw(n: int) -> npt.NDArray[np.int32]:
        return np.searchsorted(cumulative, rng.uniform(0, cumulative[-1], size=(n, K))).astype(np.int32)

    ids = draw(num_rows)
    while (again := (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1)).any():
        ids[again] = draw(int(again.sum()))
    return ids


def gsm8k_rows(models: Path) -> tuple[TopKLogProbs, int]:
    """Rows of the teacher of `gsm8k_models` at the answers of all 1,000 records, k = 64, and its V.

    The models are trained, and the records scored, where the folder does not hold them yet.
    """
    from gsm8k_models import ensure_models

    ensure_models(models)
    scored = models / "teacher-rows.npz"
    if not scored.exists() or scored.stat().st_mtime < (models / "DONE").stat().st_mtime:
        _score(models / "teacher", scored)
    with np.load(scored) as found:
        columns = {name: found[name] for name in found}
    vocab_size = int(columns.pop("vocab_size"))
    num_rows, k = columns["ids"].shape
    return TopKLogProbs(num_kept=np.full(num_rows, k, np.int32), **columns), vocab_size


def _score(teacher: Path, output: Path) -> None:
    """In float32, but for the softmax, which is taken in float64."""
    import torch
    from gsm8k_models import encode, read_records
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    parts = []
    for sample in encode(tokenizer, read_records()):
        tokens = torch.tensor([sample.input_ids])
        with torch.inference_mode():
            logits_MV = model(tokens).logits[0, sample.answer_start - 1 : -1]
        log_probs, ids = logits_MV.double().log_softmax(-1).sort(descending=True, stable=True)
        labels = tokens[0, sample.answer_start :, None]
        parts.append(
            {
                "ids": ids[:, :K].int(),
                "log_probs": log_probs[:, :K].float(),
                "log_tail": log_probs[:, K:].logsumexp(-1).float(),
                "label_log_prob": log_probs[ids == labels].float(),
            }
        )
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    np.savez(output, vocab_size=model.config.vocab_size, **columns)
