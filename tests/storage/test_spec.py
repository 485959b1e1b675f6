"""storage/SPEC.md is enough: a reader written from it alone, without the library's, reads what the library reads.

The golden caches were written by `golden/write_golden.py` when format version 1 was fixed; they must stay readable.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from logitcache_storage import Cache
from logitcache_storage.objects import open_store
from logitcache_storage.schema import CONTAINERS, ID_LAYOUTS, PRECISIONS
from logitcache_storage.testing import extend_cache, make_identity, make_samples, write_cache
from logitcache_storage.topk import TopKLogProbs

GOLDEN = Path(__file__).parent / "golden"


class SpecReader:
    """A reader in the simplest possible terms; section numbers are those of SPEC.md."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = self.record("cache.json")
        assert self.identity["format_version"] == 1
        self.plan = self.plans()
        commits = self.manifest()
        if commits is None:
            commits = [self.record(p.relative_to(folder).as_posix()) for p in (folder / "commits").glob("*.json")]
        self.commits = {commit["shard"]: commit for commit in commits}
        for commit in self.commits.values():
            prefix = f"shards/{commit['shard']:05d}-{commit['attempt']}"
            assert all(item["path"].startswith(prefix) for item in commit["objects"])
            assert commit["num_bytes"] == sum(item["size"] for item in commit["objects"])
            lacking = sum(entry["num_rows"] for entry in commit.get("excluded", ()))
            assert commit["num_rows"] + lacking == self.plan["shard_num_rows"][commit["shard"]]

    def record(self, path: str) -> dict[str, Any]:
        """Section 2."""
        data = (self.folder / path).read_bytes()
        assert data[:12] == b'{"crc32c": "'
        assert crc32c(data[:12] + b"00000000" + data[20:]) == int(data[12:20], 16)
        return json.loads(data)

    def plans(self) -> dict[str, Any]:
        """Section 2, all plans as one."""
        whole = self.record("plans/00000.json")
        for number in range(1, len(list((self.folder / "plans").glob("*.json")))):
            extension = self.record(f"plans/{number:05d}.json")
            assert extension["first_shard"] == len(whole["shard_num_rows"])
            plan = extension["plan"]
            for part in plan["parts"]:
                part["first_sample"] += whole["num_samples"]
            for name in ("num_samples", "num_tokens", "num_rows", "shard_num_rows", "parts"):
                whole[name] += plan[name]
        return whole

    def manifest(self) -> list[dict[str, Any]] | None:
        """Section 2, the manifest."""
        about = self.record("manifest.json") if (self.folder / "manifest.json").exists() else {}
        if "table" not in about or about["num_shards"] < len(self.plan["shard_num_rows"]):
            return None
        rows = pq.read_table(self.checked(about["table"])).to_pylist()
        assert [row["shard"] for row in rows] == list(range(about["num_shards"]))
        for row in rows:
            prefix = f"shards/{row['shard']:05d}-{row['attempt']}"
            for item in row["objects"]:
                item["path"] = prefix + item["suffix"]
        return rows

    def checked(self, item: dict[str, Any]) -> Path:
        """Section 2, an object record."""
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", item["path"])
        data = (self.folder / item["path"]).read_bytes()
        assert len(data) == item["size"]
        blocks = [data[start : start + 262144] for start in range(0, len(data), 262144)]
        assert [crc32c(block) for block in blocks] == item["block_crc32c"]
        return self.folder / item["path"]

    def samples(self) -> list[dict[str, Any]]:
        """Section 3."""
        rows = []
        for part in self.plan["parts"]:
            assert part["first_sample"] == len(rows)
            file = pq.ParquetFile(self.checked(part["object"]))
            if "index" in part:
                self.check_index(part, file.read().to_pylist())
            assert all(file.metadata.row_group(i).num_rows == 1024 for i in range(file.num_row_groups - 1))
            rows += file.read().to_pylist()
        for row in rows:
            ids, ranges = row["input_ids"], row["target_ranges"]
            packed = struct.pack(f"<q{len(ids)}i{len(ranges)}i", len(ids), *ids, *ranges)
            assert hashlib.blake2b(packed, digest_size=16).digest() == row["key"]
        return rows

    def first_row(self, row: dict[str, Any]) -> int | None:
        """Section 2, `excluded`: where the rows of a sample of a committed shard begin; None where it has none."""
        entries = self.commits[row["shard"]].get("excluded", ())
        lacking = [entry for entry in entries if entry["first_row"] == row["first_row"]]
        assert all((e["num_rows"], e["key"]) == (row["num_targets"], row["key"].hex()) for e in lacking)
        before = sum(entry["num_rows"] for entry in entries if entry["first_row"] < row["first_row"])
        return None if lacking else row["first_row"] - before

    def check_index(self, part: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Section 3."""
        data, n = self.checked(part["index"]).read_bytes(), part["num_samples"]
        for i, name in enumerate(("shard", "first_row", "num_tokens", "num_targets")):
            assert list(struct.unpack_from(f"<{n}i", data, 4 * n * i)) == [row[name] for row in rows]
        assert data[16 * n :] == b"".join(row["key"] for row in rows)

    def shard(self, number: int) -> dict[str, list[Any]]:
        """Sections 5 to 7: one list per column and row, log-probs decoded in float64."""
        commit = self.commits[number]
        for item in commit["objects"]:
            self.checked(item)
        path = self.folder / f"shards/{number:05d}-{commit['attempt']}"
        names = ["ids", "codes", "num_kept", "log_tail", "label_log_prob"]
        layout = self.identity.get("id_layout", "plain")
        if self.identity["k"] == 0:
            names = ["label_log_prob"]
        elif layout == "split":
            names.append("ids_high")
        expected = {"shard": number, "precision": self.identity["precision"]}
        if self.identity["container"] == "zarr":
            group = zarr.open_group(str(path), mode="r")
            about = dict(group.attrs)
            columns = {name: np.asarray(group[name][:]).tolist() for name in names}
        else:
            with pa.ipc.open_file(str(path) + ".arrow") as file:
                sizes = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
                assert all(size == 4096 for size in sizes[:-1])
                about = json.loads(file.schema.metadata[b"logitcache"])
                columns = {name: file.read_all().column(name).to_pylist() for name in names}
        assert about in (expected, {**expected, "id_layout": layout})
        if self.identity["k"] == 0:
            N = commit["num_rows"]
            nothing = {"ids": [[]] * N, "log_probs": [[]] * N, "num_kept": [0] * N, "log_tail": [0.0] * N}
            return columns | nothing
        if layout == "split":
            pairs = zip(columns["ids"], columns["ids_high"], strict=True)
            columns["ids"] = [[low + 65536 * high for low, high in zip(*pair, strict=True)] for pair in pairs]
        columns["log_probs"] = []
        for row, (ids, codes) in enumerate(zip(columns["ids"], columns["codes"], strict=True)):
            n = columns["num_kept"][row]
            kept_ids, values = self.in_order(layout, ids[:n], codes[:n])
            log_probs = self.decoded(values, columns["log_tail"][row])
            columns["ids"][row] = [*kept_ids, *[0] * (len(ids) - n)]
            columns["log_probs"].append([*log_probs, *[-math.inf] * (len(ids) - n)])
        return columns

    def in_order(self, layout: str, ids: list[int], codes: list[float]) -> tuple[list[int], list[float]]:
        """Section 5, id layouts: kept ids, most likely first, and their levels or log-probs."""
        has_levels = self.identity["precision"] in ("u8", "u10")
        if layout == "plain":
            return ids, list(itertools.accumulate(codes)) if has_levels else codes
        if layout == "split":
            return ids, codes
        assert layout == "ascending"
        ids = list(itertools.accumulate(ids))
        assert ids[0] >= 0 and ids == sorted(set(ids))
        levels = [max(codes) - code if has_levels else code for code in codes]
        order = sorted(range(len(ids)), key=lambda i: (levels[i] if has_levels else -levels[i], ids[i]))
        return [ids[i] for i in order], [levels[i] for i in order]

    def decoded(self, values: list[float], log_tail: float) -> list[float]:
        """Section 5, levels and log-probs."""
        if self.identity["precision"] == "fp32":
            return values
        if self.identity["precision"] == "fp16":
            below = values
        else:
            highest = {"u8": 255, "u10": 1023}[self.identity["precision"]]
            assert max(values) <= highest
            below = [-32 * (level / highest) ** 2 for level in values]
        kept_mass = -math.expm1(log_tail)
        shift = math.log(kept_mass) - math.log(math.fsum(math.exp(b) for b in below))
        return [min(b + shift, 0.0) for b in below]


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def compare(folder: Path) -> int:
    """Everything the two readers say of a cache; returns the number of rows."""
    cache, spec = Cache.open(str(folder)), SpecReader(folder)
    committed = [row for row in spec.samples() if row["shard"] in spec.commits]
    samples = [row for row in committed if spec.first_row(row) is not None]
    assert len(samples) == len(cache)
    shards = {number: spec.shard(number) for number in spec.commits}
    for sample, row in zip(cache, samples, strict=True):
        ranges = row["target_ranges"]
        positions = [p for start, stop in zip(ranges[::2], ranges[1::2], strict=True) for p in range(start, stop)]
        assert (sample.key, sample.source_id) == (row["key"].hex(), row["source_id"])
        assert sample.input_ids.tolist() == row["input_ids"]
        assert sample.target_positions.tolist() == positions
        assert len(positions) == row["num_targets"]
        first_row = spec.first_row(row)
        rows = slice(first_row, first_row + row["num_targets"])
        columns = shards[row["shard"]]
        for name in ("ids", "num_kept", "log_tail", "label_log_prob"):
            assert getattr(sample.topk, name).tolist() == columns[name][rows], name
        np.testing.assert_allclose(sample.topk.log_probs, columns["log_probs"][rows], rtol=1e-6, atol=2e-6)
    compare_statistics(spec, samples, shards)
    text = pq.read_table(spec.checked(spec.plan["vocabulary"])).column("text").to_pylist()
    assert [cache.vocabulary.text(i) for i in range(len(text))] == text
    return sum(commit["num_rows"] for commit in spec.commits.values())


STATISTICS = [
    *(("num_rows", "I"), ("mean_label_log_prob", "f"), ("min_label_log_prob", "f"), ("surprising_row", "I")),
    *(("mean_entropy", "f"), ("max_entropy", "f"), ("mean_kept_mass", "f"), ("num_top_1", "I"), ("num_top_k", "I")),
    *(("doubt", "f"), ("doubtful_row", "I"), ("entropy_bins", "I"), ("kept_mass_bins", "I")),
    *(("label_rank_bins", "I"), ("label_log_prob_bins", "I")),
]
NATS = [step * 10**power for power in (-3, -2, -1, 0) for step in (1, 1.5, 2, 3, 5, 7)] + [10]
TAILS = [step * 10**power for power in range(-7, 0) for step in (1, 3)]


def compare_statistics(spec: SpecReader, samples: list[dict[str, Any]], shards: dict[int, dict[str, Any]]) -> None:
    """Section 10: what each shard's statistics say, against its rows."""
    for number, columns in shards.items():
        commit = spec.commits[number]
        paths = [item["path"] for item in commit["objects"] if item["path"].endswith(".statistics")]
        assert paths in ([], [f"shards/{number:05d}-{commit['attempt']}.statistics"])
        if not paths:
            continue
        data = (spec.folder / paths[0]).read_bytes()
        counts = np.frombuffer(data[:512], "<u4").reshape(4, 32)
        size = (len(data) - 512) // 60
        at = range(512, len(data), 4 * size)
        found = {
            name: struct.unpack_from(f"<{size}{kind}", data, i) for (name, kind), i in zip(STATISTICS, at, strict=True)
        }
        inside = {spec.first_row(row): row for row in samples if row["shard"] == number}
        assert len(inside) == size
        total = np.zeros((4, 32), int)
        for i, (first_row, row) in enumerate(sorted(inside.items())):
            ranges = row["target_ranges"]
            targets = [p for a, b in zip(ranges[::2], ranges[1::2], strict=True) for p in range(a, b)]
            rows = [
                statistics_of_row(
                    {name: column[first_row + m] for name, column in columns.items()}, row["input_ids"][p]
                )
                for m, p in enumerate(targets)
            ]
            total += sum(np.array([[b == i for i in range(32)] for b in r["bins"]]) for r in rows)
            for name, value in statistics_of_sample(rows).items():
                assert found[name][i] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert (counts.sum(1) == commit["num_rows"]).all() and (counts == total).all()


def statistics_of_row(row: dict[str, Any], label: int) -> dict[str, Any]:
    """Section 10, of one row."""
    kept, log_probs = row["ids"][: row["num_kept"]], row["log_probs"][: row["num_kept"]]
    outcomes = [*log_probs, row["log_tail"]]
    entropy = -sum(math.exp(x) * x for x in outcomes if x > -math.inf)
    rank = kept.index(label) + 1 if label in kept else 0
    digits = len(f"{rank - 1:b}") if rank > 1 else 0
    bins = (
        sum(edge <= entropy for edge in NATS),
        sum(edge <= math.exp(row["log_tail"]) for edge in TAILS),
        digits if rank else 31,
        sum(edge <= -row["label_log_prob"] for edge in [*NATS, 15, 20, 30]),
    )
    doubt = 0.0 if rank else math.exp(log_probs[0])
    mass = sum(map(math.exp, log_probs))
    return {"lp": row["label_log_prob"], "entropy": entropy, "mass": mass, "rank": rank, "doubt": doubt, "bins": bins}


def statistics_of_sample(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Section 10, of one sample."""
    lps, entropies, doubts = ([row[name] for row in rows] for name in ("lp", "entropy", "doubt"))
    masks = {
        f"{name}_bins": sum({1 << row["bins"][i] for row in rows})
        for i, name in enumerate(("entropy", "kept_mass", "label_rank", "label_log_prob"))
    }
    return {
        "num_rows": len(rows),
        "mean_label_log_prob": sum(lps) / len(rows),
        "min_label_log_prob": min(lps),
        "surprising_row": lps.index(min(lps)),
        "mean_entropy": sum(entropies) / len(rows),
        "max_entropy": max(entropies),
        "mean_kept_mass": sum(row["mass"] for row in rows) / len(rows),
        "num_top_1": sum(row["rank"] == 1 for row in rows),
        "num_top_k": sum(row["rank"] > 0 for row in rows),
        "doubt": max(doubts),
        "doubtful_row": doubts.index(max(doubts)),
        **masks,
    }


@pytest.mark.parametrize("layout", ID_LAYOUTS)
@pytest.mark.parametrize(
    ("container", "precision"), [("zarr", "u8"), ("zarr", "fp16"), ("arrow", "u10"), ("arrow", "fp32")]
)
def test_a_reader_written_from_the_specification(tmp_path: Path, container: str, precision: str, layout: str) -> None:
    samples, topks = make_samples(14, k=5, vocab_size=50, seed=3)
    topks = [topk.keep_mass(0.98) if i % 2 else topk for i, topk in enumerate(topks)]
    identity = make_identity(container=container, precision=precision, id_layout=layout, k=5, shard_rows=40)
    write_cache(str(tmp_path), samples, topks, identity=identity, columns={"weight": [0.5] * 14}, commit_shards=2)
    unfinished = compare(tmp_path)
    write_cache(str(tmp_path), samples, topks, identity=identity, columns={"weight": [0.5] * 14})
    assert 0 < unfinished < compare(tmp_path) == sum(len(topk) for topk in topks)


@pytest.mark.parametrize("num_shards", [None, 2])
@pytest.mark.parametrize("container", CONTAINERS)
def test_without_some_samples(tmp_path: Path, container: str, num_shards: int | None) -> None:
    samples, topks = make_samples(14, k=5, vocab_size=50, seed=3)
    identity = make_identity(container=container, k=5, shard_rows=40)
    excluded = {0: "first of its shard", 3: "one", 4: "behind the other", 9: "last of its shard"}
    write_cache(str(tmp_path), samples, topks, identity=identity, excluded=excluded, commit_shards=num_shards)
    if num_shards is None:
        assert compare(tmp_path) == sum(len(topk) for i, topk in enumerate(topks) if i not in excluded)
    else:
        assert 0 < compare(tmp_path) < Cache.open(str(tmp_path)).plan.num_rows


@pytest.mark.parametrize("container", CONTAINERS)
def test_more_data_behind_what_is_there(tmp_path: Path, container: str) -> None:
    samples, topks = make_samples(14, k=5, vocab_size=50, seed=3)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(container=container, k=5, shard_rows=40))
    manifest = {path: path.read_bytes() for path in tmp_path.glob("manifest.*")}
    for more in (make_samples(3, k=5, vocab_size=50, seed=seed) for seed in (4, 5)):
        extend_cache(open_store(str(tmp_path)), *more)
        topks += more[1]
    num_rows = sum(map(len, topks))
    assert compare(tmp_path) == num_rows
    for path, data in manifest.items():
        path.write_bytes(data)  # of fewer shards than are planned
    assert compare(tmp_path) == num_rows


@pytest.mark.parametrize("container", CONTAINERS)
def test_without_ids(tmp_path: Path, container: str) -> None:
    samples, topks = make_samples(60, k=5, vocab_size=50, seed=3, max_targets=250)
    rows = [TopKLogProbs.of_labels(topk.label_log_prob) for topk in topks]
    identity = make_identity(container=container, role="reference", k=0, shard_rows=5000)
    write_cache(str(tmp_path), samples, rows, identity=identity)
    assert compare(tmp_path) == sum(map(len, rows)) > 4096


@pytest.mark.parametrize("container", CONTAINERS)
def test_more_than_one_chunk_and_block(tmp_path: Path, container: str) -> None:
    samples, topks = make_samples(40, k=20, vocab_size=64, seed=4, max_targets=250)
    identity = make_identity(container=container, precision="u10", k=20, vocab_size=64, shard_rows=10_000)
    write_cache(str(tmp_path), samples, topks, identity=identity)
    assert compare(tmp_path) > 4096
    sizes = [item.size for record in Cache.open(str(tmp_path)).shards.values() for item in record.objects]
    assert max(sizes) > 65536


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_golden_caches_stay_readable(name: str) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    cache = Cache.open(str(GOLDEN / name))
    assert compare(GOLDEN / name) == len(expected["ids"])
    found = TopKLogProbs.concatenate([cache.read_shard(shard) for shard in sorted(cache.shards)])
    assert found.ids.tolist() == expected["ids"]
    np.testing.assert_allclose(np.exp(found.log_probs), expected["probs"], atol=1e-6)
    assert cache.identity.precision in name and cache.identity.container in name
    assert cache.identity.id_layout in name or cache.identity.id_layout == "plain"


def test_there_are_golden_caches_of_every_encoding() -> None:
    names = [path.name for path in GOLDEN.iterdir() if path.is_dir()]
    assert all(any(precision in name for name in names) for precision in PRECISIONS)
    assert all(any(container in name for name in names) for container in CONTAINERS)
    assert all(any(layout in name for name in names) for layout in ID_LAYOUTS if layout != "plain")
    assert {name.split("-")[-1] for name in names} >= {"excluded", "extended", "labels", "statistics"}
