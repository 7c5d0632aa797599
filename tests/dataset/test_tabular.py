"""Tables of numbers and categories: scaling, categories, splits, repeated rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdrun.dataset.tabular import TabularData, copies
from kdrun.errors import Refused
from tests.conftest import Outcome
from tests.dataset.connections import CONF, write_connections

REAL = pytest.mark.skipif("KDRUN_DATA" not in os.environ, reason="KDRUN_DATA does not name the folder of real data")


def write(folder: Path, train: list[str], test: list[str], header: str = "size,colour,kind,label") -> Path:
    for name, lines in (("train", train), ("test", test)):
        (folder / f"{name}.csv").write_text("\n".join([header, *lines]))
    return folder


def tabular(where: Path, **fields: Any) -> TabularData:
    return TabularData("toys", **({"path": str(where), "categorical": ["colour"], "ignored": ["kind"]} | fields))


TRAIN = ["1,red,a,x", "3,blue,b,y", "2,red,c,x", "5,green,d,x"]
TEST = ["9,blue,e,y", "0,black,f,x"]


def configured(name: str, **fields: Any) -> TabularData:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    node.pop("_target_")
    return TabularData(**(node | fields))


def test_numbers_are_scaled_by_the_training_rows_and_categories_are_one_hot(tmp_path: Path) -> None:
    data = tabular(write(tmp_path, TRAIN, TEST)).load()
    assert data.class_names == ("x", "y")
    assert data.input_shape == (4,)  # size; blue, green, red
    assert data.split("train").storage.inputs.tolist() == [[0, 0, 0, 1], [0.5, 1, 0, 0], [0.25, 0, 0, 1], [1, 0, 1, 0]]  # type: ignore[attr-defined]
    # Beyond the training rows' range; black is no colour that they have.
    assert data.split("test").storage.inputs.tolist() == [[2, 1, 0, 0], [-0.25, 0, 0, 0]]  # type: ignore[attr-defined]
    assert data.split("train").targets.tolist() == [0, 1, 0, 0]
    assert (data.mean, data.std) == ((1, 0, 0, 0), (4, 1, 1, 1))
    assert data.total_ids == 6


def test_held_out_rows_do_not_touch_the_scaling(tmp_path: Path) -> None:
    rows = [f"{i},red,a,{'xy'[i % 2]}" for i in range(60)]
    data = tabular(write(tmp_path, rows, TEST), validation=0.2).load()
    train, held = data.split("train"), data.split("validation")
    numbers = torch.arange(60.0)[train.ids]
    low, high = numbers.min(), numbers.max()
    torch.testing.assert_close(train.storage.inputs[:, 0], (numbers - low) / (high - low))  # type: ignore[attr-defined]
    torch.testing.assert_close(held.storage.inputs[:, 0], (torch.arange(60.0)[held.ids] - low) / (high - low))  # type: ignore[attr-defined]
    assert set(train.ids.tolist()).isdisjoint(held.ids.tolist())


def test_a_subset_sees_the_same_features_as_the_whole(tmp_path: Path) -> None:
    rows = [f"{i},{'red' if i else 'grey'},a,{'xy'[i % 2]}" for i in range(60)]
    folder = write(tmp_path, rows, TEST)
    whole, part = tabular(folder).load(), tabular(folder, subset=20).load()
    assert len(part.split("train")) == 20
    assert (part.mean, part.std, part.input_shape) == (whole.mean, whole.std, whole.input_shape)
    ids = part.split("train").ids
    assert torch.equal(part.split("train").storage.inputs, whole.split("train").storage.inputs[ids])  # type: ignore[attr-defined]


def test_a_missing_number_is_the_smallest_and_said_to_be_missing(tmp_path: Path) -> None:
    data = tabular(write(tmp_path, ["1,red,a,x", ",blue,b,y", "5,,c,x"], ["3,red,d,y", ",red,e,x"])).load()
    assert data.input_shape == (5,)  # size, its absence; no colour, blue, red
    assert data.split("train").storage.inputs.tolist() == [[0, 0, 0, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]  # type: ignore[attr-defined]
    assert data.split("test").storage.inputs[:, :2].tolist() == [[0.5, 0], [0, 1]]  # type: ignore[attr-defined]


def test_a_constant_column_is_no_division_by_zero(tmp_path: Path) -> None:
    data = tabular(write(tmp_path, ["7,red,a,x", "7,blue,b,y"], ["8,red,c,x"])).load()
    assert data.split("train").storage.inputs[:, 0].tolist() == [0, 0]  # type: ignore[attr-defined]
    assert data.split("test").storage.inputs[:, 0].tolist() == [1]  # type: ignore[attr-defined]


def test_rare_categories_share_a_column(tmp_path: Path) -> None:
    data = tabular(write(tmp_path, TRAIN, TEST), min_count=2).load()
    assert data.input_shape == (3,)  # size; red, rare
    assert data.split("train").storage.inputs[:, 1:].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]  # type: ignore[attr-defined]
    assert data.split("test").storage.inputs[:, 1:].tolist() == [[0, 1], [0, 1]]  # type: ignore[attr-defined]


def test_groups_put_labels_together(tmp_path: Path) -> None:
    rows = ["1,red,a,x", "2,red,a,z", "3,red,a,y"]
    data = tabular(write(tmp_path, rows, TEST), groups={"first": ["y"], "others": ["x", "z"]}).load()
    assert data.class_names == ("first", "others")
    assert data.split("train").targets.tolist() == [1, 1, 0]
    with pytest.raises(Refused, match="labels that no class holds: z"):
        tabular(write(tmp_path, rows, TEST), groups={"first": ["y"], "second": ["x"]}).load()


def test_without_a_test_file_a_share_is_held_out_first(tmp_path: Path) -> None:
    rows = [f"{i},red,a,{'xy'[i % 2]}" for i in range(200)]
    folder = write(tmp_path, rows, TEST)
    data = tabular(folder, files={"train": "train.csv"}, test=0.2, validation=0.1).load()
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sum(sizes.values()) == 200
    assert 25 < sizes["test"] < 55
    assert 8 < sizes["validation"] < 30
    again = tabular(folder, files={"train": "train.csv"}, test=0.2, validation=0.1).load()
    assert again.fingerprint == data.fingerprint


def test_smaller_classes_are_repeated_until_all_have_as_many(tmp_path: Path) -> None:
    rows = [f"{i},red,a,{'y' if i % 10 == 0 else 'x'}" for i in range(100)]
    plain = tabular(write(tmp_path, rows, TEST), validation=0.1).load()
    data = tabular(tmp_path, validation=0.1, oversample=True).load()
    train, original = data.split("train"), plain.split("train")
    counts = torch.bincount(original.targets)
    assert torch.bincount(train.targets).tolist() == [counts.max()] * 2
    assert len(data.split("validation")) == len(plain.split("validation"))  # nothing else is repeated
    n = len(original)
    assert torch.equal(train.ids[:n], original.ids)
    assert train.ids[n:].tolist() == list(range(102, data.total_ids))  # a copy is a sample of its own
    own = {tuple(row) for row in original.storage.inputs[original.targets == 1].tolist()}  # type: ignore[attr-defined]
    assert {tuple(row) for row in train.storage.inputs[n:].tolist()} <= own  # type: ignore[attr-defined]
    assert int((data.labels_by_id() >= 0).sum()) == len(train)


def test_copies_are_drawn_by_hash_and_with_replacement() -> None:
    targets = torch.tensor([0] * 50 + [1] * 3 + [3])
    chosen = copies(targets, torch.arange(54))
    assert torch.equal(chosen, copies(targets, torch.arange(54)))
    assert torch.bincount(targets[chosen]).tolist() == [0, 47, 0, 49]
    assert len(set(chosen[targets[chosen] == 1].tolist())) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": {"train": "train.csv"}}, "there is no test file"),
        ({"test": 0.2}, "there is a test file"),
        ({"files": {"test": "test.csv"}}, "names train"),
        ({"min_count": 0}, "at least 1"),
        ({"validation": 1.0}, "share"),
    ],
)
def test_settings_that_no_run_can_use_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tabular(tmp_path, **fields)


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDRUN_DATA", raising=False)
    with pytest.raises(Refused, match="KDRUN_DATA"):
        TabularData("toys").load()
    with pytest.raises(Refused, match="no such file"):
        tabular(tmp_path).load()
    with pytest.raises(Refused, match="no column 'clour'"):
        tabular(write(tmp_path, TRAIN, TEST), categorical=["clour", "colour"]).load()
    with pytest.raises(Refused, match=r"cannot be read.*\n.*\n.*dataset\.categorical"):
        tabular(tmp_path, categorical=[]).load()


def test_the_folder_is_found_by_the_name_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toys").mkdir()
    write(tmp_path / "toys", TRAIN, TEST)
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    assert tabular(tmp_path, path=None).load().total_ids == 6
    assert tabular(tmp_path, path=None, folder="toys").load().total_ids == 6


def test_small_files_in_the_schema_of_nsl_kdd_make_a_run(tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    folder = write_connections(tmp_path / "files")
    base = ["dataset=nsl_kdd", f"dataset.path={folder}", "objective=ce", "student=mlp", "optim.epochs=1", "hardware=cpu", "--quiet"]
    assert kdrun("train", *base, f"run.dir={tmp_path / 'run'}").code == 0


@pytest.mark.realdata
@REAL
def test_nsl_kdd_has_its_usual_counts() -> None:
    data = configured("nsl_kdd").load()
    assert torch.bincount(data.split("train").targets).tolist() == [13449, 9234, 2289, 209, 11]
    assert torch.bincount(data.split("test").targets).tolist() == [9711, 7458, 2421, 2754, 200]
    assert data.input_shape == (38 + 3 + 66 + 11,)
    train = data.split("train").storage.inputs  # type: ignore[attr-defined]
    assert (train.min().item(), train.max().item()) == (0, 1)


@pytest.mark.realdata
@REAL
def test_the_criteo_sample_is_read() -> None:
    data = configured("criteo", validation=0.1, oversample=True).load()
    assert data.class_names == ("skipped", "clicked")
    assert (
        sum(len(s) for n, s in data.splits.items() if n != "train") + len(configured("criteo", validation=0.1).load().split("train")) == 200
    )
    assert torch.bincount(data.split("train").targets).unique().numel() == 1
