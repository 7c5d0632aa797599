"""Data that is missing or not what it is said to be is refused before the run has a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.told import Problem, only

Refusal = Callable[..., list[Problem]]
CIFAR = ["dataset=cifar100", "objective=ce", "student=resnet8", "hardware=cpu", "hardware.threads=1", "run.dry=true"]


def relabelled(source: Path, folder: Path, split: str, change: Callable[[list[int]], list[int]], names: int | None = None) -> Path:
    """A copy of a data set in which the labels of one split are changed, without names for the classes unless so many are given."""
    folder.mkdir()
    for file in source.glob("*.parquet"):
        table = pq.read_table(file)
        if file.stem == split:
            at = table.column_names.index("fine_label")
            table = table.set_column(at, "fine_label", pa.array(change(table["fine_label"].to_pylist()), pa.int64()))
        pq.write_table(table if names else table.replace_schema_metadata(None), folder / file.name)
    return folder


def at_row(row: int, value: int) -> Callable[[list[int]], list[int]]:
    return lambda labels: [value if i == row else label for i, label in enumerate(labels)]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("value", [100, -1])
def test_a_label_out_of_range_is_refused_with_its_row(
    refusal: Refusal, tiny_cifar100: Path, tmp_path: Path, split: str, value: int
) -> None:
    path = relabelled(tiny_cifar100, tmp_path / "data", split, at_row(13, value))
    problem = only(refusal("train", *CIFAR, f"dataset.path={path}"))
    assert problem.head == f"dataset.classes: {split} row 13: label {value} is outside 0..99 (1 such rows in column fine_label)"
    assert str(path) in problem.where
    assert "dataset.classes=101" in problem.remedy if value == 100 else "-1" in problem.remedy


def test_a_label_that_has_no_name_is_refused(refusal: Refusal, tiny_cifar100: Path, tmp_path: Path) -> None:
    """The file's own class names say how many there are: the library that reads it objects, and its words are passed on."""
    path = relabelled(tiny_cifar100, tmp_path / "data", "train", at_row(13, 100), names=100)
    problem = only(refusal("train", *CIFAR, f"dataset.path={path}"))
    assert problem.key.startswith("dataset.")
    assert "100" in problem.head


def test_an_empty_class_is_refused(refusal: Refusal, tiny_cifar100: Path, tmp_path: Path) -> None:
    path = relabelled(tiny_cifar100, tmp_path / "data", "train", lambda labels: [3 if x == 42 else x for x in labels], names=100)
    problem = only(refusal("train", *CIFAR, f"dataset.path={path}"))
    assert problem.head == "dataset.classes: 1 of 100 classes have no training rows: fine_label42"
    assert problem.remedy.startswith("add rows of these classes")


def test_a_class_emptied_by_a_subset_is_refused_in_a_comparison_too(refusal: Refusal, tiny_cifar100: Path, tmp_path: Path) -> None:
    path = relabelled(tiny_cifar100, tmp_path / "data", "train", lambda labels: [3 if x == 42 else x for x in labels], names=100)
    assert "no training rows" in only(refusal("train", *CIFAR, f"dataset.path={path}", "run.seeds=[1,2]")).head


def test_a_missing_path_is_refused_with_what_to_put_there(refusal: Refusal) -> None:
    problem = only(refusal("train", *CIFAR, "dataset.path=nowhere"))
    assert problem.head == "dataset.path: no such folder or file"
    assert problem.where == "nowhere"
    assert "put train*.parquet and test*.parquet with the columns img, fine_label into a folder: dataset.path=FOLDER" in problem.remedy
    assert "uoft-cs/cifar100" in problem.remedy


def test_data_that_must_come_from_the_hub_is_refused_offline(refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    problem = only(refusal("train", *CIFAR))
    assert problem.head.startswith("dataset.hub: the hub data set uoft-cs/cifar100 cannot be had (")
    assert "dataset.path=FOLDER" in problem.remedy


def test_an_empty_folder_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    assert only(refusal("train", *CIFAR, f"dataset.path={tmp_path / 'here'}")).head == "dataset.path: nothing readable lies here"


def test_a_missing_split_is_refused(refusal: Refusal, tiny_cifar100: Path) -> None:
    problem = only(refusal("train", *CIFAR, f"dataset.path={tiny_cifar100}", "dataset.splits.test=valid"))
    assert problem.key == "dataset.splits.test"
    assert "dataset.splits.test=test" in problem.remedy


def test_a_missing_column_is_refused_with_those_that_are_there(refusal: Refusal, tiny_cifar100: Path) -> None:
    problem = only(refusal("train", *CIFAR, f"dataset.path={tiny_cifar100}", "dataset.columns.label=fein_label"))
    assert problem.key == "dataset.columns.label"
    assert "fine_label" in problem.remedy


def test_a_subset_larger_than_the_data_is_refused(refusal: Refusal, tiny_cifar100: Path) -> None:
    problem = only(refusal("train", *CIFAR, f"dataset.path={tiny_cifar100}", "dataset.subset=999"))
    assert (problem.key, problem.where) == ("dataset.subset", "command line")
    assert "200" in problem.remedy


def test_pictures_of_another_size_are_refused(refusal: Refusal, tiny_cifar100: Path) -> None:
    problem = only(refusal("train", *CIFAR, f"dataset.path={tiny_cifar100}", "dataset.input_shape=[3,64,64]"))
    assert problem.key.startswith("dataset.")
    assert "32" in problem.head
    assert "64" in problem.head + problem.remedy
