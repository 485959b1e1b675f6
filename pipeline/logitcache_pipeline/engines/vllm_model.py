"""The teacher inside vLLM: a causal language model as a pooling model that returns top-k rows, not logits.

vLLM finds `register` through the entry-point group `vllm.general_plugins`, in every process that it starts. It makes
each architecture known a second time, as a pooling model under `PREFIX` + its name. Such a model keeps its own head and
its own `compute_logits`; its pooler reduces the logits of the target rows on the worker, so that of a request of M
targets only M rows of 2 k + 2 numbers leave it.

Under tensor parallelism each rank has the logits of its part of the vocabulary. It reduces those, and one small gather
merges the parts exactly (`head.merge_parts`).

Shapes: T scheduled tokens of a step, M target rows of a request, n rows of a chunk, k kept ids, V_r tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitcache_pipeline.head import PartialRows, merge_parts, normalise, reduce_part
from logitcache_storage.topk import TopKLogProbs

PREFIX = "Logitcache"

ARCHITECTURES = (
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Those of vLLM's whose logits come from one call of a `logits_processor` on a head that may lie on several ranks."""

TASK = "token_classify"

CHUNK_BYTES = 1 << 28
"""Bytes of float32 logits that the pooler reduces at a time."""


def register() -> None:
    """Make every architecture known to vLLM as a pooling model."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for name in ARCHITECTURES:
        if name in known and PREFIX + name not in known:
            ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ARCHITECTURES:
        return _pooling_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def request_arguments(positions: npt.NDArray[np.int32], labels: npt.NDArray[np.int32], k: int) -> dict[str, Any]:
    """What the pooler is told of a request: k, where its targets stand, [M] ascending, and what they are, [M]."""
    return {"k": k, "positions": positions.astype(np.int32).tobytes(), "labels": labels.astype(np.int32).tobytes()}


def unpack(packed_Mx: Tensor) -> TopKLogProbs:
    """The rows of one answer, from int32 [M, 2 k + 2]: ids, then the bits of log-probs, log tail and label log-prob."""
    packed = packed_Mx.numpy()
    k = packed.shape[1] // 2 - 1
    floats = np.ascontiguousarray(packed[:, k:]).view(np.float32)
    return TopKLogProbs(
        ids=np.ascontiguousarray(packed[:, :k]),
        log_probs=np.ascontiguousarray(floats[:, :k]),
        num_kept=np.full(len(packed), k, dtype=np.int32),
        log_tail=floats[:, k].copy(),
        label_log_prob=floats[:, k + 1].copy(),
    )


@cache
def _pooling_class(architecture: str) -> type:
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces_base import VllmModelForPooling

    base: Any = ModelRegistry._try_load_model_cls(architecture)

    class PoolingModel(base, VllmModelForPooling):  # type: ignore[misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = _pooler(_LocalLogits(self))

    PoolingModel.__name__ = PoolingModel.__qualname__ = PREFIX + architecture
    return PoolingModel


class _LocalLogits:
    """A model's own `compute_logits`, but for the gather over ranks: float32 [n, V_r], and where V_r begins."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._whole = model.logits_processor.forward
        model.logits_processor.forward = self._forward
        self.vocab_size = int(model.logits_processor.org_vocab_size)
        self.first_id, self.num_ranks = 0, 1

    def __call__(self, hidden_nD: Tensor) -> Tensor:
        logits_nV: Tensor = self._model.compute_logits(hidden_nD)
        return logits_nV.float()

    def _forward(self, head: Any, hidden_nD: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        logits_nV: Tensor = self._whole(head, hidden_nD, bias, skip_gather=True)
        shard = head.shard_indices
        self.first_id, self.num_ranks = shard.org_vocab_start_index, head.tp_size
        return logits_nV[:, : shard.org_vocab_end_index - self.first_id]


def _pooler(logits: _LocalLogits) -> Any:
    from vllm.model_executor.layers.pooler import PoolingParamsUpdate
    from vllm.model_executor.layers.pooler.abstract import Pooler

    class TopKPooler(Pooler):  # type: ignore[misc]
        def get_supported_tasks(self) -> set[str]:
            return {TASK}

        def get_pooling_updates(self, task: str) -> Any:
            return PoolingParamsUpdate()

        def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
            cursor = pooling_metadata.get_pooling_cursor()
            counts, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
            asked = zip(pooling_metadata.pooling_params, ends, strict=True)
            arguments = [params.extra_kwargs or _warm_up(end) for params, end in asked]
            rows, labels = _scheduled_rows(arguments, counts, ends)
            packed = _score(logits, hidden_states, np.concatenate(rows), np.concatenate(labels), arguments[0]["k"])
            answers: list[Tensor | None] = []
            states = zip(pooling_metadata.pooling_states, cursor.get_finished_mask(), strict=True)
            for part, (state, is_finished) in zip(torch.split(packed, [len(r) for r in rows]), states, strict=True):
                # A long prompt comes in several steps; rows of the earlier ones wait here.
                state.hidden_states_cache.append(part)
                answers.append(torch.cat(state.hidden_states_cache) if is_finished else None)
                if is_finished:
                    state.clean()
            return answers

    return TopKPooler()


def _warm_up(length: int) -> dict[str, Any]:
    """vLLM measures its memory with requests of its own, which know nothing of targets: take every row."""
    return request_arguments(np.arange(1, length + 1, dtype=np.int32), np.zeros(length, np.int32), 1)


def _scheduled_rows(
    arguments: Sequence[dict[str, Any]], counts: Sequence[int], ends: Sequence[int]
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int32]]]:
    """Of each request, the rows of this step's hidden states that predict a target, and those targets."""
    rows, labels, first = [], [], 0
    for request, count, end in zip(arguments, counts, ends, strict=True):
        positions = np.frombuffer(request["positions"], dtype=np.int32)
        # The target at position p is predicted by the hidden state at p - 1; scheduled are [end - count, end).
        start, stop = np.searchsorted(positions, [end - count + 1, end + 1])
        rows.append(first + positions[start:stop].astype(np.int64) - 1 - (end - count))
        labels.append(np.frombuffer(request["labels"], dtype=np.int32)[start:stop])
        first += count
    return rows, labels


def _score(
    logits: _LocalLogits, hidden_TD: Tensor, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], k: int
) -> Tensor:
    """Packed rows, [M, 2 k + 2] int32, see `unpack`."""
    device = hidden_TD.device
    hidden_MD = hidden_TD.index_select(0, torch.from_numpy(rows).to(device))
    labels_M = torch.from_numpy(labels.astype(np.int64)).to(device)
    size = max(1, CHUNK_BYTES // (4 * logits.vocab_size))
    # An empty step still goes through the head once: under tensor parallelism every rank must take part in the gather.
    chunks = [slice(i, i + size) for i in range(0, max(len(rows), 1), size)]
    return torch.cat([_score_chunk(logits, hidden_MD[chunk], labels_M[chunk], k) for chunk in chunks])


def _score_chunk(logits: _LocalLogits, hidden_nD: Tensor, labels_n: Tensor, k: int) -> Tensor:
    logits_nV = logits(hidden_nD)
    part = reduce_part(logits_nV, labels_n, k, first_id=logits.first_id)
    if logits.num_ranks > 1:
        part = merge_parts(_gather(part, k, logits.num_ranks), k)
    ids_nk, log_probs_nk, log_tail_n, label_n = normalise(part)
    floats = torch.cat([log_probs_nk, log_tail_n[:, None], label_n[:, None]], dim=1)
    return torch.cat([ids_nk.int(), floats.view(torch.int32)], dim=1)


def _gather(part: PartialRows, k: int, num_ranks: int) -> list[PartialRows]:
    """The parts of all ranks. Ids travel as the bits of floats: not every backend gathers integers."""
    from vllm.distributed import tensor_model_parallel_all_gather

    missing = k - part.values_nk.shape[1]
    values_nk = torch.nn.functional.pad(part.values_nk, (0, missing), value=-torch.inf)
    ids_nk = torch.nn.functional.pad(part.ids_nk.int(), (0, missing)).view(torch.float32)
    scalars = torch.stack([part.rest_max_n, part.log_rest_n, part.label_logit_n], dim=1)
    gathered = tensor_model_parallel_all_gather(torch.cat([values_nk, ids_nk, scalars], dim=1).contiguous(), dim=-1)
    parts = []
    for piece in gathered.view(len(values_nk), num_ranks, 2 * k + 3).unbind(1):
        values_nk, ids_nk, scalars = piece.split([k, k, 3], dim=1)
        parts.append(PartialRows(values_nk, ids_nk.contiguous().view(torch.int32), *scalars.unbind(1)))
    return parts
