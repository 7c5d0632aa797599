"""Tables 1 and 2 of ACAM-KD (ICCV 2025) as recipes/acam_kd_coco.yaml has them, and the setting beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kdrun.config.compose import compose
from kdrun.ledger.published import lookup
from tests.conftest import Outcome
from tests.recipes.standins import TINY_MODEL

METHODS = ("ce", "fgd", "maskd", "freekd", "acam_kd")
TABLES = {  # detector, backbone of the teacher: mAP of the methods
    ("retinanet", "resnet101"): (37.4, 39.6, 39.8, 39.9, 41.2),
    ("faster_rcnn", "resnet101"): (38.4, 40.4, 40.8, 40.8, 41.4),
    ("retinanet", "resnext101_64x4d"): (37.4, None, 40.9, 41.0, 41.5),
    ("faster_rcnn", "resnext101_64x4d"): (38.4, None, 42.4, 42.4, 42.6),
}
PARTS = {"retinanet": ["backbone.fpn", "head"], "faster_rcnn": ["backbone.fpn", "rpn", "roi_heads"]}


@pytest.mark.parametrize("pair", TABLES)
def test_every_pair_of_the_tables_is_reached_by_override(pair: tuple[str, str]) -> None:
    detector, backbone = pair
    composed = compose(["recipe=acam_kd_coco", f"teacher={detector}", f"student={detector}", f"teacher.name={backbone}"])
    for method, value in zip(METHODS, TABLES[pair], strict=True):
        cell = lookup(composed.tree["published"], composed.facts(), method)
        assert (None if cell is None else (cell.metric, cell.value)) == (None if value is None else ("map", value))
    assert composed.tree["student"]["name"] == "resnet50"
    assert composed.tree["objective"]["inherit"] == PARTS[detector]


def test_the_setting_is_the_papers() -> None:
    tree = compose(["recipe=acam_kd_coco"]).tree
    optim, objective = tree["optim"], tree["objective"]
    assert (optim["name"], optim["lr"], optim["momentum"], optim["weight_decay"], optim["epochs"]) == ("momentum", 0.02, 0.9, 1e-4, 24)
    assert (optim["schedule"]["name"], optim["schedule"]["milestones"]) == ("multistep", [16, 22])
    assert (objective["alpha"], objective["diversity"], objective["masks"], objective["query"]) == (1.0, 1.0, 6, "teacher")
    assert (objective["task"], objective["teacher_taps"]) == ("detection", [f"fpn{i}" for i in range(5)])
    assert (tree["source"]["batch_size"], tree["dataset"]["classes"], tree["dataset"]["sizes"]["test"]) == (16, 80, 5000)


def test_a_teacher_and_labels_alone_learn_from_boxes() -> None:
    tree = compose(["recipe=acam_kd_coco"]).tree
    assert tree["teacher"]["fit"]["objective"]["_target_"] == "kdrun.objective.detection.Detection"
    alone = compose(["recipe=acam_kd_coco", *tree["rivals"]["ce"]]).tree
    assert alone["objective"] == {"_target_": "kdrun.objective.detection.Detection"}
    assert compose(["recipe=acam_kd_coco", *tree["rivals"]["mse"]]).tree["objective"]["task"] == "detection"


def both(*settings: str) -> list[str]:
    return [f"{who}.{setting}" for who in ("teacher", "student") for setting in settings]


@pytest.mark.parametrize(
    ("recipe", "small", "tap"),
    [
        ("acam_kd_coco", ["dataset.input_shape=[3,64,64]", *both("name=plain", "width=8")], "student fpn0"),
        ("acam_kd_cityscapes", ["dataset.input_shape=[3,32,64]", *both(f"name={TINY_MODEL}", "width=8")], "student map"),
    ],
)
def test_dense_tasks_are_planned_without_their_data(recipe: str, small: list[str], tap: str, kdrun: Callable[..., Outcome]) -> None:
    """The probe takes real steps, for which labels must have the form of the task's."""
    outcome = kdrun("plan", f"recipe={recipe}", *small, "source.batch_size=2", "hardware=cpu", "hardware.threads=1", "--json")
    assert outcome.code == 0, outcome.err
    assert tap in outcome.json["taps"]
    assert outcome.json["seconds_per_sample"] > 0
