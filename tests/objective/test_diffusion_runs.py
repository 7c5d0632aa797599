"""Denoising and SFD in real runs: the phases alternate, and splits and kills change nothing (laws 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdrun.engine.records import read_json
from kdrun.objective.sfd import FAKE, STUDENT
from kdrun.student.denoiser import MLPDenoiser
from kdrun.student.weights import save_student
from tests.conftest import Outcome
from tests.engine.running import assert_same_run, assert_same_training, checkpoint_tensors, run, run_killed, training_lines

CLASSES = 4
# -- laws, in real runs ---------------------------------------------------------------------------------------------------

WORLD = ["dataset=modes", "dataset.n_train=64", "dataset.n_test=64", "evaluation=sampler", "evaluation.calls=2", "source.batch_size=24"]
DENOISING = ["objective=denoise", "objective.label_dropout=0.3", "student=denoiser_mlp", "student.null_label=true", "student.width=16"]
SFD = [
    "source=labels",
    "source.exclude=[0]",
    "source.steps_per_epoch=3",
    "student=generator_mlp",
    "student.width=16",
    "teacher=denoiser_mlp",
    "teacher.width=16",
    "objective=sfd",
    "objective.forget_weight=0.3",
    "objective.fake_forget_weight=0.5",
]
PACE = [
    "optim=adamw",
    "optim.name=adam",
    "optim.betas=[0.0,0.999]",
    "optim.weight_decay=0.0",
    "optim.clip_value=1.0",
    "optim.ema=0.9",
    "optim.steps=6",
    "hardware=cpu",
    "hardware.threads=1",
    "run.log_every=1",
    "run.checkpoint_every=0.6",
]
SGD = ["optim.name=momentum", "optim.momentum=0.9", "optim.betas=null", "optim.lr=0.001"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    monkeypatch.setattr("kdrun.evaluation.sampler.Sampler.picture", lambda *args: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    torch.manual_seed(0)
    teacher, file = MLPDenoiser(CLASSES, 2, width=16), tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    with torch.no_grad():
        for p in teacher.parameters():
            p *= 2.0  # a network that looks at its input, as a trained one does
    save_student(teacher, file, {})
    return [*WORLD, *SFD, *PACE, "optim.phases={fake_score: {lr: 0.003}}", f"teacher.checkpoint={file}"]


@pytest.fixture(scope="module")
def unbroken(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
        patch.setattr("kdrun.evaluation.sampler.Sampler.picture", lambda *args: None)
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        run(base, folder)
    return folder


def test_the_phases_alternate_in_a_real_run(unbroken: Path) -> None:
    lines = training_lines(unbroken)
    assert [line["phase"] for line in lines] == [FAKE, STUDENT] * 6
    assert [line["lr"] for line in lines[:2]] == [0.003, 0.001]
    assert any(name.startswith("/learner/connectors.fake_score.") for name in checkpoint_tensors(unbroken))
    assert read_json(unbroken / "summary.json")["test"]["calls"] == 1


@pytest.mark.parametrize("micro_batch", ["[10,13,1]", "7"])
def test_any_split_trains_the_same_student(micro_batch: str, base: list[str], tmp_path: Path) -> None:
    """With SGD: without its first moment Adam's step has the sign of a gradient, be it rounding. And with a rate for the fake
    score that takes it away from the teacher at once: the student's gradient is that of their difference."""
    smooth = [*base, *SGD, "optim.phases={fake_score: {lr: 0.02}}"]
    run(smooth, tmp_path / "whole")
    run([*smooth, f"hardware.micro_batch={micro_batch}"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("method", "step", "after"), [("logged", 3, True), ("step_done", 1, False), ("step_done", 4, True)])
def test_a_kill_costs_nothing(
    method: str, step: int, after: bool, base: list[str], unbroken: Path, tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    """The first: between the two phases of a step."""
    run_killed(base, tmp_path / "run", method, step, after=after)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_without_any_weight_the_generator_stays_what_it_was(base: list[str], tmp_path: Path) -> None:
    """The floor that the distilled generators are compared with."""
    zero = [f"objective.{name}_weight=0" for name in ("kept", "forget", "fake_kept", "fake_forget")]
    run([*base, *zero], tmp_path / "floor")
    run([*base, *zero, "optim.steps=1"], tmp_path / "one")
    numbers = [read_json(tmp_path / name / "summary.json")["test"] for name in ("floor", "one")]
    assert numbers[0] == numbers[1]


def test_splits_and_kills_change_no_noise_predictor(tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    denoising = [*WORLD, *DENOISING, *PACE, *SGD, "teacher=none"]
    run(denoising, tmp_path / "whole")
    run([*denoising, "hardware.micro_batch=[10,13,1]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    run_killed(denoising, tmp_path / "run", "step_done", 4)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
