from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from kdrun.dataset.images import ImageData
from kdrun.errors import Problem, Refused
from tests.dataset import builders
from tests.dataset.builders import hub_table, labels, pictures, png, splits, write_disk, write_folder, write_npz, write_parquet

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "parquet": write_parquet,
    "hub clone": lambda folder: write_parquet(folder, pattern="data/{}-00000-of-00001.parquet"),
    "parquet subfolders": lambda folder: write_parquet(folder, pattern="{}/part0.parquet"),
    "renamed columns": lambda folder: write_parquet(folder, image="image", label="labels"),
    "image folder": write_folder,
    "save_to_disk": write_disk,
    "one npz": lambda folder: write_npz(folder, one_file=True),
    "npz per split": lambda folder: write_npz(folder, one_file=False),
}


def refusal(data: ImageData) -> Problem:
    with pytest.raises(Refused) as refused:
        data.load()
    problem = refused.value.problems[0]
    assert problem.remedy
    assert problem.key.startswith("dataset.")
    return problem


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_data(tmp_path: Path, layout: str) -> None:
    loaded = ImageData("x", path=str(LAYOUTS[layout](tmp_path / "data"))).load()
    assert loaded.classes == 3
    assert loaded.input_shape == (3, 8, 8)
    assert loaded.total_ids == 18
    for split, (images, targets) in splits().items():
        part = loaded.split(split)
        assert torch.equal(part.storage.inputs, torch.from_numpy(np.moveaxis(images, 3, 1).copy()))  # type: ignore[attr-defined]
        assert part.targets.tolist() == targets
    assert loaded.split("test").ids.tolist() == list(range(12, 18))


@pytest.mark.parametrize("layout", ["parquet", "image folder", "save_to_disk"])
def test_class_names_come_from_the_files(tmp_path: Path, layout: str) -> None:
    assert ImageData("x", path=str(LAYOUTS[layout](tmp_path / "data"))).load().class_names == ("ant", "bee", "cat")


def test_a_class_that_the_test_folder_lacks_does_not_shift_the_others(tmp_path: Path) -> None:
    data = splits()
    images, targets = data["test"]
    kept = [i for i, t in enumerate(targets) if t != 0]
    data["test"] = images[kept], [targets[i] for i in kept]
    loaded = ImageData("x", path=str(write_folder(tmp_path, data))).load()
    assert sorted(set(loaded.split("test").targets.tolist())) == [1, 2]


def test_a_missing_folder_says_what_to_put_where(tmp_path: Path) -> None:
    data = ImageData("cifar100", hub="uoft-cs/cifar100", path=str(tmp_path / "no"), columns={"image": "img", "label": "fine_label"})
    problem = refusal(data)
    assert (problem.key, problem.where) == ("dataset.path", str(tmp_path / "no"))
    for part in ("train*.parquet", "test*.parquet", "img, fine_label", "hf download uoft-cs/cifar100 --repo-type dataset"):
        assert part in problem.remedy


def test_no_path_and_no_hub_says_what_to_put_where() -> None:
    assert "dataset.path=FOLDER" in refusal(ImageData("own")).remedy


def test_an_unreachable_hub_says_how_to_get_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'ILSVRC/imagenet-1k' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    problem = refusal(
        ImageData("imagenet", hub="ILSVRC/imagenet-1k", access="gated: accept its terms", splits={"train": "train", "test": "validation"})
    )
    assert problem.key == "dataset.hub"
    assert "OfflineModeIsEnabled" in problem.what
    assert "hf download ILSVRC/imagenet-1k" in problem.remedy
    assert "validation*.parquet" in problem.remedy
    assert "gated: accept its terms" in problem.remedy


def test_the_hub_gives_its_splits_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        theirs: hub_table([png(i) for i in images], t) for theirs, (images, t) in zip(("train", "valid"), splits().values(), strict=True)
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: datasets.DatasetDict(tables))
    assert len(ImageData("x", hub="a/b", splits={"train": "train", "test": "valid"}).load().split("test")) == 6
    assert "dataset.splits.test=valid" in refusal(ImageData("x", hub="a/b")).remedy


def test_a_folder_without_a_test_split_names_what_is_there(tmp_path: Path) -> None:
    images, targets = splits()["test"]
    write_folder(tmp_path, {"train": (images, targets), "val": (images, targets)})
    problem = refusal(ImageData("x", path=str(tmp_path)))
    assert "no test split" in problem.what
    assert "dataset.splits.test=val" in problem.remedy


def test_a_table_without_a_test_split_names_what_is_there(tmp_path: Path) -> None:
    for pattern in ("data/{}-00000-of-00001.parquet", "{}/part0.parquet"):
        folder = tmp_path / pattern[:2]
        write_parquet(folder, {"train": splits()["train"], "valid": splits()["test"]}, pattern)
        assert refusal(ImageData("x", path=str(folder))).remedy == "there is valid: e.g. dataset.splits.test=valid"


def test_a_split_of_the_files_can_be_the_validation_split(tmp_path: Path) -> None:
    data = {**splits(), "valid": (pictures(3, 9), [0, 1, 2])}
    names = {"train": "train", "test": "test", "validation": "valid"}
    loaded = ImageData("x", path=str(write_parquet(tmp_path, data)), splits=names).load()
    assert loaded.split("validation").ids.tolist() == [18, 19, 20]
    assert loaded.total_ids == 21


def test_a_folder_with_nothing_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert "nothing readable" in refusal(ImageData("x", path=str(tmp_path))).what


def test_a_single_table_is_refused_for_want_of_a_test_split(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    assert "no test split" in refusal(ImageData("x", path=str(tmp_path / "train.parquet"))).what


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.parquet").write_bytes(b"a download that was broken off")
    assert ImageData("x", path=str(write_parquet(tmp_path))).load().total_ids == 18


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"not a table")
    assert "cannot be read as parquet" in refusal(ImageData("x", path=str(tmp_path))).what


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "parquet", {"train": splits()["train"], "test": (pictures(0), [])})
    assert '"test" corresponds to no data' in refusal(ImageData("x", path=str(tmp_path / "parquet"))).what
    np.savez(tmp_path / "data.npz", x_train=pictures(3), y_train=[0, 1, 2], x_test=pictures(0), y_test=[])
    assert refusal(ImageData("x", path=str(tmp_path / "data.npz"))).what == "the test split is empty"


@pytest.mark.parametrize(
    ("columns", "key"), [({"label": "coarse"}, "dataset.columns.label"), ({"image": "picture"}, "dataset.columns.image")]
)
def test_a_wrong_column_lists_those_there_are(tmp_path: Path, columns: dict[str, str], key: str) -> None:
    problem = refusal(ImageData("x", path=str(write_parquet(tmp_path)), columns=columns))
    assert problem.key == key
    assert "img, label" in problem.what


def test_a_column_of_no_images_is_refused(tmp_path: Path) -> None:
    assert "holds no images" in refusal(ImageData("x", path=str(write_parquet(tmp_path)), columns={"image": "label"})).what


def test_further_columns_become_rows_of_each_batch(tmp_path: Path) -> None:
    data = ImageData("x", path=str(write_parquet(tmp_path)), columns={"again": "label"}, validation=0.3).load()
    batch = data.rows("train", torch.tensor([2, 0]), torch.tensor([0, 0]), seed=1)
    assert torch.equal(batch.extra["again"], batch.targets)


@pytest.mark.parametrize(
    ("targets", "classes", "expected"),
    [
        ([0, 1, 2, 3] * 3, 3, "train row 3: label 3 is outside 0..2 (3 such rows"),
        ([0, 1, 2, -1] * 3, 3, "label -1 is outside"),
        ([0, 1, 3, 3] * 3, 4, "1 of 4 classes have no training rows: 2"),
    ],
)
def test_labels_that_cannot_be_classes_are_refused(tmp_path: Path, targets: list[int], classes: int, expected: str) -> None:
    write_parquet(tmp_path, {"train": (pictures(12), targets), "test": (pictures(3), [0, 1, 2])}, names=[])
    assert expected in refusal(ImageData("x", path=str(tmp_path), classes=classes)).what


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"train": (pictures(4), [0, 0, 2, 2]), "test": (pictures(3), [0, 1, 2])})
    assert "no training rows: bee" in refusal(ImageData("x", path=str(tmp_path))).what


def test_splits_that_disagree_on_class_names_are_refused(tmp_path: Path) -> None:
    for split, names in (("train", builders.CLASSES), ("test", ["ant", "cat", "bee"])):
        hub_table([png(i) for i in pictures(6)], labels(6), names).save_to_disk(str(tmp_path / split))
    assert "from class 1 on" in refusal(ImageData("x", path=str(tmp_path))).what


def test_a_wrong_number_of_classes_is_refused(tmp_path: Path) -> None:
    assert refusal(ImageData("x", path=str(write_parquet(tmp_path)), classes=10)).remedy.startswith("dataset.classes=3")


def test_an_image_of_another_size_is_refused_with_ways_out(tmp_path: Path) -> None:
    images = [png(p) for p in pictures(11)] + [png(pictures(1, size=(9, 7))[0])]
    for split in ("train", "test"):
        hub_table(images, labels(12)).to_parquet(str(tmp_path / f"{split}.parquet"))
    problem = refusal(ImageData("x", path=str(tmp_path)))
    assert problem.what == "row 11: 9x7 pixels, not 8x8"
    assert "dataset.resize=8" in problem.remedy
    assert "dataset.resident=false" in problem.remedy
    assert ImageData("x", path=str(tmp_path), resize=8).load().input_shape == (3, 8, 8)


def test_grey_and_colour_are_converted_only_when_asked(tmp_path: Path) -> None:
    write_parquet(tmp_path, splits(grey=True))
    assert ImageData("x", path=str(tmp_path)).load().input_shape == (1, 8, 8)
    problem = refusal(ImageData("x", path=str(tmp_path), input_shape=[3, 8, 8]))
    assert "mode L, not RGB" in problem.what
    assert "dataset.convert=true" in problem.remedy
    inputs = ImageData("x", path=str(tmp_path), input_shape=[3, 8, 8], convert=True).load().split("train").storage.inputs  # type: ignore[attr-defined]
    assert torch.equal(inputs[:, 0], inputs[:, 2])


def test_an_unreadable_image_is_named_with_its_row(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = [png(p)[: 40 if i == 7 else None] for i, p in enumerate(pictures(12))]
        hub_table(images, labels(12)).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert refusal(ImageData("x", path=str(tmp_path))).what.startswith("row 7: the image cannot be read")
