"""What a student makes of a held-out cache: NLL, divergence from the teacher and top-1 agreement of every target.

Shapes: n target positions of a chunk, S slots of the support, V vocabulary that carries mass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from logitcache_storage.errors import InputError
from logitcache_train.atoms import Cached, CachedTopK, build_support, coarse_student, cross_entropy
from logitcache_train.data import CachedSamples, Part
from logitcache_train.head import Head
from logitcache_train.loss import reduction_dtype

BATCHES_AHEAD = 16
"""How many batches an evaluation reads ahead, where the caches are read ahead."""

HELD_OUT_METRICS = ("loss", "nll", "kl", "top_1_agreement")
"""Means over all held-out targets, logged as `eval_loss` and so on; the last two where there is a teacher cache."""


def held_out_metrics(head: Head, products_nV: Tensor, labels_n: Tensor, teacher: Cached | None) -> dict[str, Tensor]:
    """Metrics of each position of a chunk, [n] each.

    `nll` is -log p_y in nats. With a teacher, `kl` is KL(teacher || student) in nats on the kept ids, the label and
    the tail as one outcome, which is at most the divergence on the whole vocabulary; and `top_1_agreement` is 1 where
    both have the same likeliest token, else 0.

    Args:
        head: makes logits of products.
        products_nV: h W^T at the positions that predict a target, [n, V]; not changed.
        labels_n: observed tokens, [n], each in [0, V).
        teacher: n rows of the teacher cache, or of several mixed.
    """
    if isinstance(teacher, CachedTopK) and not teacher.ids.shape[1]:
        teacher = None  # k = 0: it knows the labels' log-probs alone
    z_nV = head.finish_logits(products_nV.to(reduction_dtype(products_nV.dtype), copy=True))
    support = build_support(labels_n, teacher, z_nV.shape[1], z_nV.dtype)
    z_nS, likeliest_n = z_nV.gather(1, support.ids_NS), z_nV.argmax(-1)
    tail_nV = z_nV.scatter_(1, support.ids_NS, -torch.inf)
    tail_max_n = tail_nV.amax(-1)
    shift_n1 = tail_max_n.masked_fill(~support.has_tail_N, 0)[:, None]
    student = coarse_student(z_nS, tail_max_n, tail_nV.sub_(shift_n1).exp_().sum(-1).log(), support)
    metrics = {"nll": -student.log_p_label_N}
    cached = support.cached(student)
    if cached is None:
        return metrics
    log_q_nS, log_tau_n = cached
    q_nS, tau_n = log_q_nS.exp(), log_tau_n.exp()
    entropy_n = torch.special.entr(q_nS).sum(-1) + torch.special.entr(tau_n)
    kl_n = cross_entropy(q_nS, tau_n, student) - entropy_n
    top_n = support.ids_NS.gather(1, log_q_nS.argmax(-1, keepdim=True))[:, 0]
    agrees_n = top_n == likeliest_n
    return {**metrics, "kl": kl_n, "top_1_agreement": agrees_n.to(z_nV.dtype)}


class HeldOutSampler(Sampler[Any]):
    """One rank's parts of all held-out samples in their own order; every rank has equally many."""

    def __init__(self, samples: CachedSamples, *, batch_size: int, rank: int, world_size: int) -> None:
        """`batch_size` is in samples, of one rank."""
        self._samples, self._step = samples, batch_size * world_size
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        """Forward passes of an evaluation."""
        return -(-len(self._samples) // self._step)

    def __iter__(self) -> Iterator[Part]:
        everything = np.arange(len(self._samples))
        for start in range(0, len(everything), self._step):
            behind = start + self._step
            batch, next_ones = everything[start:behind], everything[behind : behind + BATCHES_AHEAD * self._step]
            needs = (self._samples.needs(batch), self._samples.needs(next_ones))
            yield Part(batch, self._rank, self._world_size, tuple(n for n in needs if n is not None))


def check_metric(name: str | None, roles: Sequence[str]) -> None:
    """Refuse a metric to choose the best model by that no evaluation will have.

    Raises:
        InputError: an unknown metric, or one of the teacher without a teacher cache.
    """
    known = [m for m in HELD_OUT_METRICS if "teacher" in roles or m not in ("kl", "top_1_agreement")]
    if name is not None and name.removeprefix("eval_") not in known:
        raise InputError(
            f"--metric_for_best_model {name}: an evaluation of {', '.join(roles) or 'these'} caches has no such metric;"
            f" choose from {', '.join(known)}"
        )
