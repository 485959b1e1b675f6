"""storage/SPEC.md is enough: a reader written from it alone, without the library's, reads what the library reads.

The golden caches were written by `golden/write_golden.py` when format version 1 was fixed; they must stay readable.
"""

from __future__ import annotations

import hashlib
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
from logitcache_storage.schema import CONTAINERS, PRECISIONS
from logitcache_storage.testing import make_identity, make_samples, write_cache

GOLDEN = Path(__file__).parent / "golden"


class SpecReader:
    """A reader in the simplest possible terms; section numbers are those of SPEC.md."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = self.record("cache.json")
        assert self.identity["format_version"] == 1
        self.plan = self.record("plans/00000.json")
        if (folder / "manifest.json").exists():
            commits = self.record("manifest.json")["shards"]
        else:
            commits = [self.record(p.relative_to(folder).as_posix()) for p in (folder / "commits").glob("*.json")]
        self.commits = {commit["shard"]: commit for commit in commits}
        for commit in self.commits.values():
            prefix = f"shards/{commit['shard']:05d}-{commit['attempt']}"
            assert all(item["path"].startswith(prefix) for item in commit["objects"])
            assert commit["num_bytes"] == sum(item["size"] for item in commit["objects"])
            assert commit["num_rows"] == self.plan["shard_num_rows"][commit["shard"]]

    def record(self, path: str) -> dict[str, Any]:
        """Section 2."""
        data = (self.folder / path).read_bytes()
        assert data[:12] == b'{"crc32c": "'
        assert crc32c(data[:12] + b"00000000" + data[20:]) == int(data[12:20], 16)
        return json.loads(data)

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
            assert all(file.metadata.row_group(i).num_rows == 1024 for i in range(file.num_row_groups - 1))
            rows += file.read().to_pylist()
        for row in rows:
            ids, ranges = row["input_ids"], row["target_ranges"]
            packed = struct.pack(f"<q{len(ids)}i{len(ranges)}i", len(ids), *ids, *ranges)
            assert hashlib.blake2b(packed, digest_size=16).digest() == row["key"]
        return rows

    def shard(self, number: int) -> dict[str, list[Any]]:
        """Sections 5 to 7: one list per column and row, log-probs decoded in float64."""
        commit = self.commits[number]
        for item in commit["objects"]:
            self.checked(item)
        path = self.folder / f"shards/{number:05d}-{commit['attempt']}"
        names = ("ids", "codes", "num_kept", "log_tail", "label_log_prob")
        if self.identity["container"] == "zarr":
            group = zarr.open_group(str(path), mode="r")
            assert dict(group.attrs) == {"shard": number, "precision": self.identity["precision"]}
            columns = {name: np.asarray(group[name][:]).tolist() for name in names}
        else:
            with pa.ipc.open_file(str(path) + ".arrow") as file:
                sizes = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
                assert all(size == 4096 for size in sizes[:-1])
                about = json.loads(file.schema.metadata[b"logitcache"])
                assert about == {"shard": number, "precision": self.identity["precision"]}
                columns = {name: file.read_all().column(name).to_pylist() for name in names}
        rows = zip(columns["codes"], columns["num_kept"], columns["log_tail"], strict=True)
        columns["log_probs"] = [self.decoded(*row) for row in rows]
        return columns

    def decoded(self, codes: list[float], num_kept: int, log_tail: float) -> list[float]:
        """Section 5."""
        if self.identity["precision"] == "fp32":
            return [*codes[:num_kept], *[-math.inf] * (len(codes) - num_kept)]
        if self.identity["precision"] == "fp16":
            below = [float(code) for code in codes[:num_kept]]
        else:
            highest = {"u8": 255, "u10": 1023}[self.identity["precision"]]
            levels = [sum(codes[: i + 1]) for i in range(num_kept)]
            assert max(levels) <= highest
            below = [-32 * (level / highest) ** 2 for level in levels]
        kept_mass = -math.expm1(log_tail)
        shift = math.log(kept_mass) - math.log(math.fsum(math.exp(b) for b in below))
        return [*(min(b + shift, 0.0) for b in below), *[-math.inf] * (len(codes) - num_kept)]


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
    samples = [row for row in spec.samples() if row["shard"] in spec.commits]
    assert len(samples) == len(cache)
    shards = {number: spec.shard(number) for number in spec.commits}
    for sample, row in zip(cache, samples, strict=True):
        ranges = row["target_ranges"]
        positions = [p for start, stop in zip(ranges[::2], ranges[1::2], strict=True) for p in range(start, stop)]
        assert (sample.key, sample.source_id) == (row["key"].hex(), row["source_id"])
        assert sample.input_ids.tolist() == row["input_ids"]
        assert sample.target_positions.tolist() == positions
        assert len(positions) == row["num_targets"]
        rows = slice(row["first_row"], row["first_row"] + row["num_targets"])
        columns = shards[row["shard"]]
        for name in ("ids", "num_kept", "log_tail", "label_log_prob"):
            assert getattr(sample.topk, name).tolist() == columns[name][rows], name
        np.testing.assert_allclose(sample.topk.log_probs, columns["log_probs"][rows], rtol=1e-6, atol=2e-6)
    text = pq.read_table(spec.checked(spec.plan["vocabulary"])).column("text").to_pylist()
    assert [cache.vocabulary.text(i) for i in range(len(text))] == text
    return sum(commit["num_rows"] for commit in spec.commits.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_reader_written_from_the_specification(tmp_path: Path, container: str, precision: str) -> None:
    samples, topks = make_samples(14, k=5, vocab_size=50, seed=3)
    topks = [topk.keep_mass(0.98) if i % 2 else topk for i, topk in enumerate(topks)]
    identity = make_identity(container=container, precision=precision, k=5, shard_rows=40)
    write_cache(str(tmp_path), samples, topks, identity=identity, columns={"weight": [0.5] * 14}, commit_shards=2)
    unfinished = compare(tmp_path)
    write_cache(str(tmp_path), samples, topks, identity=identity, columns={"weight": [0.5] * 14})
    assert 0 < unfinished < compare(tmp_path) == sum(len(topk) for topk in topks)


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
    found = cache.read_shard(0)
    assert found.ids.tolist() == expected["ids"]
    np.testing.assert_allclose(np.exp(found.log_probs), expected["probs"], atol=1e-6)
    assert cache.identity.precision in name and cache.identity.container in name


def test_there_are_golden_caches_of_every_encoding() -> None:
    names = [path.name for path in GOLDEN.iterdir() if path.is_dir()]
    assert all(any(precision in name for name in names) for precision in PRECISIONS)
    assert all(any(container in name for name in names) for container in CONTAINERS)
