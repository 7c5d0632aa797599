from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from kdrun.dataset.base import Data, taken
from kdrun.dataset.boxes import Box, padded, within
from kdrun.dataset.detection import DetectionData
from kdrun.errors import Refused
from kdrun.types import Batch
from tests.dataset.annotated import BOXES, SIZES, content, write_coco

CONF = Path(__file__).parents[2] / "conf" / "dataset"
SIZE = 48, 64  # height, width


def dataset(root: Path, **values: Any) -> DetectionData:
    node = yaml.safe_load((CONF / "coco.yaml").read_text())
    node.pop("_target_")
    return DetectionData(**{**node, "workers": 0, "path": str(root), "input_shape": [3, *SIZE], "classes": 3, **values})


def everything(data: Data, split: str = "train", augment: bool = False, view: int = 0) -> Batch:
    index = torch.arange(len(data.split(split)))
    return data.rows(split, index, torch.full_like(index, view), seed=3, augment=augment)


def bright(batch: Batch, data: Data) -> Tensor:
    """Which pixels [B, H, W] belong to a rectangle."""
    return batch.inputs[:, 0] * data.std[0] + data.mean[0] > 0.7


def covered(batch: Batch) -> Tensor:
    """Which pixels [B, H, W] lie in a box."""
    x, y = torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0]) + 0.5
    x1, y1, x2, y2 = batch.extra["boxes"][..., None, None].unbind(2)
    inside = (x1 < x) & (x < x2) & (y1 < y[:, None]) & (y[:, None] < y2)
    return (inside & (batch.targets >= 0)[..., None, None]).any(1)


def test_annotations_are_read_by_rising_ids_with_classes_in_the_order_of_the_categories(tmp_path: Path) -> None:
    data = dataset(write_coco(tmp_path), drop_empty=False).load()
    assert (data.class_names, data.input_shape, data.total_ids) == (("person", "car", "toothbrush"), (3, *SIZE), 2 * len(SIZES))
    batch = everything(data)
    assert batch.targets.tolist() == [[2, -1, -1], [1, 1, 0], [0, -1, -1], [-1, -1, -1], [1, -1, -1], [0, 2, -1]]  # the last id is first
    rows = list(reversed(range(len(SIZES))))
    for place, row in enumerate(rows):
        zoom = min(SIZE[1] / SIZES[row][0], SIZE[0] / SIZES[row][1])
        torch.testing.assert_close(batch.extra["zoom"][place], torch.full((2,), zoom), rtol=0.02, atol=0)
        for m, (box, _) in enumerate(BOXES[row]):
            x, y, w, h = box
            expected = torch.tensor([x, y, x + w, y + h]) * batch.extra["zoom"][place].repeat(2)
            torch.testing.assert_close(batch.extra["boxes"][place, m], expected)
            assert batch.extra["area"][place, m].item() == pytest.approx(0.8 * w * h)


def test_boxes_stay_on_their_objects_in_every_view(tmp_path: Path) -> None:
    data = dataset(write_coco(tmp_path), drop_empty=False).load()
    seen = set()
    for view in range(4):
        batch = everything(data, augment=True, view=view)
        seen.add(tuple(batch.extra["boxes"][0, 0].tolist()))
        differ = (bright(batch, data) != covered(batch)).float().mean((1, 2))
        assert differ.max() < 0.06  # the blurred edges of small images made larger
    assert len(seen) == 2  # as it is, and mirrored
    assert torch.equal(everything(data, augment=True, view=1).extra["boxes"], everything(data, augment=True, view=1).extra["boxes"])


def test_a_view_does_not_depend_on_the_batch_that_it_comes_in(tmp_path: Path) -> None:
    data = dataset(write_coco(tmp_path), drop_empty=False).load()
    whole = everything(data, augment=True, view=2)
    for place in range(len(SIZES)):
        one = data.rows("train", torch.tensor([place]), torch.tensor([2]), seed=3)
        assert torch.equal(one.inputs[0], whole.inputs[place])
        assert torch.equal(one.extra["boxes"][0], whole.extra["boxes"][place])


def test_workers_give_the_same_pixels(tmp_path: Path) -> None:
    data = dataset(write_coco(tmp_path), workers=1).load()
    plan = [(torch.tensor([0, 2]), torch.tensor([1, 1])), (torch.tensor([1]), torch.tensor([1]))]
    for (index, view), batch in zip(plan, data.stream("train", plan, seed=3), strict=True):
        assert torch.equal(batch.inputs, data.rows("train", index, view, seed=3).inputs)


def test_an_image_lies_at_the_upper_left_in_its_proportions() -> None:
    assert within(np.array([(640, 480), (480, 640), (1000, 10)]), (800, 1344)).tolist() == [[1067, 800], [600, 800], [1344, 13]]


def test_images_without_boxes_are_left_out_of_training_alone(tmp_path: Path) -> None:
    data = dataset(write_coco(tmp_path)).load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": len(SIZES) - 1, "test": len(SIZES)}


def test_no_box_at_all_is_legal(tmp_path: Path) -> None:
    told = {**content(), "annotations": []}
    data = dataset(write_coco(tmp_path, told), drop_empty=False).load()
    batch = everything(data)
    assert batch.targets.shape == (len(SIZES), 1)
    assert (batch.targets == -1).all()
    with pytest.raises(Refused, match="drop_empty=false"):
        dataset(tmp_path).load()


def test_crowds_are_kept_apart_and_thin_boxes_left_out(tmp_path: Path) -> None:
    told = content()
    told["annotations"][0]["iscrowd"] = 1  # of the first file, whose id is the last
    told["annotations"][1]["bbox"][2] = 0.5
    batch = everything(dataset(write_coco(tmp_path, told), drop_empty=False).load())
    assert batch.extra["crowd"].nonzero().tolist() == [[len(SIZES) - 1, 0]]
    assert (batch.targets[-1] >= 0).sum() == 1


def test_boxes_are_cut_at_the_border_of_their_image(tmp_path: Path) -> None:
    told = content()
    told["annotations"][0]["bbox"] = [-2, -2, 100, 100]
    batch = everything(dataset(write_coco(tmp_path, told)).load(), "test")
    torch.testing.assert_close(batch.extra["boxes"][-1, 0], torch.tensor([0.0, 0.0, 64.0, 32.0]))


def no_annotations(root: Path, told: dict[str, Any]) -> None:
    (root / "annotations" / "instances_val2017.json").unlink()


def broken_json(root: Path, told: dict[str, Any]) -> None:
    (root / "annotations" / "instances_train2017.json").write_text("{")


def changed(root: Path, told: dict[str, Any], **values: Any) -> None:
    told["annotations"][0] |= values
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(told))


FAULTS: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str, str]] = {
    "no annotations": (no_annotations, "dataset.annotations", "no such file"),
    "broken json": (broken_json, "dataset.annotations", "no annotations of objects"),
    "outside": (lambda r, t: changed(r, t, bbox=[41, 0, 5, 5]), "dataset.annotations", "lies outside of its image"),
    "turned": (lambda r, t: changed(r, t, bbox=[5, 5, -2, 5]), "dataset.annotations", "lies outside of its image"),
    "three numbers": (lambda r, t: changed(r, t, bbox=[5, 5, 2]), "dataset.annotations", "no annotations of objects"),
    "no such image": (lambda r, t: changed(r, t, image_id=1), "dataset.annotations", "of image 1, which is not there"),
    "no such category": (lambda r, t: changed(r, t, category_id=2), "dataset.annotations", "of category 2, which is not there"),
    "no images": (lambda r, t: (r / "train2017").rename(r / "elsewhere") and None, "dataset.images", "no 0005.png"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_is_refused_with_its_file(fault: str, tmp_path: Path) -> None:
    spoil, key, what = FAULTS[fault]
    spoil(write_coco(tmp_path), content())
    with pytest.raises(Refused, match=what) as refused:
        dataset(tmp_path).load()
    assert refused.value.problems[0].key == key
    assert str(tmp_path) in refused.value.problems[0].where
    assert refused.value.problems[0].remedy


def test_other_classes_than_configured_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with pytest.raises(Refused, match=r"dataset\.classes=3"):
        dataset(tmp_path, classes=80).load()
    told = content()
    told["categories"][0]["name"] = "cat"
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(told))
    with pytest.raises(Refused, match="other than the 3 of the training split"):
        dataset(tmp_path).load()


def test_a_folder_that_is_not_there_is_refused_with_what_belongs_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"instances_train2017\.json"):
        dataset(tmp_path / "nowhere").load()
    monkeypatch.delenv("KDRUN_DATA", raising=False)
    with pytest.raises(Refused, match="not said where coco lies"):
        dataset(tmp_path, path=None).load()


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    told = content()
    told["images"][0]["width"] = 41
    data = dataset(write_coco(tmp_path, told)).load()
    with pytest.raises(Refused, match=r"0000\.png has 40x20 pixels"):
        everything(data, "test")


@pytest.mark.parametrize(
    "values", [{"input_shape": [1, 8, 8]}, {"flip": 1.5}, {"std": [1.0, 1.0, 0.0]}, {"workers": -1}, {"validation": 1.0}]
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="="):
        dataset(tmp_path, **values)


def test_some_rows_of_a_split_are_a_split_of_the_same_kind(tmp_path: Path) -> None:
    split = dataset(write_coco(tmp_path)).load().split("train")
    part = taken(split, torch.tensor([3, 1]))
    assert type(part) is type(split)
    request = part.request(torch.arange(2), torch.zeros(2, dtype=torch.int64), 3, True)
    assert part.batch(request, torch.zeros(2, 3, *SIZE), torch.device("cpu")).targets.shape == (2, 3)


def test_padding_has_no_class() -> None:
    rows = padded([[], [Box((1.0, 2.0, 3.0, 4.0), 5, 4.0, True)]], torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    assert rows["classes"].tolist() == [[-1], [5]]
    assert rows["boxes"].tolist() == [[[0.0] * 4], [[2.0, 6.0, 6.0, 12.0]]]
    assert rows["crowd"].tolist() == [[False], [True]]
