"""Law 2: a run that is killed at any step and resumed leaves the same bytes as one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.engine.records import METRICS, SUMMARY, read_json
from kdrun.engine.stage import StageRun
from tests.conftest import TINY, Outcome
from tests.engine.running import Killed, assert_same_run, checkpoint_tensors, killing, run, run_killed, training_lines

# Three epochs of three steps, the last of each a partial batch; a checkpoint every two steps, so most steps lie between two.
STEPS = 9
PACE = [
    "source.batch_size=40",
    "optim.epochs=3",
    "run.checkpoint_every=0.6",
    "optim.schedule.name=cosine",
    "optim.schedule.warmup_epochs=1",
]
DROPOUT = ["student=custom", "student._target_=tests.engine.parts.DropoutMLP", "student.taps={pooled: fc@in}", "run.allow=[tests]"]
STATEFUL = [*PACE, *DROPOUT, "objective=crd", "objective.negatives=20", "objective.width=8", "optim.ema=0.8", "optim.clip_norm=1.0"]
IMAGES = [
    "dataset=digits",
    "dataset.subset=48",
    "dataset.subset_test=20",
    "dataset.padding=1",
    "teacher=none",
    "student=resnet8",
    "optim=adamw",
    "source.batch_size=20",
    "optim.epochs=2",
    "hardware=cpu",
    "hardware.threads=1",
    "run.log_every=1",
]
Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def stateful(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run with everything that can be forgotten, and what it leaves when nobody kills it."""
    world = [o for o in TINY if not o.startswith("student")]
    overrides = [*world, "teacher=mlp", "teacher.hidden=[16,16]", f"teacher.checkpoint={teacher_file}", *STATEFUL]
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(overrides, folder)
    assert len(training_lines(folder)) == STEPS
    return overrides, folder


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("method", "after"), [("step_done", False), ("step_done", True), ("logged", True)])
def test_a_run_killed_at_any_step_is_resumed_to_the_same_bytes(
    method: str, after: bool, step: int, stateful: tuple[list[str], Path], tmp_path: Path, kdrun: Command
) -> None:
    """Before the evaluation and checkpoint of a step, after them, and within the step between its update and its state."""
    overrides, unbroken = stateful
    run_killed(overrides, tmp_path / "run", method, step, after=after)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_the_comparison_sees_all_that_can_be_forgotten(stateful: tuple[list[str], Path]) -> None:
    kept = checkpoint_tensors(stateful[1])
    momentum = [name for name in kept if name.endswith("/momentum_buffer")]
    assert len(momentum) == 8  # two layers of the student, two embeddings
    assert {
        "/objective/bank_student",
        "/objective/bank_teacher",
        "/objective/log_z",
        "/ema/n_averaged",
        "/learner/student.module.forwards",
    } <= kept.keys()
    assert int(kept["/learner/student.module.forwards"]) == STEPS


def test_a_run_killed_again_and_again_is_resumed_to_the_same_bytes(
    stateful: tuple[list[str], Path], tmp_path: Path, kdrun: Command
) -> None:
    overrides, unbroken = stateful
    run_killed(overrides, tmp_path / "run", "step_done", 3)
    for step in (3, 4, 5, 9):
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, "step_done", step)
            with pytest.raises(Killed):
                kdrun("resume", str(tmp_path / "run"), "--quiet")
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_is_resumed_to_itself(stateful: tuple[list[str], Path], tmp_path: Path, kdrun: Command) -> None:
    overrides, unbroken = stateful
    run(overrides, tmp_path / "run")
    before = read_json(tmp_path / "run" / SUMMARY)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", unbroken)
    after = read_json(tmp_path / "run" / SUMMARY)
    assert {k: v for k, v in after.items() if k not in ("cost", "finished")} == {
        k: v for k, v in before.items() if k not in ("cost", "finished")
    }


@pytest.mark.parametrize("step", [2, 4, 6])
def test_batchnorm_and_augmentation_survive_a_kill(step: int, tmp_path: Path, kdrun: Command) -> None:
    run(IMAGES, tmp_path / "unbroken")
    run_killed(IMAGES, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_kill_during_an_evaluation_leaves_no_trace(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    base = [*tiny, *PACE, "dataset.validation=0.2"]
    run(base, tmp_path / "unbroken")
    original = StageRun.evaluate

    def evaluate(self: StageRun, step: int) -> None:
        original(self, step)
        if step == 6:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "evaluate", evaluate)
        with pytest.raises(Killed):
            run(base, tmp_path / "run")
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    summaries = [read_json(tmp_path / name / SUMMARY) for name in ("run", "unbroken")]
    assert summaries[0]["test_reads"] == summaries[1]["test_reads"] == 3


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_an_empty_record(tiny: list[str], tmp_path: Path) -> None:
    """A comparison starts such an arm again in its old folder; its half record must not stay."""
    from kdrun.config.compose import compose
    from kdrun.engine.report import Reporter
    from kdrun.engine.run import execute

    run(tiny, tmp_path / "unbroken")
    run_killed(tiny, tmp_path / "run", "step_done", 2)
    assert training_lines(tmp_path / "run")
    execute(compose([*tiny, f"run.dir={tmp_path / 'other'}"]), Reporter(), folder=tmp_path / "run")
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "unbroken" / METRICS).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5])
def test_a_signal_saves_at_that_step_and_says_how_to_go_on(
    number: signal.Signals, step: int, tiny: list[str], tmp_path: Path, kdrun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [*tiny, *PACE, "run.checkpoint_every=100", "optim.ema=0.9"]
    run(base, tmp_path / "unbroken")
    original = StageRun.logged

    def logged(self: StageRun, now: int, record: dict[str, Any]) -> None:
        original(self, now, record)
        if now == step:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(StageRun, "logged", logged)
    folder = tmp_path / "run"
    stopped = kdrun("train", *base, f"run.dir={folder}", "--quiet")
    assert stopped.code == 75
    assert f"kdrun resume {folder}" in stopped.err
    assert [c.name for c in (folder / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    monkeypatch.setattr(StageRun, "logged", original)
    resumed = kdrun("resume", str(folder), "--quiet")
    assert resumed.code == 0
    assert_same_run(folder, tmp_path / "unbroken")


def test_a_resumed_run_keeps_its_configuration(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    run_killed(tiny, tmp_path / "run", "step_done", 4)
    refused = kdrun("resume", str(tmp_path / "run"), "optim.lr=1.0")
    assert refused.code == 2
    assert "optim.lr=1.0" in refused.err
    assert "plan.start_from=" in refused.err


def test_a_run_of_an_earlier_version_is_resumed_and_measured(tiny: list[str], tmp_path: Path, kdrun: Command) -> None:
    """Keys that have come since are at their defaults."""
    import json

    run_killed([*tiny, "objective=kd"], tmp_path / "run", "step_done", 2)
    file = tmp_path / "run" / "run.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for group, name in (("run", "diagnose"), ("run", "packed"), ("hardware", "deterministic"), ("cache", "path")):
        del document["tree"][group][name]
    del document["tree"]["track"]
    file.write_text(json.dumps(document), encoding="utf-8")
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert kdrun("eval", str(tmp_path / "run"), "--json").code == 0
