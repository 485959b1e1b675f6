"""Who the teacher and its tokenizer are, as fingerprints that agree on every machine and need no model in memory.

A checkpoint can be hundreds of gigabytes, so its weights are sampled: of every tensor the name, dtype and shape, all
bytes up to `WHOLE_BYTES`, and `NUM_BLOCKS` evenly spread blocks of `BLOCK_BYTES` beyond. That tells fine-tunes, merges
and quantisations apart, because they change a tensor everywhere; a change between the blocks of one large tensor
goes unseen. How tensors are spread over files makes no difference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from logitcache_storage.errors import InputError
from logitcache_storage.fingerprints import fingerprint, tokenizer_identity
from logitcache_storage.schema import TeacherIdentity, TokenizerIdentity

WHOLE_BYTES = 1 << 16
NUM_BLOCKS = 8
BLOCK_BYTES = 1 << 12
PICKLE_BLOCKS = 1024
VOLATILE_CONFIG_KEYS = frozenset(
    {"_name_or_path", "_commit_hash", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
"""Keys of config.json that do not change what the model computes in the dtype it is asked in."""


def teacher_identity(
    path: str, *, dtype: str, engine: str, revision: str | None = None, trust_remote_code: bool = False
) -> TeacherIdentity:
    """The identity of the model at a folder or hub id.

    Weights in a folder are fingerprinted as described above; those of a hub id by its commit.

    Args:
        path: a model folder or hub id.
        dtype: arithmetic of the model, e.g. "bfloat16".
        engine: which engine runs it.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: code that comes with the model runs, so that of a folder is a part of its config.

    Raises:
        InputError: no config.json or no weights there.
    """
    is_folder = Path(path).is_dir()
    if is_folder:
        config_file, commit, weights = Path(path) / "config.json", "", weights_fingerprint(Path(path))
    else:
        config_file = _hub_config(path, revision)
        commit = config_file.parent.name
        weights = fingerprint({"hub": path, "commit": commit})
    config = config_fingerprint(config_file, with_code=is_folder and trust_remote_code)
    return TeacherIdentity(path, commit, weights, config, dtype, engine)


def weights_fingerprint(folder: Path) -> str:
    """Fingerprint of the weight files in a model folder: safetensors by tensor, else pickles by file.

    Raises:
        InputError: no weights in this folder, or a file that is not what its name says.
    """
    try:
        if files := _weight_files(folder, "model.safetensors"):
            return fingerprint(sorted(entry for file in files for entry in _safetensors_entries(file)))
        if files := _weight_files(folder, "pytorch_model.bin"):
            return fingerprint([_pickle_entry(file) for file in files])
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{folder}: unreadable weights, {e!r}; copy the model again") from e
    raise InputError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or an index of either")


def config_fingerprint(config_file: Path, *, with_code: bool = False) -> str:
    """Fingerprint of a config.json without the keys that change from save to save.

    Args:
        config_file: its path.
        with_code: where it names code beside it, that is a part of the fingerprint.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        config = _stable(json.loads(config_file.read_text(encoding="utf-8")))
        if with_code and "auto_map" in config:
            code = {file.relative_to(config_file.parent): file for file in config_file.parent.rglob("*.py")}
            texts = {name.as_posix(): file.read_text(encoding="utf-8") for name, file in code.items()}
            return fingerprint({"config": config, "code": texts})
        return fingerprint(config)
    except (OSError, ValueError) as e:
        raise InputError(f"{config_file}: not a readable model config: {e}") from e


def tokenizer_identity_of(tokenizer: Any) -> TokenizerIdentity:
    """The identity of a transformers tokenizer."""
    return tokenizer_identity(tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template)


def _hub_config(path: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    try:
        file = cached_file(path, "config.json", revision=revision)
    except OSError as e:
        raise InputError(
            f"{path!r} is neither a model folder nor a reachable hub id: {' '.join(str(e).split())}"
        ) from e
    return Path(str(file))


def _weight_files(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / n for n in sorted(names)]
    return [folder / name] if (folder / name).is_file() else []


def _safetensors_entries(file: Path) -> list[list[Any]]:
    # safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors' bytes.
    size = file.stat().st_size
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        if header_bytes > size:
            raise InputError(f"{file}: a header of {header_bytes} bytes in a file of {size}; copy the model again")
        header = json.loads(f.read(header_bytes))
        header.pop("__metadata__", None)
        entries = []
        for name, tensor in header.items():
            start, stop = (8 + header_bytes + offset for offset in tensor["data_offsets"])
            if stop > size:
                raise InputError(f"{file}: tensor {name!r} ends at byte {stop} of {size}; copy the model again")
            entries.append([name, tensor["dtype"], tensor["shape"], _sampled(f, start, stop - start, NUM_BLOCKS)])
        return entries


def _pickle_entry(file: Path) -> list[Any]:
    size = file.stat().st_size
    with file.open("rb") as f:
        return [file.name, size, _sampled(f, 0, size, PICKLE_BLOCKS)]


def _sampled(f: BinaryIO, start: int, length: int, num_blocks: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if length <= max(WHOLE_BYTES, num_blocks * BLOCK_BYTES):
        f.seek(start)
        digest.update(f.read(length))
    else:
        for i in range(num_blocks):
            f.seek(start + i * (length - BLOCK_BYTES) // (num_blocks - 1))
            digest.update(f.read(BLOCK_BYTES))
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in VOLATILE_CONFIG_KEYS}
    return value
