"""What a cache of k ids loses: total variation of the target from that of the full teacher.

On the answers of held-out GSM8K records, with the teacher and the student of `gsm8k_models`, in float64. Three ways to
complete what a cache holds (the top-k, the label's probability, and what is left, the tail) to a distribution:

    student       the tail follows the student: the library's target, p minus the gradient of `target_loss`
    renormalised  no tail: the kept probabilities divided by their sum
    uniform       the tail is spread evenly over the other ids

The truth, and the targets of the other two, are written here over the whole vocabulary. All three know the same.

    python tests/benchmarks/bench_truncation.py [--models DIR] [--figure FILE.png]

Shapes: N target positions of a record, V vocabulary.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gsm8k_models import NUM_HELD_OUT, Sample, encode, ensure_models, read_records, report_with_models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache_train import CachedTopK, objective, target_loss

SIZES_OF_CACHE = (8, 16, 32, 64)
OBJECTIVES = {
    "target_sft, eta 0.3": objective("target_sft", eta=0.3),
    "target_sft, eta 0.5": objective("target_sft", eta=0.5),
    "target_sft, eta 0.7": objective("target_sft", eta=0.7),
    "kd": objective("kd"),
}
TAILS = {"student": "tail follows the student", "renormalised": "no tail, renormalised", "uniform": "uniform tail"}
NUM_RECORDS = 50
SHARES = (0.05, 0.1, 0.2, 0.5, 1)
"""Marked on the axis."""
SURE = 0.01
"""A teacher is called sure of a position where its mass outside the 64 largest is below this."""


def main() -> int:
    """Measure, print one JSON document, and draw."""
    return report_with_models(__doc__, run, draw)


def run(models: Path) -> dict[str, Any]:
    """Distances by objective, tail and k: mean and 95th percentile over positions, and the mean where it is sure."""
    torch.set_num_threads(1)
    made = ensure_models(models)
    distances: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
    tails: dict[int, list[Tensor]] = defaultdict(list)
    for teacher_NV, student_NV, labels_N in logits_of_held_out(models):
        log_q_NV, log_p_NV = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
        etas = {name: obj.values.get("eta") for name, obj in OBJECTIVES.items()}
        truths = {name: full_target(log_q_NV, log_p_NV, labels_N, eta) for name, eta in etas.items()}
        for k in SIZES_OF_CACHE:
            topk = truncate(log_q_NV, labels_N, k)
            tails[k].append(topk.log_tail.exp())
            completed = complete(log_q_NV, topk, labels_N)
            for name, obj in OBJECTIVES.items():
                found = {t: full_target(log_NV, log_p_NV, labels_N, etas[name]) for t, log_NV in completed.items()}
                found["student"] = library_target(student_NV, labels_N, obj, topk)
                for tail, target_NV in found.items():
                    distances[name, tail, k].append(0.5 * (target_NV - truths[name]).abs().sum(-1))
    tail_at = {k: torch.cat(parts) for k, parts in tails.items()}
    sure_N = tail_at[max(SIZES_OF_CACHE)] < SURE
    return {
        "teacher": made["teacher"],
        "student": made["student"],
        "vocab_size": made["vocab_size"],
        "unigram_loss": made["unigram_loss"],
        "positions": len(sure_N),
        "sure_positions": int(sure_N.sum()),
        "teacher_tail_mean": {k: rounded(tail_N.mean()) for k, tail_N in tail_at.items()},
        "total_variation": {
            name: {
                tail: {k: statistics_of(torch.cat(distances[name, tail, k]), sure_N) for k in SIZES_OF_CACHE}
                for tail in TAILS
            }
            for name in OBJECTIVES
        },
    }


def logits_of_held_out(models: Path) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Teacher's and student's logits at the answers, [N, V] float64, and their labels, [N], record by record."""
    tokenizer = AutoTokenizer.from_pretrained(models / "teacher")
    both = [AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64) for name in ("teacher", "student")]
    held_out: list[Sample] = encode(tokenizer, read_records()[-NUM_HELD_OUT:])[:NUM_RECORDS]
    for sample in held_out:
        ids_L = torch.tensor(sample.input_ids)
        with torch.inference_mode():
            logits = [model(input_ids=ids_L[None, :-1]).logits[0, sample.answer_start - 1 :] for model in both]
        yield logits[0].clone(), logits[1].clone(), ids_L[sample.answer_start :]


def truncate(log_q_NV: Tensor, labels_N: Tensor, k: int) -> CachedTopK:
    """What a cache keeps of the teacher, without the rounding of its encoding."""
    log_probs_Nk, ids_Nk = log_q_NV.topk(k)
    return CachedTopK(
        ids=ids_Nk,
        log_probs=log_probs_Nk,
        num_kept=torch.full_like(labels_N, k),
        log_tail=log_q_NV.scatter(1, ids_Nk, -torch.inf).logsumexp(-1),
        label_log_prob=log_q_NV.gather(1, labels_N[:, None])[:, 0],
    )


def complete(log_q_NV: Tensor, topk: CachedTopK, labels_N: Tensor) -> dict[str, Tensor]:
    """The teacher made whole again without a student, [N, V] log-probs, from the kept ids and the label."""
    kept_NV = torch.zeros_like(log_q_NV, dtype=torch.bool).scatter(1, topk.ids, True)
    kept_NV = kept_NV.scatter(1, labels_N[:, None], True)
    on_kept_NV = log_q_NV.masked_fill(~kept_NV, -torch.inf)
    tail_N1 = 1 - on_kept_NV.exp().sum(-1, keepdim=True)
    each_N1 = (tail_N1 / (~kept_NV).sum(-1, keepdim=True)).log()
    return {"renormalised": on_kept_NV.log_softmax(-1), "uniform": torch.where(kept_NV, log_q_NV, each_N1)}


def full_target(log_q_NV: Tensor, log_p_NV: Tensor, labels_N: Tensor, eta: float | None) -> Tensor:
    """Q over the whole vocabulary: the teacher itself, or with an eta that of `target_sft`."""
    if eta is None:
        return log_q_NV.exp()
    guided_NV = ((1 - eta) * log_p_NV + eta * log_q_NV).softmax(-1)
    p_label_N1 = log_p_NV.gather(1, labels_N[:, None]).exp()
    return ((1 - p_label_N1) * guided_NV).scatter_add(1, labels_N[:, None], p_label_N1)


def library_target(student_NV: Tensor, labels_N: Tensor, obj: Any, topk: CachedTopK) -> Tensor:
    """Q as training sees it: p less the gradient."""
    logits_NV = student_NV.clone().requires_grad_()
    [gradient_NV] = torch.autograd.grad(target_loss(logits_NV, labels_N, obj, {"teacher": topk}).sum(), logits_NV)
    return student_NV.softmax(-1) - gradient_NV


def statistics_of(distance_N: Tensor, sure_N: Tensor) -> dict[str, float]:
    """What is reported of the distances."""
    return {
        "mean": rounded(distance_N.mean()),
        "p95": rounded(np.percentile(distance_N.numpy(), 95)),
        "mean_where_sure": rounded(distance_N[sure_N].mean()),
    }


def rounded(value: Any) -> float:
    """To three significant digits."""
    return float(f"{float(value):.3g}")


def draw(report: dict[str, Any], path: Path) -> None:
    """One panel for each objective: distance over k, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"student": "#1f5fa8", "renormalised": "#c8551b", "uniform": "#5a8f29"}
    figure, panels = plt.subplots(1, len(OBJECTIVES), figsize=(12, 3.6), sharey=True, layout="constrained")
    for panel, (name, by_tail) in zip(panels, report["total_variation"].items(), strict=True):
        for tail, by_k in by_tail.items():
            for statistic, style in (("mean", "o-"), ("p95", "o--")):
                values = [by_k[k][statistic] for k in SIZES_OF_CACHE]
                label = f"{TAILS[tail]}, {'mean' if statistic == 'mean' else '95th percentile'}"
                panel.plot(SIZES_OF_CACHE, values, style, color=colours[tail], markersize=4, label=label)
        panel.set(title=name, xlabel="k", xscale="log", yscale="log")
        panel.set_xticks(SIZES_OF_CACHE, map(str, SIZES_OF_CACHE))
        panel.set_yticks(SHARES, map(str, SHARES))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("total variation from the full target")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
