"""The teacher as a transformers model: backbone over batches, head at target positions only.

What differs between architectures is checked on random tokens when a model is loaded, and a model that fails is
refused: that it is causal (so padding on the right needs no mask), that backbone and head together give its own logits
(soft-cap and scale are read from the config), and that a sequence scores alike alone and in a batch.

The device never waits for the host: it has the next batch before the answers of this one are fetched. On a CPU, where
model and host share the cores, the same order simply runs one after the other.

Shapes: N target positions of a batch, n sequences of a batch, T tokens of a row, D hidden, V vocabulary, k kept ids.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcache_pipeline.batching import Layout, collate, num_input_tokens, token_budget_batches
from logitcache_pipeline.engines import varlen_attention
from logitcache_pipeline.engines.base import ScoringRequest, check_requests
from logitcache_pipeline.fingerprint import teacher_identity
from logitcache_pipeline.head import Head, PendingRows, top_k_log_probs
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.schema import TeacherIdentity
from logitcache_storage.topk import TopKLogProbs

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
"""Tokens of a batch, padding included, when nothing else is asked for."""

SELF_CHECK_LENGTH = 24
SELF_CHECK_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Norm of the difference over the norm of the centred logits: what rounding in this dtype can explain in a deep model,
and far less than what a wrong head or a leaking batch makes."""

log = logging.getLogger(__name__)


class TransformersTeacher:
    """A causal language model that scores in batches of similar length, within a budget of tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        identity: TeacherIdentity,
        *,
        tokens_per_batch: int | None = None,
        layouts: Sequence[Layout] = ("packed", "padded"),
        compile: bool = False,
    ) -> None:
        """Take a loaded model in eval mode; `load` makes one from a folder or hub id.

        Args:
            model: a causal language model on one device; left with attention that takes packed rows only where it
                can be given such.
            identity: what it is.
            tokens_per_batch: as in `load`.
            layouts: how its batches may lie, by preference.
            compile: as in `load`.

        Raises:
            InputError: the model cannot be scored exactly or compiled, or the budget is below 1.
        """
        self._model, self._identity = model, identity
        self._tokens_per_batch = _budget(tokens_per_batch, model.device)
        self._head = _head_of(model, identity.id)
        self._rope_switch = _rope_switch(model.config)
        self._backbone: Callable[..., Any] = model.base_model
        self._layout = self._checked_layout(layouts, compile)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
        tokens_per_batch: int | None = None,
        compile: bool = False,
    ) -> TransformersTeacher:
        """Load any causal language model of a folder or the hub.

        Args:
            path: a model folder or hub id.
            dtype: "float32", "bfloat16" or "float16"; None: float32 on a CPU, elsewhere the checkpoint's, or
                bfloat16 where it names none or a quantised one.
            device: e.g. "cuda:0"; None: a GPU if there is one.
            revision: branch, tag or commit of a hub id.
            trust_remote_code: run model code that comes with the checkpoint.
            attention: transformers' `attn_implementation`; None: its own choice.
            tokens_per_batch: tokens of a batch, padding included; None: see `TOKENS_PER_BATCH`. Halved for good
                whenever a batch does not fit into the device's memory.
            compile: put the backbone through `torch.compile`, which takes a minute or more and pays in long runs.

        Raises:
            InputError: no causal language model there, missing weights, or one that cannot be scored exactly or
                compiled.
        """
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(path, **options)
            arithmetic = _dtype(dtype, config, where)
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=arithmetic,
                device_map={"": where},
                attn_implementation=attention,
                output_loading_info=True,
                **options,
            )
        except InputError:
            raise
        except (OSError, ValueError, ImportError) as e:
            raise InputError(f"cannot load a causal language model from {path!r}: {e}") from e
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"{path!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]!r}:"
                " they would be random; use the complete checkpoint of a causal language model"
            )
        name = str(arithmetic).removeprefix("torch.")
        identity = teacher_identity(path, dtype=name, engine="transformers", **options)
        return cls(model.eval(), identity, tokens_per_batch=tokens_per_batch, compile=compile)

    @property
    def vocab_size(self) -> int:
        """Number of entries of a row of the model's logits, padded rows of its head included."""
        return self._head.vocab_size

    @property
    def max_length(self) -> int | None:
        """The config's `max_position_embeddings`, if it has one."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def identity(self) -> TeacherIdentity:
        """Which model this is, and in which arithmetic."""
        return self._identity

    @property
    def layout(self) -> Layout:
        """How batches lie in the model's input; the self-check has chosen it."""
        return self._layout

    def score(self, requests: Sequence[ScoringRequest], k: int) -> list[TopKLogProbs]:
        """See `Teacher.score`.

        Raises:
            LogitCacheError: as there, or a sequence by itself needs more memory than the device has.
        """
        check_requests(requests, k, self)
        answers: dict[int, TopKLogProbs] = {}
        started = self._started(requests, k)
        running = next(started, None)
        while running is not None:
            following = next(started, None)
            answers.update(_fetched(requests, *running))
            running = following
        return [answers[i] for i in range(len(requests))]

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which sequences of these lengths go through the model together."""
        return token_budget_batches(
            lengths, self._tokens_per_batch, layout=self._layout, never_across=self._rope_switch
        )

    def _started(self, requests: Sequence[ScoringRequest], k: int) -> Iterator[tuple[list[int], PendingRows]]:
        """Batches that the device has been given, and the rows that it makes of them."""
        lengths = [len(r.input_ids) for r in requests]
        left = deque(self.batches(lengths))
        while left:
            try:
                rows = self._start([requests[i] for i in left[0]], k)
            except RuntimeError as e:
                if not should_reduce_batch_size(e):
                    raise
                self._halve_budget([lengths[i] for i in left[0]], e)
                rows = None
            # Outside of the handler, whose exception still holds the tensors of the batch.
            if rows is None:
                indices = sorted(i for batch in left for i in batch)
                left = deque([indices[j] for j in b] for b in self.batches([lengths[i] for i in indices]))
            else:
                yield left.popleft(), rows

    @torch.inference_mode()
    def _start(self, requests: Sequence[ScoringRequest], k: int) -> PendingRows:
        hidden_ND = self._hidden([r.input_ids for r in requests], [r.target_positions for r in requests], self._layout)
        labels_N = self._tensor(np.concatenate([r.input_ids[r.target_positions] for r in requests]).astype(np.int64))
        return top_k_log_probs(self._head, hidden_ND, labels_N, k)

    def _halve_budget(self, lengths: Sequence[int], error: RuntimeError) -> None:
        """After a batch of these lengths did not fit."""
        if len(lengths) == 1:
            raise LogitCacheError(
                f"a sequence of {lengths[0]} tokens by itself does not fit into the memory of {self._model.device}"
                f" ({error}); lower max_length, or use one with more memory free or the engine vllm on several GPUs"
            ) from error
        found = num_input_tokens(lengths, self._layout)
        self._tokens_per_batch = found // 2
        log.warning(
            "a batch of %d tokens does not fit into the memory of %s; batches have at most %d from now on",
            found,
            self._model.device,
            self._tokens_per_batch,
        )

    def _hidden(
        self, sequences: Sequence[npt.NDArray[Any]], positions: Sequence[npt.NDArray[Any]], layout: Layout
    ) -> Tensor:
        """Final hidden states of the rows that predict the tokens at `positions` of each sequence, [N, D]."""
        inputs, starts = collate(sequences, layout)
        rows_N = np.concatenate([start + p - 1 for start, p in zip(starts, positions, strict=True)])
        arguments = {name: v if isinstance(v, int) else self._tensor(v) for name, v in inputs.items()}
        hidden_nTD: Tensor = self._backbone(**arguments, use_cache=False)[0]
        return hidden_nTD.flatten(0, 1).index_select(0, self._tensor(rows_N))

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        tensor, device = torch.from_numpy(array), self._model.device
        # From pinned memory the copy takes its place in the GPU's queue, and the host goes on.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    @torch.inference_mode()
    def _checked_layout(self, layouts: Sequence[Layout], compile: bool) -> Layout:
        """The first layout in which a batch scores as its sequences do alone by the model's own `logits`."""
        limit = min(SELF_CHECK_LENGTH, self.max_length or SELF_CHECK_LENGTH, self._rope_switch or SELF_CHECK_LENGTH)
        num_tokens = min(self.vocab_size, self._model.get_input_embeddings().weight.shape[0])
        tokens = np.random.default_rng(0).integers(num_tokens, size=limit)
        sequences = [tokens[: limit // 2], tokens]
        logits = [self._model(input_ids=self._tensor(s[None]), use_cache=False).logits[0].float() for s in sequences]
        if not torch.cat(logits).isfinite().all():
            raise self._refusal("its logits are NaN or infinite")
        if not self._close(logits[1][: limit // 2], logits[0]):
            raise self._refusal("it is not causal, the logits at a token depend on later tokens")
        if logits[1].shape[1] != self.vocab_size or not self._close(self._logits([tokens], "padded"), logits[1]):
            raise self._refusal("its head is more than a linear layer with the soft-cap and scale of its config")
        expected = torch.cat(logits)
        for layout in layouts:
            if self._packs(sequences, expected) if layout == "packed" else self._alike(sequences, layout, expected):
                break
        else:
            raise self._refusal("a sequence scores differently alone and in a batch")
        if compile:
            self._compile(sequences, layout, expected)
        return layout

    def _packs(self, sequences: Sequence[npt.NDArray[Any]], expected: Tensor) -> bool:
        """Whether the model keeps packed sequences apart; if so, it is left with the attention that does."""
        own = self._model.config._attn_implementation or ""
        if varlen_attention.can_attend(self._model):
            self._model.set_attn_implementation(varlen_attention.NAME)
        elif "flash" not in own:
            return False
        try:
            alike = self._alike(sequences, "packed", expected)
        except (ImportError, RuntimeError, TypeError, ValueError) as e:
            # What a model or a kernel says to arguments that it does not take.
            log.info("%s is not packed: %s", self._identity.id, e)
            alike = False
        if not alike:
            self._model.set_attn_implementation(own)
        return alike

    def _compile(self, sequences: Sequence[npt.NDArray[Any]], layout: Layout, expected: Tensor) -> None:
        self._backbone = torch.compile(self._model.base_model, dynamic=True)
        try:
            alike = self._alike(sequences, layout, expected)
        except RuntimeError as e:
            raise InputError(
                f"torch.compile cannot compile {self._identity.id!r} ({type(self._model).__name__}) on"
                f" {self._model.device}: {str(e).splitlines()[0]}; load it with compile=False"
            ) from e
        if not alike:
            raise self._refusal("compiled, it scores differently; load it with compile=False")

    def _alike(self, sequences: Sequence[npt.NDArray[Any]], layout: Layout, expected: Tensor) -> bool:
        return self._close(self._logits(sequences, layout), expected)

    def _logits(self, sequences: Sequence[npt.NDArray[Any]], layout: Layout) -> Tensor:
        hidden_ND = self._hidden(sequences, [np.arange(1, len(s) + 1) for s in sequences], layout)
        return torch.cat([self._head.logits(h).clone() for h in torch.split(hidden_ND, self._head.rows_per_chunk)])

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        centred = expected - expected.mean(1, keepdim=True)
        return bool((found - expected).norm() <= SELF_CHECK_TOLERANCE[self._model.dtype] * centred.norm())

    def _refusal(self, reason: str) -> InputError:
        return InputError(
            f"{self._identity.id!r} ({type(self._model).__name__}, {self._identity.dtype}) cannot be scored exactly:"
            f" {reason} (found on random tokens); use another engine or model"
        )


def _fetched(requests: Sequence[ScoringRequest], batch: Sequence[int], rows: PendingRows) -> dict[int, TopKLogProbs]:
    """The answers to the requests of a batch, by index."""
    positions = [requests[i].target_positions for i in batch]
    ends = np.cumsum([len(p) for p in positions])

    def row_name(row: int) -> str:
        j = int(np.searchsorted(ends, row, side="right"))
        return f"request {batch[j]} at target position {np.concatenate(positions)[row]}"

    scored = rows.wait(row_name)
    return {i: scored[end - len(p) : end] for i, p, end in zip(batch, positions, ends.tolist(), strict=True)}


def _head_of(model: PreTrainedModel, name: str) -> Head:
    layer = model.get_output_embeddings()
    if model.base_model is model:
        raise InputError(
            f"{name!r} ({type(model).__name__}) has no {model.base_model_prefix!r}, expected a backbone apart from the"
            " head; use another engine or model"
        )
    if not isinstance(layer, nn.Linear) or layer.weight.dtype not in SELF_CHECK_TOLERANCE:
        raise InputError(
            f"{name!r} ({type(model).__name__}) has an output layer of {type(layer).__name__}, expected a linear layer"
            " of floating-point weights; use a checkpoint whose head is not quantised, or another engine"
        )
    config = model.config.get_text_config()

    def number(field: str, default: float) -> float:
        value = getattr(config, field, None)
        return float(value) if isinstance(value, int | float) else default

    # Cohere; Falcon-H1; Granite. Then Gemma, RecurrentGemma, xLSTM.
    scale = number("logit_scale", 1.0) * number("lm_head_multiplier", 1.0) / number("logits_scaling", 1.0)
    caps = (number(f, 0.0) for f in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    return Head(layer.weight, layer.bias, scale=scale, softcap=max(caps) or None)


def _rope_switch(config: Any) -> int | None:
    """The length above which LongRoPE rotates every sequence of a batch by other frequencies.

    Dynamic RoPE, the other kind that depends on the batch, does so beyond `max_length` only.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for rope in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    return None


def _dtype(name: str | None, config: Any, device: torch.device) -> torch.dtype:
    if name is None:
        stored = config.get_text_config().dtype
        on_gpu = stored if stored in SELF_CHECK_TOLERANCE else torch.bfloat16
        return torch.float32 if device.type == "cpu" else on_gpu
    known = {str(d).removeprefix("torch."): d for d in SELF_CHECK_TOLERANCE}
    if name not in known:
        raise InputError(f"unknown dtype {name!r}; choose from {', '.join(sorted(known))}")
    return known[name]


def _budget(tokens_per_batch: int | None, device: torch.device) -> int:
    if tokens_per_batch is None:
        return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    if tokens_per_batch < 1:
        raise InputError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    return tokens_per_batch
