"""Exports, read back by others: pyarrow, `datasets`, and the reading that Axolotl's KD plugin documents."""

from __future__ import annotations

import io
import json
import math
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitcache_storage import export
from logitcache_storage.cache import Cache
from logitcache_storage.commit import load_commit
from logitcache_storage.errors import CorruptionError, InputError, StoreError
from logitcache_storage.export import export_cache
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.testing import FlakyStore, make_identity, make_samples, write_cache
from logitcache_storage.topk import TopKLogProbs

K, V = 5, 30
SAMPLES, TOPKS = make_samples(20, K, V)


def new_store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def make_cache(kept_mass: float = 1.0, url: str | None = None, **others) -> Cache:
    url = url or new_store().url
    identity = make_identity(k=K, vocab_size=V, shard_rows=50, container="arrow", kept_mass=kept_mass)
    write_cache(url, SAMPLES, [topk.keep_mass(kept_mass) for topk in TOPKS], identity=identity, **others)
    return Cache.open(url, others.get("storage_options"))


def exported(cache: Cache, layout: str) -> list[dict]:
    store = new_store()
    report = export_cache(cache, store, layout)
    assert store.list("") == sorted(report.files)
    return [row for name in report.files for row in pq.read_table(io.BytesIO(store.get(name))).to_pylist()]


@pytest.mark.parametrize("kept_mass", [1.0, 0.6])
def test_parquet_holds_everything(kept_mass: float) -> None:
    columns = {"weight": [i / 7 for i in range(20)], "labels": [["x"] * (i % 3) for i in range(20)]}
    columns["corpus_labels"] = list(range(20))
    cache = make_cache(kept_mass, columns=columns)
    rows = exported(cache, "parquet")
    assert len(rows) == 20
    for i, (row, sample) in enumerate(zip(rows, cache, strict=True)):
        assert (row["key"], row["source_id"], row["weight"]) == (sample.key, f"test:{i + 1}", i / 7)
        assert row["corpus_labels"] == ["x"] * (i % 3), "the corpus's own column of a name that is taken"
        assert row["corpus_corpus_labels"] == i, "and of one that is taken by it"
        assert row["input_ids"] == sample.input_ids.tolist()
        targets = dict(zip(row["target_positions"], sample.labels.tolist(), strict=True))
        assert row["labels"] == [targets.get(p, -100) for p in range(len(row["input_ids"]))]
        for m, kept in enumerate(sample.topk.num_kept):
            assert row["ids"][m] == sample.topk.ids[m, :kept].tolist()
            assert row["log_probs"][m] == sample.topk.log_probs[m, :kept].tolist()
        assert row["log_tail"] == sample.topk.log_tail.tolist()
        assert row["label_log_prob"] == sample.topk.label_log_prob.tolist()
    assert kept_mass == 1 or len({len(ids) for row in rows for ids in row["ids"]}) > 1


def collated(rows: list[dict], max_k: int) -> dict[str, np.ndarray]:
    """A batch as the plugin makes it: rows padded to one length with id 0, log-prob -1e9, mask 0."""
    longest = max(len(row["labels"]) for row in rows)
    pads = {
        "labels": -100,
        "target_token_ids": [0] * max_k,
        "target_logprobs": [-1e9] * max_k,
        "target_mask": [0] * max_k,
    }
    return {
        name: np.asarray([row[name] + [pad] * (longest - len(row[name])) for row in rows]) for name, pad in pads.items()
    }


def plugin_loss(batch: dict[str, np.ndarray], logits_BLV: np.ndarray) -> float:
    """The forward KL that the plugin sums: the teacher's entries where the mask is set, the student's output at j."""
    log_q = logits_BLV - np.logaddexp.reduce(logits_BLV, axis=-1, keepdims=True)
    total = 0.0
    for b, j, slot in zip(*np.nonzero(batch["target_mask"]), strict=True):
        log_p = float(batch["target_logprobs"][b, j, slot])
        total += math.exp(log_p) * (log_p - log_q[b, j, batch["target_token_ids"][b, j, slot]])
    return total


@pytest.mark.parametrize("kept_mass", [1.0, 0.6])
def test_axolotl_s_loss_is_the_one_that_is_meant(kept_mass: float) -> None:
    """Its sum over a padded batch, against the definition: for each target, teacher and student given what precedes."""
    cache = make_cache(kept_mass)
    batch = collated(exported(cache, "axolotl"), K)
    logits = np.random.default_rng(0).normal(size=(20, batch["labels"].shape[1], V)) * 3
    expected = 0.0
    for b, sample in enumerate(cache):
        for m, position in enumerate(sample.target_positions):
            entries = slice(0, sample.topk.num_kept[m])
            log_q = logits[b, position - 1] - np.logaddexp.reduce(logits[b, position - 1])
            p = np.exp(sample.topk.log_probs[m, entries].astype(np.float64))
            p /= p.sum()
            expected += (p * (np.log(p) - log_q[sample.topk.ids[m, entries]])).sum()
    # float32 log-probs of up to 30 nats are off by 2e-6; about 250 rows, and p sums to one in each
    assert plugin_loss(batch, logits) == pytest.approx(expected, abs=1e-3)
    shifted = {
        **batch,
        **{n: np.roll(batch[n], 1, axis=1) for n in ("target_token_ids", "target_logprobs", "target_mask")},
    }
    assert abs(plugin_loss(shifted, logits) - expected) > 1, "a position off would be seen"


def test_axolotl_s_alignment_and_padding() -> None:
    """Row j is masked as the label at j + 1 is, the last row always; what is padded is finite."""
    for row, sample in zip(exported(make_cache(0.6), "axolotl"), make_cache(0.6), strict=True):
        n = len(sample.input_ids)
        assert {len(row[name]) for name in row if name != "length"} == {n} and row["length"] == n
        assert row["attention_mask"] == [1] * n and row["position_ids"] == list(range(n))
        kept = iter(sample.topk.num_kept)
        for j in range(n):
            is_target = j + 1 < n and row["labels"][j + 1] != -100
            num_kept = int(next(kept)) if is_target else 0
            assert row["target_mask"][j] == [1] * num_kept + [0] * (K - num_kept)
            assert row["target_token_ids"][j][num_kept:] == [0] * (K - num_kept)
            assert row["target_logprobs"][j][num_kept:] == [-1e9] * (K - num_kept)
            mass = math.fsum(map(math.exp, row["target_logprobs"][j][:num_kept]))
            assert not is_target or mass == pytest.approx(1, abs=1e-6)


def test_whether_all_rows_are_full_is_said() -> None:
    assert export_cache(make_cache(), new_store(), "axolotl").kept_in_full
    assert not export_cache(make_cache(0.6), new_store(), "axolotl").kept_in_full


@pytest.mark.parametrize("layout", ["parquet", "axolotl"])
def test_as_datasets_loads_it(layout: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cache = make_cache()
    export_cache(cache, open_store(str(tmp_path / "out")), layout)
    files = [str(path) for path in sorted((tmp_path / "out").iterdir())]
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 20 and found[7]["input_ids"] == cache[7].input_ids.tolist()
    nested = found[7]["ids" if layout == "parquet" else "target_token_ids"]
    assert isinstance(nested, list) and isinstance(nested[0], list)


def test_groups_and_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "GROUP_VALUES", 40 * K)
    monkeypatch.setattr(export, "FILE_BYTES", 4_000)
    cache, store = make_cache(), new_store()
    report = export_cache(cache, store, "parquet")
    files = [pq.ParquetFile(io.BytesIO(store.get(name))) for name in report.files]
    assert len(files) > 1 and report.files == tuple(f"part-{i:05d}.parquet" for i in range(len(files)))
    sizes = [f.read_row_group(i, ["log_tail"]) for f in files for i in range(f.num_row_groups)]
    assert max(len(g.column(0).combine_chunks().values) for g in sizes) <= 40 + max(map(len, TOPKS))
    assert report.num_bytes == sum(len(store.get(name)) for name in report.files)
    keys = [key for f in files for key in f.read(["key"]).column(0).to_pylist()]
    assert keys == [sample.key for sample in cache]
    about = json.loads(files[0].schema_arrow.metadata[b"logitcache"])
    assert about["layout"] == "parquet" and about["identity"]["k"] == K


def test_groups_of_long_prompts_and_few_targets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "GROUP_VALUES", 250)
    samples = [(np.full(100, i, np.int32), np.array([[99, 100]], np.int32)) for i in range(8)]
    url, store = new_store().url, new_store()
    rows = [TopKLogProbs.of_labels(np.full(1, -0.5, np.float32)) for _ in samples]
    write_cache(url, samples, rows, identity=make_identity(k=0, vocab_size=V, role="reference"))
    report = export_cache(Cache.open(url), store, "parquet")
    file = pq.ParquetFile(io.BytesIO(store.get(report.files[0])))
    assert max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) <= 3
    assert file.read(["input_ids"]).column(0).to_pylist() == [[i] * 100 for i in range(8)]


@pytest.mark.parametrize("layout", ["parquet", "axolotl"])
def test_caches_without_samples_and_unfinished_ones(layout: str) -> None:
    empty = make_cache(commit_shards=0)
    store = new_store()
    report = export_cache(empty, store, layout)
    assert (report.num_samples, report.num_rows, report.is_complete) == (0, 0, False)
    table = pq.read_table(io.BytesIO(store.get("part-00000.parquet")))
    full = new_store()
    export_cache(make_cache(), full, layout)
    assert table.num_rows == 0 and table.schema == pq.read_schema(io.BytesIO(full.get("part-00000.parquet")))
    partial = make_cache(commit_shards=2)
    assert len(exported(partial, layout)) == len(partial) < 20


def test_what_is_there_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    cache, store = make_cache(), open_store(str(tmp_path / "out"))
    export_cache(cache, store, "parquet")
    store.put("part-00099.parquet", b"of an earlier, longer export")
    with pytest.raises(InputError, match=r"not empty; choose another output, or .*--overwrite"):
        export_cache(cache, store, "axolotl")
    report = export_cache(cache, store, "axolotl", overwrite=True)
    assert store.list("") == list(report.files) == ["part-00000.parquet"]
    store.put("part-1.parquet", b"mine")
    with pytest.raises(InputError, match=r"holds part-1.parquet, which no export wrote"):
        export_cache(cache, store, "axolotl", overwrite=True)
    with pytest.raises(InputError, match=r"holds cache.json, which no export wrote"):
        export_cache(cache, cache.store, "parquet", overwrite=True)
    with pytest.raises(InputError, match=r"unknown layout 'csv'; choose from axolotl, parquet"):
        export_cache(cache, new_store(), "csv")


def test_damage_and_failing_writes(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="write 1 fails on purpose"):
        export_cache(make_cache(), FlakyStore(new_store(), {1}), "parquet")
    cache = make_cache(url=str(tmp_path))
    (tmp_path / load_commit(cache.store, 1).objects[0].path).write_bytes(b"x")
    store = new_store()
    with pytest.raises(CorruptionError, match="1 bytes where the commit says"):
        export_cache(cache, store, "parquet")
    assert not store.list("")


def test_on_every_kind_of_store(store_location) -> None:
    options = store_location.storage_options
    cache = make_cache()
    store = open_store(store_location.url, options)
    report = export_cache(cache, store, "parquet")
    assert pq.read_table(io.BytesIO(store.get(report.files[0]))).num_rows == 20
