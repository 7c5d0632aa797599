"""Tables 3 to 5 of ACAM-KD (ICCV 2025) as recipes/acam_kd_cityscapes.yaml has them, and the setting beside them."""

from __future__ import annotations

import pytest

from kdrun.config.compose import compose
from kdrun.ledger.published import lookup

# student: (baseline, MasKD, FreeKD, ACAM-KD), mIoU on the validation images
TABLES = {
    ("deeplabv3", "resnet18"): (72.96, 77.00, 76.45, 77.53),
    ("deeplabv3", "mobilenetv2_100"): (73.12, 75.26, None, 76.21),
    ("pspnet", "resnet18"): (72.55, 75.34, None, 75.99),
}
METHODS = ("ce", "maskd", "freekd", "acam_kd")


@pytest.mark.parametrize("student", TABLES)
def test_every_student_of_the_tables_is_reached_by_override(student: tuple[str, str]) -> None:
    composed = compose(["recipe=acam_kd_cityscapes", f"student={student[0]}", f"student.name={student[1]}"])
    for method, value in zip(METHODS, TABLES[student], strict=True):
        cell = lookup(composed.tree["published"], composed.facts(), method)
        assert (None if cell is None else cell.value) == value
    own = {("deeplabv3", "mobilenetv2_100"): 128, ("pspnet", "resnet18"): 128}.get(student, 512)
    assert composed.tree["student"]["width"] == own
    assert composed.tree["teacher"]["width"] == 512


def test_a_student_that_the_tables_do_not_have_has_no_number() -> None:
    composed = compose(["recipe=acam_kd_cityscapes", "student=pspnet", "student.name=mobilenetv2_100"])
    assert lookup(composed.tree["published"], composed.facts(), "acam_kd") is None


def test_the_setting_is_the_papers() -> None:
    tree = compose(["recipe=acam_kd_cityscapes"]).tree
    optim, objective = tree["optim"], tree["objective"]
    assert (optim["name"], optim["lr"], optim["momentum"], optim["weight_decay"], optim["steps"]) == ("momentum", 0.02, 0.9, 5e-4, 40000)
    assert (tree["source"]["batch_size"], tree["dataset"]["input_shape"], tree["dataset"]["classes"]) == (16, [3, 512, 1024], 19)
    assert (objective["alpha"], objective["diversity"], objective["masks"], objective["query"]) == (1.0, 1.0, None, "teacher")
    assert (tree["teacher"]["name"], tree["teacher"]["claim"]["value"]) == ("resnet101", 78.07)
