"""Fingerprints that decide whether two things are the same: tokenizers, samples, corpora.

They live here because the pipeline writes them and the trainer checks them, and neither imports the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from logitcache_storage.errors import MismatchError
from logitcache_storage.schema import TokenizerIdentity


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of keys."""
    data = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()


def tokenizer_identity(
    vocabulary: Mapping[str, int], special_tokens: Mapping[str, Any], chat_template: Any
) -> TokenizerIdentity:
    """Fingerprints of a tokenizer from `get_vocab()`, `special_tokens_map` and `chat_template`."""
    return TokenizerIdentity(
        vocabulary=fingerprint(dict(vocabulary)),
        special_tokens=fingerprint({name: str(token) for name, token in special_tokens.items()}),
        chat_template=fingerprint(chat_template),
    )


def check_same_tokenizer(found: TokenizerIdentity, cached: TokenizerIdentity, *, student: str) -> None:
    """Refuse a student whose token ids do not mean what the cache's ids mean.

    Chat templates may differ: the cache already holds token ids, the template only made them.

    Raises:
        MismatchError: vocabulary or special tokens differ.
    """
    for part in ("vocabulary", "special_tokens"):
        ours, theirs = getattr(found, part), getattr(cached, part)
        if ours != theirs:
            raise MismatchError(
                f"the tokenizer of {student} has another {part.replace('_', ' ')} than the cache:"
                f" found {ours[:12]}, expected {theirs[:12]};"
                " use a student with the teacher's tokenizer, or build a cache with a teacher that has the student's"
            )


def sample_key(input_ids: npt.NDArray[np.int32], target_ranges: npt.NDArray[np.int32]) -> str:
    """The key of a sample, 32 hex digits: a hash of its token ids and of its target ranges.

    Equal tokens and targets give equal keys on every machine, so that caches of one corpus can be joined.

    Args:
        input_ids: token ids, [L].
        target_ranges: half-open ranges of target positions, [R, 2], ascending and disjoint.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.int64(len(input_ids)).tobytes())
    digest.update(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(target_ranges, dtype="<i4").tobytes())
    return digest.hexdigest()
