"""The teacher in vLLM: fast for models that need several GPUs, by one of two routes.

pooling          the architecture runs as a pooling model (`vllm_model.py`): exact tails, and only target rows leave the
                 worker. For the architectures of `vllm_model.ARCHITECTURES`.
prompt_logprobs  vLLM's own top-k of every prompt token, for all others. It gives no log-sum-exp, so the tail is what
                 the top-k leaves of one: good to float32's rounding of that sum, not of the tail.

Both take target positions only from the engine, and both refuse what they cannot answer before it is scored.

Shapes: L tokens of a request, M target positions of a request, k kept ids, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from logitcache_pipeline.engines.base import ScoringRequest, TeacherLostError, check_requests
from logitcache_pipeline.engines.vllm_model import ARCHITECTURES, PREFIX, TASK, request_arguments, unpack
from logitcache_pipeline.fingerprint import teacher_identity
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.schema import TeacherIdentity
from logitcache_storage.topk import TopKLogProbs

Route = Literal["pooling", "prompt_logprobs"]

log = logging.getLogger(__name__)


class VllmTeacher:
    """A causal language model that vLLM runs, on one device or on several under tensor parallelism."""

    def __init__(self, engine: Any, identity: TeacherIdentity, route: Route, *, vocab_size: int) -> None:
        """Take a started engine; `load` starts one.

        Args:
            engine: vLLM's `LLM`, as the route needs it.
            identity: what it is.
            route: how it is asked.
            vocab_size: rows of its head.
        """
        self._engine, self._identity, self._vocab_size = engine, identity, vocab_size
        self.route: Route = route

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
        nodes_per_worker: int = 1,
        tokens_per_batch: int | None = None,
        route: Route | None = None,
        **options: Any,
    ) -> VllmTeacher:
        """Start vLLM on a folder or hub id.

        Args:
            path: a model folder or hub id.
            dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's. The head runs in the same one.
            device: not for vLLM, which takes the devices it sees; anything but None is refused.
            revision: branch, tag or commit of a hub id.
            trust_remote_code: run model code that comes with the checkpoint.
            tensor_parallel: devices the model is spread over.
            nodes_per_worker: nodes these devices are on; above 1 vLLM starts an actor for each in the placement group
                that the calling Ray actor lies in, or in one of its own.
            tokens_per_batch: tokens of a step (vLLM's `max_num_batched_tokens`); longer prompts come in several.
            route: None: `pooling` where the architecture is known to it.
            options: handed to vLLM's `LLM`, e.g. `gpu_memory_utilization`, `max_model_len`, `quantization`.

        Raises:
            InputError: vLLM is not installed, or cannot run this model.
            LogitCacheError: it cannot run it here and now, e.g. because its processes do not find each other.
        """
        if device is not None:
            raise InputError(f"the engine vllm takes the devices it sees; set CUDA_VISIBLE_DEVICES instead of {device}")
        # In a process of its own the engine would outlive a worker that is killed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from transformers import AutoConfig
            from vllm import LLM
        except ImportError as e:
            raise InputError(f"the engine vllm needs vLLM ({e}); pip install 'logitcache[pipeline,vllm]'") from e
        try:
            config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
            architecture, chosen = choose_route(config, route)
            log.info("vLLM scores %s (%s) by the route %s", path, architecture, chosen)
            executor = "ray" if nodes_per_worker > 1 else "mp" if tensor_parallel > 1 else None
            common = {
                "dtype": dtype or _stored_dtype(config),
                "revision": revision,
                "trust_remote_code": trust_remote_code,
                "tensor_parallel_size": tensor_parallel,
                # Of itself vLLM would ask Ray for actors of its own within every Ray actor.
                "distributed_executor_backend": executor,
                # What vLLM runs through transformers' own modelling code insists on a tokenizer.
                "skip_tokenizer_init": chosen == "pooling",
                # A prompt whose beginning is cached would be answered without the hidden states of that beginning.
                "enable_prefix_caching": False,
                "max_num_batched_tokens": tokens_per_batch,
            }
            # vLLM's own default for pooling models would run the head in float32 whatever the model's dtype.
            engine = LLM(path, **common, **_engine_arguments(chosen, architecture), **options)
        except (OSError, ValueError, RuntimeError) as e:
            # What it says of devices and of its own processes may be otherwise at the next attempt.
            kind = LogitCacheError if isinstance(e, RuntimeError) else InputError
            raise kind(f"vLLM cannot run {path!r}: {e}") from e
        arithmetic = str(engine.llm_engine.model_config.dtype).removeprefix("torch.")
        loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        identity = teacher_identity(path, dtype=arithmetic, engine="vllm", **loading)
        return cls(engine, identity, chosen, vocab_size=config.get_text_config().vocab_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head, by its config."""
        return self._vocab_size

    @property
    def max_length(self) -> int | None:
        """Tokens of a request; to `prompt_logprobs` vLLM insists on adding one."""
        return int(self._engine.llm_engine.model_config.max_model_len) - (self.route == "prompt_logprobs")

    @property
    def identity(self) -> TeacherIdentity:
        """Which model this is, and in which arithmetic; the route follows from the architecture."""
        return self._identity

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        """See `Teacher.score`."""
        check_requests(requests, k, self)
        try:
            answers = (self._by_pooling if self.route == "pooling" else self._by_prompt_logprobs)(requests, k)
        except Exception as e:
            # Requests that it had begun and the ranks of a model are where the failure left them.
            raise TeacherLostError(f"vLLM has failed: {type(e).__name__}: {e}") from e
        for i, answer in enumerate(answers):
            _check_finite(answer, f"request {i}")
        return answers

    def _by_pooling(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        from vllm import PoolingParams

        orders = [np.argsort(r.target_positions, kind="stable") for r in requests]
        ascending = [r.target_positions[order] for r, order in zip(requests, orders, strict=True)]
        # Nothing behind the last row that predicts a target need be read.
        prompts = [
            {"prompt_token_ids": r.input_ids[: int(p[-1])].tolist()} for r, p in zip(requests, ascending, strict=True)
        ]
        arguments = [
            PoolingParams(extra_kwargs=request_arguments(p, r.input_ids[p], k))
            for r, p in zip(requests, ascending, strict=True)
        ]
        outputs = self._engine.encode(prompts, arguments, pooling_task=TASK, use_tqdm=False)
        return [
            unpack(output.outputs.data.cpu())[np.argsort(order)] for output, order in zip(outputs, orders, strict=True)
        ]

    def _by_prompt_logprobs(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        from vllm import SamplingParams

        wanted = SamplingParams(prompt_logprobs=k, max_tokens=1, temperature=0.0, detokenize=False, flat_logprobs=True)
        lengths = [int(r.target_positions.max()) + 1 for r in requests]
        prompts = [{"prompt_token_ids": r.input_ids[:n].tolist()} for r, n in zip(requests, lengths, strict=True)]
        outputs = self._engine.generate(prompts, wanted, use_tqdm=False)
        return [
            _from_flat(output.prompt_logprobs, request, k, self._vocab_size)
            for output, request in zip(outputs, requests, strict=True)
        ]


def choose_route(config: Any, route: Route | None = None) -> tuple[str, Route]:
    """The architecture of a model's config, and the route that it takes where none is asked for."""
    architecture: str = (config.architectures or ["unknown"])[0]
    return architecture, route or ("pooling" if architecture in ARCHITECTURES else "prompt_logprobs")


def longest_request(config: Any, options: Mapping[str, Any]) -> int | None:
    """Tokens of a request, as far as a model's config and the options of `VllmTeacher.load` tell before it is loaded.

    vLLM may take fewer: it has reasons of its own for a smaller `max_model_len`.
    """
    limits = getattr(config.get_text_config(), "max_position_embeddings", None), options.get("max_model_len")
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    _, route = choose_route(config, options.get("route"))
    return min(known) - (route == "prompt_logprobs") if known else None


def _stored_dtype(config: Any) -> str:
    # vLLM's "auto" would take float16 for some float32 checkpoints.
    return str(config.get_text_config().dtype or "bfloat16").removeprefix("torch.")


def _engine_arguments(route: Route, architecture: str) -> dict[str, Any]:
    if route == "prompt_logprobs":
        return {"max_logprobs": -1, "logprobs_mode": "raw_logprobs"}  # no bound besides the vocabulary
    return {
        "runner": "pooling",
        "convert": "none",
        "pooler_config": {"task": TASK},
        "hf_overrides": {"architectures": [PREFIX + architecture], "head_dtype": "model"},
    }


def _from_flat(flat: Any, request: ScoringRequest, k: int, vocab_size: int) -> TopKLogProbs:
    """The targets' rows of vLLM's flat list: k + 1 entries (the token, the top k) for each position but the first."""
    start = flat.start_indices[1]
    rows = request.target_positions - 1
    ids = np.asarray(flat.token_ids[start:], dtype=np.int32).reshape(-1, k + 1)[rows]
    values = np.asarray(flat.logprobs[start:], dtype=np.float32).reshape(-1, k + 1)[rows]
    log_probs = np.minimum(values[:, 1:], 0.0)
    return TopKLogProbs(
        ids=ids[:, 1:].copy(),
        log_probs=log_probs,
        num_kept=np.full(len(rows), k, dtype=np.int32),
        log_tail=_log_rest(log_probs, vocab_size),
        label_log_prob=np.minimum(values[:, 0], 0.0),
    )


def _log_rest(log_probs: npt.NDArray[np.float32], vocab_size: int) -> npt.NDArray[np.float32]:
    """log(1 - sum of the kept), but never more than if every other token were as likely as the last that is kept."""
    if not log_probs.shape[1]:
        return np.zeros(len(log_probs), dtype=np.float32)
    kept = log_probs.astype(np.float64)
    rest = np.clip(1.0 - np.exp(kept).sum(axis=1), 0.0, (vocab_size - kept.shape[1]) * np.exp(kept[:, -1]))
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(rest), dtype=np.float32)


def _check_finite(answer: TopKLogProbs, where: str) -> None:
    if not (np.isfinite(answer.log_probs).all() and np.isfinite(answer.label_log_prob).all()) or (
        np.isnan(answer.log_tail).any()
    ):
        raise LogitCacheError(
            f"the teacher's logits are NaN or infinite in {where};"
            " score in bfloat16 or float32 if this is float16, otherwise check the weights"
        )
