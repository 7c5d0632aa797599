"""Optimiser, schedule, clipping and moving average are what their settings say, at every step and after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.engine import loop, state
from kdrun.engine.loop import Stage
from kdrun.teacher.live import LiveTeacher
from tests.conftest import Outcome
from tests.engine.running import assert_bit_equal, assert_same_run, parameters, run, run_killed, staged, training_lines, weights


class Silent:
    """Hooks that remember what was logged."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def logged(self, step: int, record: dict[str, Any]) -> None:
        self.records.append(record)

    def step_done(self, step: int) -> None: ...

    def stop_requested(self) -> bool:
        return False


def rates(overrides: Sequence[str], folder: Path) -> list[float]:
    """The learning rate of every optimiser step of a run."""
    run([*overrides, "optim.lr=1.0e-2"], folder)
    return [line["lr"] for line in training_lines(folder)]


def test_milestones_are_fractions_of_the_run(tiny: list[str], tmp_path: Path) -> None:
    found = rates([*tiny, "optim.epochs=8", "optim.schedule.milestones=[0.25,0.5,0.75]"], tmp_path / "run")
    assert found == pytest.approx([1e-2] * 6 + [1e-3] * 6 + [1e-4] * 6 + [1e-5] * 6)


def test_milestones_from_1_on_are_epochs(tiny: list[str], tmp_path: Path) -> None:
    """As published: "x0.1 at epochs 1 and 3" trains the first epoch at the full rate."""
    found = rates([*tiny, "optim.epochs=4", "optim.schedule.milestones=[1,3]", "optim.schedule.gamma=0.5"], tmp_path / "run")
    assert found == pytest.approx([1e-2] * 3 + [5e-3] * 6 + [2.5e-3] * 3)


def test_a_warm_up_moves_no_milestone(tiny: list[str], tmp_path: Path) -> None:
    found = rates([*tiny, "optim.epochs=4", "optim.schedule.milestones=[2]", "optim.schedule.warmup_epochs=1"], tmp_path / "run")
    assert found == pytest.approx([0, 1e-2 / 3, 2e-2 / 3] + [1e-2] * 3 + [1e-3] * 6)


def test_constant_is_constant(tiny: list[str], tmp_path: Path) -> None:
    assert rates([*tiny, "optim.schedule.name=constant"], tmp_path / "run") == [1e-2] * 6


def test_cosine_falls_from_the_warm_up_to_the_smallest_rate(tiny: list[str], tmp_path: Path) -> None:
    schedule = ["optim.schedule.name=cosine", "optim.schedule.warmup_epochs=2", "optim.schedule.min_lr=1.0e-3", "optim.epochs=8"]
    found = rates([*tiny, *schedule], tmp_path / "run")
    warm, total = 6, 24
    assert found[:warm] == pytest.approx([1e-2 * t / warm for t in range(warm)])
    assert found[warm:] == pytest.approx([1e-3 + 0.5 * 9e-3 * (1 + math.cos(math.pi * t / total)) for t in range(warm, total)])
    assert found[-1] == pytest.approx(1e-3, rel=0.05)  # one step before the end itself, where it would be reached
    assert found[0] == 0


@pytest.mark.parametrize(
    "schedule", [["optim.schedule.milestones=[0.5]"], ["optim.schedule.name=cosine", "optim.schedule.warmup_epochs=1.5"]]
)
def test_the_schedule_is_the_same_after_a_resume(
    schedule: list[str], tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, "optim=adamw", "optim.epochs=4", *schedule]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 5)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def gradient_norm(stage: Stage) -> float:
    return float(torch.stack([p.grad.norm() for p in stage.learner.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_the_gradient_is_clipped_to_the_norm_and_the_norm_before_is_recorded(clip: float, tiny: list[str], tmp_path: Path) -> None:
    free, clipped = (staged([*tiny, f"optim.clip_norm={c}", "hardware.micro_batch=10"], tmp_path / str(c)).stage for c in ("null", clip))
    free_hooks, hooks = Silent(), Silent()
    loop.train_step(free, free_hooks)
    loop.train_step(clipped, hooks)
    norm = hooks.records[0]["grad_norm"]
    assert norm == free_hooks.records[0]["grad_norm"] == pytest.approx(gradient_norm(free), rel=1e-5)
    assert norm > 0.1
    assert gradient_norm(clipped) == pytest.approx(min(clip, norm), rel=1e-4)


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_the_moving_average_is_the_one_computed_by_hand(name: str, tiny: list[str], tmp_path: Path) -> None:
    """Of weights and of BatchNorm's statistics; counters are taken over. It starts at the weights after the first step."""
    images = ["dataset=digits", "dataset.subset=40", "dataset.subset_test=20", "student=resnet8", "source.batch_size=20", "hardware=cpu"]
    run = staged([*(tiny if name == "mlp" else images), "optim.epochs=2", "optim.ema=0.8"], tmp_path / "run")
    assert run.stage.ema is not None
    average: dict[str, torch.Tensor] = {}
    for _ in range(4):
        loop.train_step(run.stage, Silent())
        now = parameters(run.built.network)
        average = {k: 0.8 * average[k] + 0.2 * v.double() if average else v.double() for k, v in now.items()}
    found = parameters(run.stage.ema.module)
    assert found.keys() == average.keys()
    for key, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), average[key], rtol=1e-5, atol=1e-7)
    assert run.network() is run.stage.ema.module


def test_the_moving_average_is_what_is_measured_and_exported(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "optim.ema=0.5"], tmp_path / "run")
    found = state.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    exported = weights(tmp_path / "run")
    assert_bit_equal(exported, {k.removeprefix("module."): v for k, v in found[1]["ema"].items() if k.startswith("module.")})
    assert not torch.equal(exported["fc.weight"], found[1]["learner"]["student.module.fc.weight"])


@pytest.mark.parametrize(
    ("zero", "without"),
    [
        (["objective=kd", "objective.ce_weight=1", "objective.kd_weight=0"], ["objective=ce"]),
        (["objective=fitnet", "objective.beta=0"], ["objective=ce"]),
        (["objective=crd", "objective.beta=0"], ["objective=ce"]),
        (["objective=rkd", "objective.distance_weight=0", "objective.angle_weight=0"], ["objective=ce"]),
    ],
)
def test_a_weight_of_zero_is_the_run_without_the_term_and_asks_the_teacher_nothing(
    zero: list[str], without: list[str], tiny: list[str], live: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([*tiny, *live, *without], tmp_path / "without")
    asked: list[str] = []
    original = LiveTeacher.signal

    def signal(self: LiveTeacher, batch: Any, needs: Any) -> Any:
        said = original(self, batch, needs)
        asked.extend(["logits"] * (said.logits is not None) + list(said.taps))
        return said

    stage = staged([*tiny, *live, *zero], tmp_path / "stage").stage
    monkeypatch.setattr(LiveTeacher, "signal", signal)
    loop.train_step(stage, Silent())
    assert asked == []
    assert [n for n, _ in stage.learner.named_parameters() if not n.startswith("student.")] == []
    monkeypatch.undo()
    run([*tiny, *live, *zero], tmp_path / "zero")
    assert_bit_equal(weights(tmp_path / "zero"), weights(tmp_path / "without"))
    losses = [[(line["loss"], line["grad_norm"]) for line in training_lines(tmp_path / folder)] for folder in ("zero", "without")]
    assert losses[0] == losses[1]
