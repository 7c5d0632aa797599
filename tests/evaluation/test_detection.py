from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kdrun.dataset.shapes import ShapesData
from kdrun.errors import Refused, RunFailed
from kdrun.evaluation import detection
from kdrun.evaluation.detection import METRICS, Detection, DetectionMeter
from kdrun.evaluation.metrics import kind
from kdrun.teacher.silent import NoTeacher
from kdrun.types import Batch, Needs, Signal

CPU = torch.device("cpu")
DATA = ShapesData(n_train=1, n_test=30).load()


def batch(zoom: float = 1.0) -> Batch:
    index = torch.arange(30)
    found = DATA.rows("test", index, torch.zeros_like(index), seed=0, augment=False)
    found.extra["zoom"] = torch.full((30, 2), zoom)
    return found


def perfect(batch: Batch) -> Tensor:
    """The truth as a detector would say it, [B, M + 2, 6]."""
    there = batch.targets >= 0
    rows = torch.cat([batch.extra["boxes"], torch.full((*there.shape, 1), 0.9), batch.targets[..., None].float()], -1)
    rows[~there] = -1
    return nn.functional.pad(rows, (0, 0, 0, 2), value=-1)


class Says(nn.Module):
    """A network that finds what it is told to."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[: len(x)]


def measured(rows: Tensor, truth: Batch) -> dict[str, float]:
    meter = DetectionMeter("cpu")
    for part in (slice(0, 11), slice(11, 30)):
        extra = {name: values[part] for name, values in truth.extra.items()}
        meter.add(rows[part], Batch(truth.inputs[part], truth.targets[part], truth.ids[part], truth.view[part], extra))
    return meter.compute()


def test_the_truth_is_perfect_and_the_wrong_class_nothing() -> None:
    truth = batch()
    found = measured(perfect(truth), truth)
    assert found == pytest.approx({"map": 100, "map_50": 100, "map_75": 100, "ap_small": 100})  # all sides are below 32
    rows = perfect(truth)
    rows[..., 5] = torch.where(rows[..., 5] >= 0, (rows[..., 5] + 1) % 4, rows[..., 5])
    assert measured(rows, truth)["map"] == pytest.approx(0, abs=1)


def test_a_box_that_overlaps_by_60_percent_counts_at_thresholds_up_to_60() -> None:
    truth = batch()
    rows = perfect(truth)
    there = rows[..., 5] >= 0
    width = rows[..., 2] - rows[..., 0]
    rows[..., 2] = torch.where(there, rows[..., 0] + 0.61 * width, rows[..., 2])
    found = measured(rows, truth)
    assert (found["map_50"], found["map_75"]) == pytest.approx((100, 0))
    assert found["map"] == pytest.approx(30)  # 0.50, 0.55 and 0.60 of ten


def test_objects_are_small_or_large_in_pixels_of_the_file() -> None:
    truth = batch(zoom=0.25)
    truth.extra["area"] = truth.extra["area"] * 16
    found = measured(perfect(truth), truth)
    assert {name for name in found if name.startswith("ap_")} == {"ap_medium", "ap_large"}
    assert found["map"] == pytest.approx(100)


def test_nobody_loses_for_missing_or_finding_a_crowd() -> None:
    truth = batch()
    truth.extra["crowd"] = truth.extra["crowd"].clone()
    truth.extra["crowd"][:, 0] = truth.targets[:, 0] >= 0
    with_crowd, without = perfect(truth), perfect(truth)
    without[:, 0] = -1
    assert measured(with_crowd, truth)["map"] == measured(without, truth)["map"] == pytest.approx(100)


def test_false_alarms_cost_where_they_are_surer_than_the_truth() -> None:
    truth = batch()
    rows = perfect(truth)
    rows[:, -1] = torch.tensor([0.0, 0.0, 5.0, 5.0, 0.1, 0.0])
    assert measured(rows, truth)["map"] == pytest.approx(100)
    rows[:, -1, 4] = 0.99
    assert measured(rows, truth)["map"] < 95


def test_no_object_at_all_is_a_failed_run() -> None:
    truth = batch()
    truth.targets.fill_(-1)
    with pytest.raises(RunFailed, match="no object"):
        measured(perfect(truth), truth)


def test_measure_asks_the_network_alone() -> None:
    truth = batch()
    found = Detection().measure(Says(perfect(truth)), [(truth, None)], DATA, CPU)
    assert found["map"] == pytest.approx(100)
    assert set(found) <= set(Detection().names())


def test_every_metric_has_a_direction() -> None:
    for name in METRICS:
        found = kind(name)
        assert found is not None
        assert (found.unit, found.higher_is_better) == ("percent", True)


@pytest.mark.parametrize(("key", "value"), [("examples", -1), ("threshold", 2.0), ("primary", "top1")])
def test_settings_that_cannot_be_are_refused(key: str, value: Any) -> None:
    with pytest.raises(Refused) as refused:
        Detection(**{key: value})
    assert refused.value.problems[0].key == f"evaluation.{key}"


def test_without_pycocotools_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r'pip install "kdrun\[detection\]"') as refused:
        Detection()
    assert len(refused.value.problems) == 1


class Speaks(NoTeacher):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        return Signal(self.rows[: len(batch.ids)], {})


@pytest.mark.parametrize("teacher", [False, True])
def test_the_picture_has_a_column_for_truth_and_everyone_who_finds_something(teacher: bool, tmp_path: Path) -> None:
    rows = perfect(batch())[[0, 10, 19, 29]]
    network = Says(rows)
    Detection(examples=3).picture(tmp_path, network, Speaks(rows) if teacher else NoTeacher(), DATA, CPU)
    with Image.open(tmp_path / "plots" / "detections.png") as picture:
        assert picture.width / picture.height == pytest.approx((3 if teacher else 2) / 3, rel=0.1)
    assert network.training
    Detection(examples=0).picture(tmp_path / "none", network, NoTeacher(), DATA, CPU)
    assert not (tmp_path / "none").exists()
