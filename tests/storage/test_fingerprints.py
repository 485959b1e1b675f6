"""Fingerprints and sample keys: what they depend on, and values that must never change."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from logitcache_storage.errors import MismatchError
from logitcache_storage.fingerprints import check_same_tokenizer, fingerprint, sample_key, tokenizer_identity

IDS = np.array([5, 6, 7, 8], np.int32)
RANGES = np.array([[1, 2], [3, 4]], np.int32)


def test_sample_key_by_hand() -> None:
    data = struct.pack("<q4i4i", 4, 5, 6, 7, 8, 1, 2, 3, 4)
    assert sample_key(IDS, RANGES) == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_sample_key_depends_on_tokens_and_targets_alone() -> None:
    key = sample_key(IDS, RANGES)
    assert sample_key(IDS.astype(np.int64), RANGES.astype(">i4")) == key
    assert sample_key(IDS, RANGES.ravel()) == key
    others = [
        sample_key(IDS[:3], RANGES),
        sample_key(IDS, RANGES[:1]),
        sample_key(IDS[::-1], RANGES),
        sample_key(np.concatenate([IDS, [1, 2]]), RANGES[1:]),  # the same numbers, cut elsewhere
    ]
    assert len({key, *others}) == 5


def test_fingerprint() -> None:
    assert fingerprint({"a": 1, "b": [2, "é"]}) == fingerprint({"b": [2, "é"], "a": 1})
    assert fingerprint({"a": 1, "b": [2, "é"]}) == hashlib.sha256('{"a":1,"b":[2,"é"]}'.encode()).hexdigest()
    assert fingerprint("\ud800") != fingerprint("\ud801")


def test_tokenizers() -> None:
    teacher = tokenizer_identity({"a": 0, "b": 1}, {"eos_token": "b"}, "template")
    check_same_tokenizer(tokenizer_identity({"b": 1, "a": 0}, {"eos_token": "b"}, None), teacher, student="s")
    for other, part in (
        (tokenizer_identity({"a": 1, "b": 0}, {"eos_token": "b"}, "template"), "vocabulary"),
        (tokenizer_identity({"a": 0, "b": 1}, {"eos_token": "a"}, "template"), "special tokens"),
    ):
        with pytest.raises(MismatchError, match=f"the tokenizer of ./student has another {part} than the cache"):
            check_same_tokenizer(other, teacher, student="./student")
