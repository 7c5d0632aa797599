"""What `auto` chooses is what was faster on the run's own steps; trying it leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kdrun.engine import choices
from kdrun.engine.choices import Choice, Seconds, Way
from kdrun.engine.records import read_json
from tests.conftest import TINY
from tests.engine.running import Notes, assert_same_run, run, run_killed, staged
from tests.engine.running import resume as go_on
from tests.engine.test_resume import IMAGES, STATEFUL

EAGER, PACKED = Way(False, False), Way(True, False)


@pytest.fixture
def keen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Short stages are tried too; what is found is kept in a folder of the test."""
    monkeypatch.setattr(choices, "LEAST_STEPS", 1)
    monkeypatch.setattr(choices, "LEAST_SECONDS", 0.0)
    monkeypatch.setenv("KDRUN_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "choices"


def fake(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[Way, str], Seconds | Exception]) -> list[Choice]:
    """Clocks that tell those times; what was asked."""
    asked: list[Choice] = []

    def told(self: object, choice: Choice) -> Seconds:
        asked.append(choice)
        found = seconds[choice.student, choice.dtype]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(choices._Trial, "seconds", told)
    return asked


def test_steps_that_were_only_tried_leave_no_trace(teacher_file: Path, keen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Banks, momentum, moving average, buffers, library randomness: the bytes of the run are those of one that tried nothing."""
    world = [o for o in TINY if not o.startswith("student")]
    live = ["teacher=mlp", "teacher.hidden=[16,16]", f"teacher.checkpoint={teacher_file}"]
    overrides = [*world, *live, *STATEFUL]
    run([*overrides, "hardware.compile=off"], tmp_path / "untried")
    monkeypatch.setattr(choices, "GAIN", 0.0)  # nothing is ever fast enough: what is tried is not taken
    real, steps = choices.loop.train_step, []
    monkeypatch.setattr(choices.loop, "train_step", lambda stage, hooks: (steps.append(type(hooks)), real(stage, hooks)))
    notes = Notes()
    run([*overrides, "hardware.compile=off", "hardware.dtype=auto"], tmp_path / "tried", notes)
    assert steps.count(choices.loop.Unwatched) == 2 * (choices.WARM_UP + choices.TIMED)  # fp32 and bf16
    assert any(note.startswith("measured in") for note in notes.notes)
    assert_same_run(tmp_path / "tried", tmp_path / "untried")


def test_each_network_gets_the_way_that_was_faster_for_it(keen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, both = Way(False, True), Way(True, True)
    times = {PACKED: Seconds(10, 20), EAGER: Seconds(12, 15), both: Seconds(4, 50), compiled: Seconds(3.9, 14.9)}
    asked = fake(monkeypatch, {(way, "fp32"): found for way, found in times.items()})
    notes = Notes()
    stage = staged([*IMAGES, "objective=kd", "teacher=resnet14", "hardware.compile=auto"], tmp_path / "run", notes)
    chosen = choices._from_json(read_json(next(keen.glob("*.json"))))
    assert [choice.student for choice in asked] == [PACKED, EAGER, both, compiled]
    assert (chosen.teacher, chosen.student) == (both, EAGER)  # 3.9 is no gain over 4, nor 14.9 over 15
    assert stage.stage.forward is stage.built.learner
    assert "teacher compiled, channels last 10,000.0 -> 4,000.0 ms a step; student eager 20,000.0 -> 15,000.0 ms" in notes.notes[-1]


def test_half_precision_is_taken_only_where_it_was_faster(keen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for half, wanted in ((7.0, torch.bfloat16), (9.9, None)):
        fake(monkeypatch, {(EAGER, "fp32"): Seconds(0, 10), (EAGER, "bf16"): Seconds(0, half)})
        words = [*IMAGES, "objective=ce", "hardware.compile=off", "hardware.channels_last=false", "hardware.dtype=auto"]
        for file in keen.glob("*.json"):
            file.unlink()
        assert staged(words, tmp_path / f"run{half}").stage.autocast == wanted


def test_what_cannot_be_compiled_runs_eagerly_and_says_why(keen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = RuntimeError("no C++ compiler\nand more")
    fake(monkeypatch, {(EAGER, "fp32"): Seconds(0, 10), (Way(False, True), "fp32"): fault})
    notes = Notes()
    stage = staged([*IMAGES, "objective=ce", "hardware.channels_last=false"], tmp_path / "run", notes).stage
    assert stage.forward is stage.learner
    assert notes.notes[-1].endswith("compiled: RuntimeError: no C++ compiler")


def test_what_was_measured_is_not_measured_again(keen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed of the same networks computes as the first did; other networks are measured anew."""
    words = [*IMAGES, "objective=ce", "hardware.compile=off"]
    asked = fake(monkeypatch, {(PACKED, "fp32"): Seconds(0, 10), (EAGER, "fp32"): Seconds(0, 5)})
    first = staged([*words, "seed=1"], tmp_path / "a").stage
    assert len(asked) == 2
    notes = Notes()
    second = staged([*words, "seed=2"], tmp_path / "b", notes).stage
    assert len(asked) == 2
    assert "measured before" in notes.notes[-1]
    for stage in (first, second):
        assert stage.learner.student.module.conv1.weight.is_contiguous()  # type: ignore[union-attr,operator]
    staged([*words, "student=resnet14"], tmp_path / "c")
    assert len(asked) == 4


def test_a_resumed_run_computes_as_it_began(keen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*IMAGES, "objective=ce", "hardware.compile=off", "hardware.dtype=auto"]
    fake(monkeypatch, {(PACKED, "fp32"): Seconds(0, 10), (PACKED, "bf16"): Seconds(0, 5), (EAGER, "bf16"): Seconds(0, 4)})
    run(words, tmp_path / "unbroken")
    run_killed(words, tmp_path / "run", "step_done", 4, after=True)
    fake(monkeypatch, {(PACKED, "fp32"): Seconds(0, 5), (PACKED, "bf16"): Seconds(0, 10), (EAGER, "fp32"): Seconds(0, 9)})
    for file in keen.glob("*.json"):
        file.unlink()  # another machine would find another way
    go_on(words, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_short_stages_are_not_tried(tmp_path: Path) -> None:
    notes = Notes()
    staged([*IMAGES, "objective=ce"], tmp_path / "run", notes)
    assert "compile off: 6 steps are too few to try" in notes.notes
    assert not (tmp_path / "run" / choices.FILE).exists()


@pytest.mark.slow
def test_the_real_search_ends_with_a_way_that_trains(keen: Path, tmp_path: Path) -> None:
    notes = Notes()
    found = run([*IMAGES, "objective=kd", "teacher=resnet14", f"run.root={tmp_path}", "hardware.dtype=auto"], tmp_path / "run", notes)
    assert any(note.startswith("measured in") for note in notes.notes)
    assert math.isfinite(found["value"])
