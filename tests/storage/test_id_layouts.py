"""What each layout puts into its columns, written out; columns that no writer makes."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache_storage.commit import create_or_continue, load_identity
from logitcache_storage.encoding import decode, encode
from logitcache_storage.errors import CorruptionError, InputError
from logitcache_storage.id_layouts import default_id_layout, id_layout
from logitcache_storage.objects import open_store
from logitcache_storage.record_json import parse, to_json
from logitcache_storage.schema import ID_LAYOUTS, CacheIdentity
from logitcache_storage.testing import make_identity, make_samples, make_topk, write_cache

IDS = np.int32([[70_000, 5, 9], [3, 140_001, 0]])
LEVELS = np.uint8([[0, 40, 40], [0, 90, 90]])
KEPT = np.array([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("plain", {"ids": IDS, "codes": [[0, 40, 0], [0, 90, 0]]}),
        ("ascending", {"ids": [[5, 4, 69_991], [3, 139_998, 0]], "codes": [[0, 0, 40], [90, 0, 0]]}),
        (
            "split",
            {"ids": [[4464, 5, 9], [3, 8929, 0]], "ids_high": [[1, 0, 0], [0, 2, 0]], "codes": LEVELS},
        ),
    ],
)
def test_columns(layout: str, expected: dict[str, object]) -> None:
    columns = id_layout(layout).pack(IDS, LEVELS, KEPT)
    assert {name: column.tolist() for name, column in columns.items()} == {
        name: np.asarray(values).tolist() for name, values in expected.items()
    }


def test_log_probs_stand_beside_their_ids() -> None:
    values = np.float32([[-0.0, -1.5, -1.5], [0.0, -2.5, -2.5]])
    columns = id_layout("ascending").pack(IDS, values, KEPT)
    assert columns["codes"].tolist() == [[-1.5, -1.5, 0.0], [0.0, -2.5, 0.0]]
    assert np.signbit(columns["codes"][0, 2])


def steps(changed: dict[tuple[int, int], int]) -> dict[str, np.ndarray]:
    columns = encode(make_topk(4, 3, 9).keep_mass(0.9), "u8", "ascending")
    ids = columns["ids"].copy()
    for place, step in changed.items():
        ids[place] = step
    return {**columns, "num_kept": np.int32([3, 3, 2, 1]), "ids": ids}


@pytest.mark.parametrize(
    "changed",
    [{(0, 1): 0}, {(1, 2): -1}, {(2, 1): 0}, {(0, 0): -1}, {(3, 0): -5}, {(0, 0): 2**31 - 1, (0, 1): 2}],
    ids=["twice", "falling", "twice and last", "negative", "negative and alone", "wrapped"],
)
def test_ids_that_do_not_ascend(changed: dict[tuple[int, int], int]) -> None:
    with pytest.raises(CorruptionError, match="shards/7: ids that do not ascend"):
        decode(steps({(i, j): 1 for i in range(4) for j in range(3)} | changed), "u8", "ascending", where="shards/7")


def test_what_stands_beyond_the_kept_is_not_read() -> None:
    """Whatever it is: the largest numbers that fit, negative ones, infinities."""
    topk = make_topk(6, 5, 40).keep_mass(0.8)
    for precision, junk in (("u8", 255), ("u10", 65535), ("fp16", np.inf), ("fp32", np.nan)):
        columns = encode(topk, precision, "ascending")
        expected = decode(columns, precision, "ascending")
        for step in (-7, 2**31 - 1):
            codes = np.where(topk.kept, columns["codes"], columns["codes"].dtype.type(junk))
            changed = {**columns, "ids": np.where(topk.kept, columns["ids"], np.int32(step)), "codes": codes}
            assert decode(changed, precision, "ascending").equals(expected)


def test_levels_that_fall() -> None:
    columns = {**encode(make_topk(1, 3, 9), "u8", "split"), "codes": np.uint8([[0, 7, 6]])}
    with pytest.raises(CorruptionError, match="shards/7: levels that fall along a row"):
        decode(columns, "u8", "split", where="shards/7")


def test_every_layout_has_a_name() -> None:
    assert [type(id_layout(name)).__name__ for name in ID_LAYOUTS] == ["PlainLayout", "AscendingLayout", "SplitLayout"]
    with pytest.raises(InputError, match="unknown id layout 'sorted'; choose from plain, ascending, split"):
        id_layout("sorted")


def test_layouts_of_new_caches() -> None:
    assert default_id_layout("zarr", 1 << 30) == "ascending"
    assert [default_id_layout("arrow", size) for size in (1 << 24, (1 << 24) + 1)] == ["split", "plain"]


def test_identities_name_their_layout() -> None:
    values = to_json(make_identity(container="arrow"))
    assert values["id_layout"] == "split"
    early = {name: value for name, value in values.items() if name != "id_layout"}
    assert parse(CacheIdentity, early, where="x").id_layout == "plain"
    with pytest.raises(InputError, match="id_layout must be one of plain, ascending, split, got 'ranked'"):
        parse(CacheIdentity, {**values, "id_layout": "ranked"}, where="x")
    with pytest.raises(InputError, match="vocab_size must be <= 16777216 with id_layout 'split', got 16777217"):
        make_identity(id_layout="split", vocab_size=(1 << 24) + 1)


def test_a_build_goes_on_in_the_layout_that_it_began_with(tmp_path) -> None:
    samples, topks = make_samples(6, k=4, vocab_size=30)
    url, began = str(tmp_path), make_identity(k=4, vocab_size=30, shard_rows=12, id_layout="plain")
    write_cache(url, samples, topks, identity=began, commit_shards=1)
    assert not create_or_continue(open_store(url), make_identity(k=4, vocab_size=30, shard_rows=12))
    assert load_identity(open_store(url)).id_layout == "plain"
