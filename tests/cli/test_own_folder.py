"""A researcher's own model, objective, data and recipe join from a folder of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.told import Problem, only
from tests.conftest import TINY, Outcome

Refusal = Callable[..., list[Problem]]
NET = """
from torch import nn

def net(num_classes, in_features, width=4):
    return nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, num_classes))
"""
LOSS = """
from dataclasses import dataclass

from kdrun.losses.divergence import cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Term


@dataclass(eq=False)
class Smoothed(Objective):
    epsilon: float = 0.1

    def __post_init__(self):
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon}: legal range [0, 1)")

    def weights(self, progress):
        return {"hard": 1 - self.epsilon, "even": self.epsilon}

    def terms(self, output, signal, batch, phase, connectors):
        even = -output.logits.float().log_softmax(1).mean(1)
        return {"hard": Term(cross_entropy(output.logits, batch.targets).sum(), "sample"), "even": Term(even.sum(), "sample")}
"""
STUDENT = """# A net of my own.
defaults: [_network, _self_]
_target_: kdrun_own_work.net
width: 4
taps: {f1: '1'}
"""
OBJECTIVE = """# Label smoothing: L = (1 - epsilon) CE + epsilon mean_c -log p_c
_target_: kdrun_own_work.Smoothed
epsilon: 0.2
"""
RECIPE = """# @package _global_
defaults:
  - override /dataset: gaussians
  - override /student: mine
  - override /objective: smoothed
  - _self_
scale: bench
about: "Do a net and a loss of one's own train?"
dataset: {classes: 6, superclasses: 3, n_train: 96, n_test: 60}   # ours
optim: {epochs: 1}    # ours
source: {batch_size: 32}    # ours
run: {allow: [kdrun_own_work], log_every: 1}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with conf/ and recipes/, and a module that Python finds."""
    home = tmp_path / "mine"
    files = {
        "kdrun_own_work.py": NET + LOSS,
        "conf/student/mine.yaml": STUDENT,
        "conf/objective/smoothed.yaml": OBJECTIVE,
        "recipes/mine.yaml": RECIPE,
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    monkeypatch.syspath_prepend(str(home))
    return home


def test_a_recipe_with_a_net_and_a_loss_of_ones_own_trains(kdrun: Callable[..., Outcome], here: Path, own: Path) -> None:
    outcome = kdrun("train", "recipe=mine", f"--config-dir={own}", "run.dir=run")
    assert outcome.code == 0, outcome.err
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["student"]["parameters"] == 32 * 4 + 4 + 4 * 6 + 6
    record = json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(0.8 * record["terms"]["hard"] + 0.2 * record["terms"]["even"], rel=1e-5)


def test_what_it_leaves_is_resumed_and_measured_without_naming_the_folder_again(
    kdrun: Callable[..., Outcome], here: Path, own: Path
) -> None:
    assert kdrun("train", "recipe=mine", f"--config-dir={own}", "run.dir=run", "-q").code == 0
    assert kdrun("eval", "run", "--no-latency").code == 0
    assert kdrun("eval", "run", "--no-latency", "dataset.n_test=30").code == 0
    assert kdrun("resume", "run", "-q").code == 0


def test_a_net_named_on_the_command_line_trains(kdrun: Callable[..., Outcome], here: Path, own: Path) -> None:
    base = [o for o in TINY if not o.startswith("student")]
    chosen = [
        "student=custom",
        "student._target_=kdrun_own_work.net",
        "student.width=7",
        "student.taps.hid='0'",
        "run.allow=[kdrun_own_work]",
    ]
    outcome = kdrun("train", *base, *chosen, "objective=ce", "run.dir=run")
    assert outcome.code == 0, outcome.err
    assert json.loads((here / "run" / "summary.json").read_text())["student"]["parameters"] == 32 * 7 + 7 + 7 * 6 + 6


def test_its_package_must_be_allowed(refusal: Refusal, own: Path) -> None:
    problems = refusal("train", "recipe=mine", f"--config-dir={own}", "run.allow=[]")
    assert {p.key: p.where for p in problems} == {
        "student._target_": "conf/student/mine.yaml:3", "objective._target_": "conf/objective/smoothed.yaml:2",
    }  # fmt: skip
    assert all(p.remedy == "if you trust it: run.allow=[kdrun_own_work]" for p in problems)


def test_its_fields_are_checked_as_any_other_s(refusal: Refusal, own: Path) -> None:
    mine = ["train", "recipe=mine", f"--config-dir={own}"]
    assert only(refusal(*mine, "objective.epsilno=0.3")).remedy.startswith("did you mean objective.epsilon")
    assert only(refusal(*mine, "objective.epsilon=much")).head == "objective.epsilon: 'much' is not a number"
    assert only(refusal(*mine, "objective.epsilon=2")) == Problem("objective.epsilon: cannot be 2", "command line", "legal range [0, 1)")
    problem = only(refusal(*mine, "+student.widht=5"))
    assert problem.head == "student.widht: kdrun_own_work.net has no argument 'widht'"
    assert problem.remedy.startswith("did you mean width?")


def test_a_folder_of_pictures_trains(kdrun: Callable[..., Outcome], here: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for shade, name in enumerate(("cat", "dog", "owl")):
            folder = here / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (80 * shade + i, 40, 200 - 80 * shade)).save(folder / f"{i}.png")
    small = [
        "dataset.resident=true",
        "dataset.crop=pad",
        "dataset.padding=2",
        "dataset.input_shape=null",
        "dataset.mean=null",
        "dataset.std=null",
    ]
    outcome = kdrun(
        "train", "dataset=folder", "dataset.path=pictures", "dataset.splits.test=val", *small, "student=resnet8", "teacher=resnet8",
        "objective=kd", "source.batch_size=6", "optim.epochs=1", "hardware=cpu", "run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "12 train, 6 test; 3 classes" in outcome.out
    assert json.loads((here / "run" / "provenance.json").read_text())["data"]["sizes"] == {"train": 12, "test": 6}
