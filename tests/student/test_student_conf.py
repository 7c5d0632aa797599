"""Every student and teacher that can be chosen composes into what it says it is."""

from __future__ import annotations

import pytest
import torch
import yaml

from kdrun.student.build import build
from kdrun.student.taps import model_spec
from tests.student.composed import CONF, node, options

NETWORKS = sorted(set(options("student")) - {"custom"})
LIVE = sorted(set(options("teacher")) - {"none", "truth", "snapshot", "ema", "current"})
LIVE_KEYS = yaml.safe_load((CONF / "teacher" / "_live.yaml").read_text())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_has_target_taps_and_checkpoint(name: str) -> None:
    chosen = node("student", name)
    assert chosen["checkpoint"] is None
    assert chosen["_target_"].startswith("kdrun.student.")
    language = chosen["_target_"].startswith(
        ("kdrun.student.language.", "kdrun.student.window.", "kdrun.student.sum_policy.", "kdrun.student.critic.")
    )
    assert {"pooled", "map"} & {*chosen["taps"]} or chosen.get("speaks") == "tensor" or language
    assert isinstance(chosen["rename"], list)


def test_every_student_can_be_a_teacher() -> None:
    assert set(options("student")) == set(LIVE)


@pytest.mark.parametrize("name", LIVE)
def test_a_teacher_is_the_student_of_that_name_with_a_teachers_keys(name: str) -> None:
    teacher, student = node("teacher", name), node("student", name)
    assert {key: teacher[key] for key in LIVE_KEYS} == LIVE_KEYS
    if name == "mlp":
        assert teacher["hidden"] == [512, 512]
        student |= {"hidden": teacher["hidden"], "taps": student["taps"] | {"f2": "relu2", "p2": "fc2"}}
    if name == "window_lm":
        assert teacher["hidden"] == 128
        student |= {"hidden": 128}
    assert {key: teacher[key] for key in student} == student
    assert set(teacher) == set(student) | set(LIVE_KEYS)


def test_teachers_without_a_network_say_their_kind() -> None:
    assert node("teacher", "none") == {"kind": "none"}
    assert node("teacher", "truth") == {"kind": "truth", "extra": "truth_logits"}
    assert node("teacher", "snapshot") == {"kind": "snapshot"}
    assert node("teacher", "ema") == {"kind": "ema", "decay": 0.999, "prompt": "own"}
    assert node("teacher", "current") == {"kind": "current", "prompt": "privileged"}


@pytest.mark.parametrize("group", ["student", "teacher"])
def test_the_mlp_and_timm_have_the_taps_they_name(group: str) -> None:
    reserved = LIVE_KEYS.keys()
    for name, shape in (("mlp", (32,)), ("timm", (3, 32, 32))):
        chosen = node(group, name)
        with torch.device("meta"):
            network = build(chosen, 10, shape, reserved=reserved)
        spec = model_spec(network, shape, chosen["taps"])
        assert spec.classes == 10
        assert set(spec.taps) == set(chosen["taps"])


def test_keys_are_explained_where_they_stand() -> None:
    for file in (CONF / "student" / "_network.yaml", CONF / "teacher" / "_live.yaml"):
        keys = [line for line in file.read_text().splitlines() if line[:1].isalpha() and not line.startswith("kind:")]
        unexplained = [line for line in keys if "#" not in line and not line.startswith("std:")]
        assert unexplained == []
