"""Rows belong to their place and view; what is torn, moved or missing is never used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdrun.cache.archive import pack, unpack
from kdrun.cache.manifest import MANIFEST, caches, must_match, open_folder, read_manifest, views_of
from kdrun.cache.store import Store, fields
from kdrun.errors import Refused

RECORD = np.dtype([("values", "<f4", (3,)), ("index", "<u2")])
COUNTS = np.array([2, 1, 0, 4, 1])
MADE_OF = {"teacher": {"sha256": "a"}, "data": "b", "vocabulary": None, "seed": 1, "format": {"name": "dense"}, "autocast": "fp32"}


def records(count: int, seed: int = 0) -> np.ndarray:
    source = np.random.default_rng(seed)
    made = np.zeros(count, RECORD)
    made["values"], made["index"] = source.normal(size=(count, 3)), source.integers(1000, size=count)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = tmp_path / "cache" / "world-mlp-0"
    open_folder(folder, MADE_OF, {"record": fields(RECORD), "samples": 5, "counts": COUNTS.tolist(), "tree": {}})
    return Store(folder, RECORD, COUNTS)


def again(store: Store) -> Store:
    """As another process opens it."""
    return Store(store.folder, RECORD, COUNTS)


def test_rows_come_back_in_any_order_and_from_any_process(store: Store) -> None:
    rows = records(6)
    store.write(3, np.array([3, 0]), rows)  # four items of sample 3, then two of sample 0
    found = again(store).read(3, np.array([0, 3]))
    assert found is not None
    assert np.array_equal(found, np.concatenate([rows[4:], rows[:4]]))
    assert store.filled(3).tolist() == [True, False, False, True, False]
    assert views_of(store.folder) == [3]


def test_what_is_missing_in_a_view_is_missing_however_full_another_one_is(store: Store) -> None:
    store.write(0, np.arange(5), records(8))
    assert store.read(0, np.arange(5)) is not None
    assert store.read(1, np.array([0])) is None
    store.write(1, np.array([0, 4]), records(3))
    assert store.read(1, np.array([0, 4])) is not None
    assert store.read(1, np.array([0, 1])) is None


def test_a_torn_row_is_missing_and_is_whole_again_when_it_is_written_again(store: Store) -> None:
    rows = records(8)
    store.write(0, np.arange(5), rows)
    file = store.folder / "view-000000.rows"
    content = bytearray(file.read_bytes())
    content[RECORD.itemsize * 4 + 2] ^= 1  # one bit of one item of sample 3
    file.write_bytes(content)
    assert again(store).read(0, np.array([3])) is None
    assert again(store).read(0, np.array([0, 1, 4])) is not None
    again(store).write(0, np.array([3]), rows[3:7])
    assert again(store).read(0, np.arange(5)) is not None


def test_a_row_that_lies_in_another_place_or_view_is_missing(store: Store) -> None:
    one = records(1)
    store.write(0, np.array([1]), one)
    store.write(0, np.array([4]), records(1, 1))
    rows, check = (np.fromfile(store.folder / f"view-000000{kind}", dtype) for kind, dtype in ((".rows", RECORD), (".check", "<u4")))
    rows[7], check[4] = rows[2], check[1]  # sample 4 gets what was said of sample 1, and its checksum
    rows.tofile(store.folder / "view-000000.rows")
    check.tofile(store.folder / "view-000000.check")
    assert again(store).read(0, np.array([4])) is None
    assert again(store).read(0, np.array([1])) is not None
    for kind in (".rows", ".check"):
        shutil.copy(store.folder / f"view-000000{kind}", store.folder / f"view-000007{kind}")
    assert again(store).read(7, np.array([1])) is None


def test_two_writers_fill_one_cache(store: Store) -> None:
    other, rows = again(store), records(8)
    store.write(0, np.array([0, 1]), rows[:3])
    other.write(0, np.array([3, 4]), rows[3:])
    for reader in (store, other):
        found = reader.read(0, np.array([0, 1, 3, 4]))
        assert found is not None
        assert np.array_equal(found, rows)


def test_many_views_do_not_keep_all_files_open(store: Store) -> None:
    for view in range(6):
        store.write(view, np.array([1]), records(1, view))
    assert len(store._views) == 2
    assert all(np.array_equal(store.read(view, np.array([1])), records(1, view)) for view in range(6))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher", {"sha256": "z"}, "another teacher"),
        ("vocabulary", "x", "another tokenizer"),
        ("data", "x", "another data set or transform"),
        ("seed", 2, "another seed"),
        ("autocast", "bf16", "another precision"),
        ("format", {"name": "int8"}, "another format"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_says_of_what(key: str, value: object, words: str, store: Store) -> None:
    must_match(store.folder, MADE_OF)
    other = {**MADE_OF, key: value}
    with pytest.raises(Refused, match=words):
        must_match(store.folder, other)
    with pytest.raises(Refused, match=words):
        open_folder(store.folder, other, {})
    must_match(store.folder, other, leave_out=[key])


def test_a_cache_of_another_layout_is_refused(store: Store) -> None:
    file = store.folder / MANIFEST
    file.write_text(json.dumps({**read_manifest(store.folder), "version": 0}))
    with pytest.raises(Refused, match="another version of kdrun"):
        must_match(store.folder, MADE_OF)
    file.write_text("{")
    with pytest.raises(Refused, match="cannot be read"):
        must_match(store.folder, MADE_OF)
    with pytest.raises(Refused, match="no cache in this folder"):
        read_manifest(store.folder.parent)


@pytest.mark.parametrize("name", ["cache.tar", "cache.tar.gz", "cache.tar.xz"])
def test_a_packed_cache_is_the_same_elsewhere(name: str, store: Store, tmp_path: Path) -> None:
    rows = records(8)
    store.write(0, np.arange(5), rows)
    store.write(2, np.array([1]), rows[:1])
    pack(store.folder, tmp_path / name)
    folder, count = unpack(tmp_path / name, tmp_path / "elsewhere")
    assert count == 6
    assert list(caches(tmp_path / "elsewhere")) == [folder]
    assert np.array_equal(Store(folder, RECORD, COUNTS).read(0, np.arange(5)), rows)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="there already"):
        unpack(tmp_path / name, tmp_path / "elsewhere")
    with pytest.raises(Refused, match="exists already"):
        pack(store.folder, tmp_path / name)


def test_an_archive_that_is_damaged_or_none_leaves_nothing(store: Store, tmp_path: Path) -> None:
    store.write(0, np.arange(5), records(8))
    with open(store.folder / "view-000000.rows", "r+b") as file:
        file.write(b"\xff\xff")
    pack(store.folder, tmp_path / "torn.tar")
    (tmp_path / "text.tar").write_text("no archive")
    for name, words in (("torn.tar", "rows of view 0 are damaged"), ("text.tar", "cannot be read"), ("gone.tar", "cannot be read")):
        with pytest.raises(Refused, match=words):
            unpack(tmp_path / name, tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []
