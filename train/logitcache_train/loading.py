"""The student from a checkpoint, and whether it goes together with the caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError
from logitcache_storage.fingerprints import check_same_tokenizer, tokenizer_identity
from logitcache_train.data import CachedSamples
from logitcache_train.settings import TrainSettings
from logitcache_train.student import check_head


def load_checkpoint(path: str, *, tokenizer_path: str | None = None, **how: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        path: folder or hub id.
        tokenizer_path: where the tokenizer is, if elsewhere.
        how: handed to `from_pretrained`.

    Raises:
        InputError: no causal language model there, or an incomplete one.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or path)
    except (OSError, ValueError, ImportError) as e:
        place = "" if Path(path).expanduser().is_dir() else " (no folder here, so a name on the hub)"
        raise InputError(f"cannot load a causal language model with its tokenizer from {path!r}{place}: {e}") from e
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{path!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]!r}:"
            " they would be random; use the complete checkpoint of a causal language model"
        )
    return model, tokenizer


def check_folder(path: str, option: str) -> None:
    """Refuse what can be no hub id and is no folder: asked for it, the hub would answer with a riddle.

    Args:
        path: what a user gave.
        option: what with, for the message.

    Raises:
        InputError: there is no such folder, or it is a file.
    """
    found = Path(path).expanduser()
    if found.is_file() or (path.startswith((".", "/", "~")) and not found.is_dir()):
        what = "a file, expected the folder of a checkpoint" if found.is_file() else "no such folder"
        raise InputError(f"{option} {path}: {what}")


def load_student(settings: TrainSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in training dtype on the CPU, and its tokenizer.

    Raises:
        InputError: no causal language model there, an incomplete one, or adapters.
    """
    check_folder(settings.student, "--student")
    model, tokenizer = load_checkpoint(
        settings.student,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attn_implementation,
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{settings.student!r} holds adapters, not a whole model; merge them into their base first"
            " (merge_and_unload of peft, then save_pretrained), or go on training them with --resume_from_checkpoint"
        )
    return model, tokenizer


def check_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caches: Mapping[str, Sequence[Cache]],
    data: Sequence[CachedSamples],
    *,
    name: str,
) -> int:
    """V, the tokens that carry mass: the rows of the head that are tokens of every cache's vocabulary, too.

    Args:
        model: the student.
        tokenizer: its tokenizer.
        caches: role to the caches that are trained on.
        data: all samples that the student will see.
        name: of the student, for messages.

    Raises:
        InputError: a cache keeps more tokens than the student has, or a sample is longer than the student can read.
        MismatchError: another tokenizer, or a sample has a token that the student lacks.
    """
    found = tokenizer_identity(tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template)
    several = [(role, cache) for role, parts in caches.items() for cache in parts]
    for _, cache in several:
        check_same_tokenizer(found, cache.identity.tokenizer, student=name)
    check_head(model)
    head_rows: int = len(model.get_output_embeddings().weight)
    vocab_size = min(head_rows, *(cache.identity.vocab_size for _, cache in several))
    for role, cache in several:
        if cache.identity.k > vocab_size:
            raise InputError(
                f"the {role} cache keeps k = {cache.identity.k} tokens, and {name} has a vocabulary of {vocab_size};"
                " build the cache with a smaller --k"
            )
    num_tokens: int = min(vocab_size, len(model.get_input_embeddings().weight))
    longest, limit = max(int(samples.num_tokens.max()) for samples in data), _max_length(model)
    if limit is not None and longest > limit:
        raise InputError(
            f"the cache has samples of up to {longest} tokens, and {name} reads {limit} (max_position_embeddings);"
            f" build the cache with --max-length {limit}"
        )
    if max(tokenizer.get_vocab().values()) >= num_tokens:
        for samples in data:
            samples.check_token_ids(num_tokens, student=name)
    return vocab_size


def _max_length(model: PreTrainedModel) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
