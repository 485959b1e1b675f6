"""Per-target data of files that are joined by sample key, from the file to a trained student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, MismatchError
from logitcache_storage.inspect.doubtful import write_columns
from logitcache_storage.sample_statistics import load_statistics
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_train.columns import ColumnFiles, column_readers
from logitcache_train.data import CachedSamples
from logitcache_train.objectives import objective

CRITICAL = objective("critical_tokens")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Its own column says 7 everywhere."""
    url = str(tmp_path_factory.mktemp("columns"))
    samples, topks = make_samples(12, 4, 50, seed=1)
    identity = make_identity(k=4, vocab_size=50, container="arrow")
    write_cache(url, samples, topks, identity=identity, columns={"critical": [7] * 12})
    return Cache.open(url)


def write(path: Path, cache: Cache, value: Any, *, keys: list[Any] | None = None, name: str = "critical") -> str:
    """`value(index, num_tokens, num_targets)` of every sample, in another order than the cache's."""
    order = [*range(len(cache))][::-1]
    index = cache.index
    values = [value(i, int(index.num_tokens[i]), int(index.num_targets[i])) for i in order]
    own = [bytes.fromhex(cache.key(i)) for i in order] if keys is None else keys
    key = pa.array(own, pa.binary(16)) if own and isinstance(own[0], bytes) else pa.array(own)
    pq.write_table(pa.table({"key": key[: len(values)], name: values[: len(key)]}), path)
    return str(path)


def targets(cache: Cache, *paths: str) -> list[list[float]]:
    """What each sample is trained with."""
    samples = CachedSamples({"teacher": [cache]}, CRITICAL, window_shards=1, columns=ColumnFiles(paths))
    return [samples[i].columns["critical"].tolist() for i in range(len(samples))]


def test_a_number_or_one_for_each_token_or_target(cache: Cache, tmp_path: Path) -> None:
    sizes = cache.index.num_targets.tolist()
    scalar = write(tmp_path / "scalar.parquet", cache, lambda i, *_: i / 4)
    assert targets(cache, scalar) == [[i / 4] * size for i, size in enumerate(sizes)]
    by_target = write(tmp_path / "targets.parquet", cache, lambda i, _, m: [float(i + t) for t in range(m)])
    assert targets(cache, by_target) == [[i + t for t in range(size)] for i, size in enumerate(sizes)]
    by_token = write(tmp_path / "tokens.parquet", cache, lambda _, n, __: [*range(n)])
    assert targets(cache, by_token) == [cache[i].target_positions.tolist() for i in range(len(cache))]


def test_the_first_of_several_files_counts_and_keys_may_be_text(cache: Cache, tmp_path: Path) -> None:
    some = write(tmp_path / "some.parquet", cache, lambda *_: 1, keys=[cache.key(i) for i in (3, 5)])
    all_of_them = write(tmp_path / "all.parquet", cache, lambda *_: 2.5)
    assert [values[0] for values in targets(cache, some, all_of_them)] == [1 if i in (3, 5) else 2.5 for i in range(12)]
    assert {values[0] for values in targets(cache, all_of_them, some)} == {2.5}
    assert {values[0] for values in targets(cache)} == {7}


def test_only_the_samples_that_are_trained_on_need_a_value(cache: Cache, tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", cache, lambda *_: 1, keys=[cache.key(i) for i in (3, 5)])
    readers = column_readers(CRITICAL, cache, np.array([5, 3]), ColumnFiles([path]))
    assert readers["critical"](3, np.array([1, 2]), 9, 0).tolist() == [1, 1]
    with pytest.raises(InputError, match=rf"no 'critical' for 10 of 12 samples of .* with key {cache.key(0)}"):
        targets(cache, path)


def test_files_that_cannot_be_used(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--columns .*none.parquet: cannot be read"):
        ColumnFiles([str(tmp_path / "none.parquet")])
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match=r"text.parquet: cannot be read as Parquet"):
        ColumnFiles([str(tmp_path / "text.parquet")])
    for keys in ([1, 2], ["0123", "4567"], [b"x" * 16, None]):
        table = {"key": pa.array(keys, pa.binary()) if keys[0] == b"x" * 16 else keys, "critical": [1, 1]}
        pq.write_table(pa.table(table), tmp_path / "keys.parquet")
        with pytest.raises(InputError, match="needs a column 'key' of sample keys, 16 bytes or 32 hex digits"):
            ColumnFiles([str(tmp_path / "keys.parquet")])
    other = write(tmp_path / "other.parquet", cache, lambda *_: 1, name="trust")
    with pytest.raises(InputError, match=r"'critical_tokens' looks at 'critical', the file has 'trust'"):
        targets(cache, other)
    odd = write(tmp_path / "odd.parquet", cache, lambda *_: [1.0] * 99)
    with pytest.raises(InputError, match=rf"column 'critical' of sample {cache.key(0)}: expected a number"):
        targets(cache, odd)


def test_batches_know_what_they_weigh(cache: Cache, tmp_path: Path) -> None:
    """A run that is resumed with other weights would be another run."""
    a = write(tmp_path / "a.parquet", cache, lambda *_: 1)
    b = write(tmp_path / "b.parquet", cache, lambda i, *_: int(i != 4))
    prints = [
        CachedSamples({"teacher": [cache]}, CRITICAL, window_shards=1, columns=ColumnFiles(p)).order_fingerprint()
        for p in ([], [a], [a], [b])
    ]
    assert prints[1] == prints[2] and len(set(prints)) == 3


def test_from_a_configuration_file(settings_of: Any, tmp_path: Path) -> None:
    words = ["--student", "s", "--cache", "c", "--objective", "sft", "--output", str(tmp_path / "out")]
    for given, expected in ((["a.parquet", "b.parquet"], ("a.parquet", "b.parquet")), ("a.parquet", ("a.parquet",))):
        (tmp_path / "run.yaml").write_text(json.dumps({"columns": given}))
        assert settings_of(*words, "--config", str(tmp_path / "run.yaml")).columns == expected
    assert settings_of(*words, "--columns", "x", "--columns", "y").columns == ("x", "y")
    assert settings_of(*words).columns == ()


def test_training_on_all_labels_but_the_doubtful_ones(run: Any, plain: Any, tmp_path: Path) -> None:
    def weights(name: str, min_probability: float) -> str:
        opened = Cache.open(plain.cache)
        path = tmp_path / f"{name}.parquet"
        counts[name] = write_columns(opened, load_statistics(opened), path, min_probability=min_probability)
        return str(path)

    def losses(name: str, **options: Any) -> list[float]:
        common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **options}
        return [entry["loss"] for entry in run(plain, tmp_path / name, **common) if "loss" in entry]

    counts: dict[str, int] = {}
    all_of_them, sure = weights("none", 1.0), weights("some", 0.5)
    assert counts["none"] == 0 < counts["some"]
    sft = losses("sft", objective="sft")
    assert losses("a", objective="critical_tokens", columns=all_of_them) == pytest.approx(sft, abs=1e-6)
    assert losses("b", objective="critical_tokens", columns=sure)[0] < sft[0] - 1e-3
    checkpoint = tmp_path / "b" / "checkpoint-1"
    with pytest.raises(MismatchError, match=r"another run \(samples: "):
        losses("c", objective="critical_tokens", columns=all_of_them, resume_from_checkpoint=checkpoint)
