from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kdrun.dataset.base import Data, Resident
from kdrun.dataset.pixels import VOID, PixelSplit
from kdrun.errors import Refused, RunFailed
from kdrun.evaluation.metrics import kind
from kdrun.evaluation.segmentation import Meter, Segmentation, palette, plain
from kdrun.teacher.silent import NoTeacher
from kdrun.types import Batch, Needs, Signal

# Truth and prediction of two images of 2x3 pixels, three classes, one pixel without a label.
TRUTH = torch.tensor([[[0, 0, 1], [1, 2, -1]], [[0, 1, 1], [2, 2, 2]]])
SAID = torch.tensor([[[0, 1, 1], [1, 2, 0]], [[0, 0, 1], [2, 2, 1]]])
# Rows are truth: [[2, 1, 0], [1, 3, 0], [0, 1, 3]].
IOU = [2 / 4, 3 / 6, 3 / 4]


def logits(said: Tensor, classes: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(said, classes).movedim(-1, 1).float()


def measured(batches: list[tuple[Tensor, Tensor]], names: tuple[str, ...] = ("a", "b", "c")) -> dict[str, float]:
    meter = Meter(names, "cpu")
    for said, truth in batches:
        meter.update(logits(said, len(names)), truth)
    return meter.compute()


def test_intersection_over_union_of_the_example() -> None:
    found = measured([(SAID, TRUTH)])
    assert [found[f"iou_{c}"] for c in "abc"] == pytest.approx([100 * x for x in IOU])
    assert found["miou"] == pytest.approx(100 * sum(IOU) / 3)
    assert found["pixel_accuracy"] == pytest.approx(100 * 8 / 11)


def test_the_confusion_is_pooled_over_images_not_averaged() -> None:
    pooled = measured([(SAID[:1], TRUTH[:1]), (SAID[1:], TRUTH[1:])])
    assert pooled == measured([(SAID, TRUTH)])
    apart = [measured([(SAID[i : i + 1], TRUTH[i : i + 1])])["miou"] for i in range(2)]
    assert sum(apart) / 2 != pytest.approx(pooled["miou"], abs=1)


def test_pixels_without_a_label_count_for_nothing() -> None:
    other = SAID.clone()
    other[0, 1, 2] = 2
    assert measured([(other, TRUTH)]) == measured([(SAID, TRUTH)])


def test_a_class_that_is_nowhere_is_left_out_of_the_mean_and_one_that_is_only_predicted_is_not() -> None:
    four = measured([(SAID, TRUTH)], ("a", "b", "c", "d"))
    assert four["miou"] == pytest.approx(100 * sum(IOU) / 3)
    assert "iou_d" not in four
    said = SAID.clone()
    said[0, 0, 0] = 3
    found = measured([(said, TRUTH)], ("a", "b", "c", "d"))
    assert found["iou_d"] == 0
    assert found["miou"] == pytest.approx(100 * (1 / 4 + 3 / 6 + 3 / 4 + 0) / 4)


def test_nothing_labelled_is_a_failed_run() -> None:
    with pytest.raises(RunFailed, match="no labelled pixel"):
        measured([(SAID, torch.full_like(TRUTH, -1))])


def test_the_best_is_a_hundred() -> None:
    found = measured([(TRUTH.clamp_min(0), TRUTH)])
    assert set(found.values()) == {100.0}


@pytest.mark.parametrize(
    ("name", "metric"), [("Sky", "iou_sky"), ("traffic light", "iou_traffic_light"), ("Sign/Symbol ", "iou_sign_symbol")]
)
def test_metrics_of_classes_have_plain_names_of_a_known_kind(name: str, metric: str) -> None:
    assert f"iou_{plain(name)}" == metric
    found = kind(metric)
    assert found is not None
    assert found.higher_is_better
    assert found.difference_unit == "points"


@pytest.mark.parametrize("values", [{"primary": "top1"}, {"examples": -1}, {"every_epochs": 0}])
def test_settings_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=f"evaluation.{next(iter(values))}"):
        Segmentation(**values)


def world(images: int = 5, names: tuple[str, ...] = ("road", "sky", "car")) -> Data:
    """Images whose first channel is 100 * class, the last column void."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(len(names), (images, 1, 6, 8), generator=g)
    rows = torch.cat([100.0 * labels, torch.rand(images, 2, 6, 8, generator=g), labels.float()], 1)
    rows[:, -1, :, -1] = VOID
    ids = torch.arange(2 * images)
    splits = {part: PixelSplit.of(Resident(rows), which) for part, which in zip(("train", "test"), ids.split(images), strict=True)}
    return Data("world", names, (3, 6, 8), (0.0,) * 3, (1.0,) * 3, splits, len(ids))


class Reader(nn.Module):
    """Reads the class off the first channel; where `wrong`, it says class 0."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.wrong = wrong
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return logits((x[:, 0] / 100).round().long() * (not self.wrong))


class Speaking(NoTeacher):
    def signal(self, batch: Batch, needs: Needs) -> Signal:
        return Signal(Reader(wrong=True)(batch.inputs), {})


def test_it_measures_a_network_on_the_rows_of_a_split() -> None:
    data = world()
    rows = [(batch, None) for batch in data.batches("test", 2)]
    found = Segmentation().measure(Reader(), rows, data, torch.device("cpu"))
    assert found == dict.fromkeys(("miou", "pixel_accuracy", "iou_road", "iou_sky", "iou_car"), 100.0)
    assert Segmentation().measure(Reader(wrong=True), rows, data, torch.device("cpu"))["iou_sky"] == 0


@pytest.mark.parametrize(("teacher", "columns"), [(NoTeacher(), 3), (Speaking(), 4)])
def test_the_picture_shows_image_truth_and_predictions_in_the_colours_of_the_classes(teacher: Any, columns: int, tmp_path: Path) -> None:
    data, network = world(), Reader()
    network.train()
    Segmentation(examples=3).picture(tmp_path, network, teacher, data, torch.device("cpu"))
    assert network.modes == [False]  # asked in evaluation mode ...
    assert network.training  # ... and put back
    pixels = np.asarray(Image.open(tmp_path / "plots" / "segmentation.png").convert("RGB"))
    for colour in palette(3)[:3]:
        expected = (255 * colour).round().numpy()
        assert (np.abs(pixels - expected).max(-1) <= 1).mean() > 0.005
    assert pixels.shape[1] > pixels.shape[0] * 0.25 * columns


def test_no_picture_is_drawn_where_none_is_asked_for(tmp_path: Path) -> None:
    Segmentation(examples=0).picture(tmp_path, Reader(), NoTeacher(), world(), torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [1, 5, 11, 20, 150])
def test_every_class_has_a_colour_of_its_own(classes: int) -> None:
    colours = palette(classes)
    assert colours.shape == (classes + 1, 3)
    assert len(torch.unique(colours, dim=0)) == classes + 1
    assert torch.equal(colours[-1], torch.ones(3))  # what a target of -1 takes
