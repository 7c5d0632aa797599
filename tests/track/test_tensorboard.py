"""The event files of a run hold the numbers of its metrics file, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.engine.records import METRICS, read_lines
from tests.conftest import TINY
from tests.engine.running import resume, run, run_killed

pytest.importorskip("tensorboard")
KD = [*TINY, "objective=kd", "run.checkpoint_every=0.4", "track=tensorboard"]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def expected(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line["loss"])) for line in read_lines(folder / METRICS) if "loss" in line]


def test_the_events_are_the_numbers(tmp_path: Path) -> None:
    summary = run(KD, tmp_path / "run")
    stage = tmp_path / "run" / "tensorboard" / "student"
    assert scalars(stage, "loss") == expected(tmp_path / "run")
    assert scalars(stage, "test/top1")[-1] == (6, pytest.approx(summary["value"]))


def test_a_resume_takes_back_the_steps_that_it_repeats(tmp_path: Path) -> None:
    run_killed(KD, tmp_path / "run", "logged", 6)  # step 5 was told; the newest checkpoint is that of step 5 or before
    resume(KD, tmp_path / "run")
    assert scalars(tmp_path / "run" / "tensorboard" / "student", "loss") == expected(tmp_path / "run")


def test_a_folder_for_all_runs(tmp_path: Path) -> None:
    run([*KD, f"track.tensorboard.folder={tmp_path / 'all'}"], tmp_path / "run")
    assert scalars(tmp_path / "all" / "run" / "student", "loss")
    assert not (tmp_path / "run" / "tensorboard").exists()
