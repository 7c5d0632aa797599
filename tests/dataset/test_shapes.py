from __future__ import annotations

from typing import Any

import pytest
import torch

from kdrun.dataset.base import Data
from kdrun.dataset.shapes import CLASS_NAMES, SIZE, ShapesData
from kdrun.types import Batch


def everything(data: Data, split: str = "train", augment: bool = False) -> Batch:
    index = torch.arange(len(data.split(split)))
    return data.rows(split, index, torch.zeros_like(index), seed=3, augment=augment)


@pytest.mark.parametrize("augment", [False, True])
def test_every_box_holds_its_object_and_all_that_is_drawn_lies_in_a_box(augment: bool) -> None:
    batch = everything(ShapesData(n_train=40, noise=0.0).load(), augment=augment)
    drawn = batch.inputs.abs().sum(1) > 0
    outside = drawn.clone()
    for image, labels, boxes in zip(range(40), batch.targets, batch.extra["boxes"], strict=True):
        for x1, y1, x2, y2 in boxes[labels >= 0].tolist():
            first = round(y1), round(x1)
            part = drawn[image, max(0, first[0] - 1) : round(y2) + 1, max(0, first[1] - 1) : round(x2) + 1]
            rows, columns = part.any(1).nonzero().flatten(), part.any(0).nonzero().flatten()
            assert abs(int(rows[-1] - rows[0]) + 1 - (y2 - y1)) <= 1.5  # to the pixel
            assert abs(int(columns[-1] - columns[0]) + 1 - (x2 - x1)) <= 1.5
            outside[image, round(y1 - 0.5) : round(y2 + 0.5), round(x1 - 0.5) : round(x2 + 0.5)] = False
    assert not outside.any()


def test_classes_are_the_shape_and_its_tint() -> None:
    batch = everything(ShapesData(n_train=60, noise=0.0, flip=0.0).load())
    seen = set()
    for pixels, labels, boxes in zip(batch.inputs, batch.targets, batch.extra["boxes"], strict=True):
        for label, (x1, y1, x2, y2) in zip(labels[labels >= 0].tolist(), boxes[labels >= 0].round().int().tolist(), strict=True):
            part = pixels[:, y1:y2, x1:x2]
            square, blue = (part[1] > 0).float().mean() > 0.9, part[2].sum() > part[0].sum()
            assert CLASS_NAMES[label] == f"{'square' if square else 'disc'}_{'blue' if blue else 'red'}"
            seen.add(label)
    assert seen == {0, 1, 2, 3}


def test_images_without_objects_occur() -> None:
    data = ShapesData(n_train=300).load()
    empty = (everything(data).targets < 0).all(1)
    assert 0 < empty.float().mean() < 0.08


def test_an_image_is_the_same_however_many_there_are() -> None:
    few, many = (everything(ShapesData(n_train=n, validation=v).load()) for n, v in ((30, 0.0), (60, 0.3)))
    place = {int(i): row for row, i in enumerate(many.ids)}
    both = [i for i in few.ids.tolist() if i in place]
    assert both
    for i in both:
        assert torch.equal(few.inputs[i], many.inputs[place[i]])


def test_mirrored_boxes_stay_inside() -> None:
    batch = everything(ShapesData(n_train=40, flip=1.0).load(), augment=True)
    plain = everything(ShapesData(n_train=40, flip=1.0).load())
    there = batch.targets >= 0
    boxes, other = batch.extra["boxes"][there], plain.extra["boxes"][there]
    torch.testing.assert_close(boxes[:, 0], SIZE - other[:, 2])
    assert (boxes[:, 2] > boxes[:, 0]).all()
    assert torch.equal(batch.inputs, plain.inputs.flip(3))


@pytest.mark.parametrize("values", [{"n_train": 0}, {"noise": -1.0}, {"flip": 2.0}, {"validation": 1.0}])
def test_settings_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="="):
        ShapesData(**values)
