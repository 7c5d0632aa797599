"""Trackers get the numbers of metrics.jsonl, go on after a resume, and never end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdrun.config.compose import compose
from kdrun.engine.records import METRICS, SUMMARY, read_json, read_lines
from kdrun.engine.tracking import TRACKED
from tests.conftest import TINY, Outcome
from tests.engine.running import Notes, assert_same_run, resume, run, run_killed
from tests.track.standin import StandIn

ROOT = Path(__file__).parents[2]
KD = [*TINY, "objective=kd", "run.checkpoint_every=0.4"]
MINE = ["run.allow=[tests]", "track.mine._target_=tests.track.standin.StandIn"]


@pytest.fixture
def told() -> Iterator[list[tuple[Any, ...]]]:
    StandIn.told.clear()
    yield StandIn.told
    StandIn.told.clear()


def of(told: list[tuple[Any, ...]], method: str) -> list[tuple[Any, ...]]:
    return [words for name, *words in told if name == method]


def test_a_tracker_gets_the_numbers_of_the_metrics_file(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run([*KD, *MINE], tmp_path / "run")
    heard = {(stage, step, name): value for stage, step, values in of(told, "numbers") for name, value in values.items()}
    lines = read_lines(tmp_path / "run" / METRICS)
    assert lines
    for line in lines:
        where, before = (line["stage"], line["step"]), f"{line['split']}/" if "split" in line else ""
        numbers = {k: v for k, v in line.items() if isinstance(v, float) and k not in ("epoch",)}
        numbers |= {f"terms/{k}": v for k, v in line.get("terms", {}).items()}
        assert {k: heard[(*where, f"{before}{k}")] for k in numbers} == numbers
    ((run_,),) = of(told, "begin")
    assert (run_.name, run_.group, run_.settings["optim.lr"], run_.kept) == ("run", "kdrun", 0.05, {})
    assert not [key for key in run_.settings if key.startswith("track")]
    assert of(told, "summary")[0][0]["value"] == read_json(tmp_path / "run" / SUMMARY)["value"]
    assert told[-1] == ("end", "finished")


def test_a_tracker_changes_nothing_of_the_run(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run(KD, tmp_path / "alone")
    run([*KD, *MINE], tmp_path / "tracked")
    assert_same_run(tmp_path / "tracked", tmp_path / "alone")


@pytest.mark.parametrize("method", ["begin", "stage", "numbers", "summary", "end"])
def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(method: str, told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    notes = Notes()
    broken = [*MINE, f"track.mine.breaks={method}", "track.other._target_=tests.track.standin.StandIn"]
    summary = run([*KD, *broken], tmp_path / "run", notes)
    assert summary["steps"] == 6
    warnings = [note for note in notes.notes if "left out" in note]
    assert warnings == ["track=mine is left out from here on (OSError: [Errno 28] No space left on device); metrics.jsonl has all numbers"]
    assert told[-1] == ("end", "finished")  # of the other one


def test_a_run_that_is_killed_and_resumed_is_one_run_of_its_tracker(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run_killed([*KD, *MINE], tmp_path / "run", "logged", 5)
    assert told[-1] == ("end", "failed")
    assert read_json(tmp_path / "run" / TRACKED)["mine"]["id"] == "first"
    told.clear()
    resume([*KD, *MINE], tmp_path / "run")
    assert of(told, "begin")[0][0].kept["id"] == "first"
    assert of(told, "stage") == [["student", 4]]
    assert told[-1] == ("end", "finished")


def test_a_failed_run_is_told_as_such(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run_killed([*KD, *MINE], tmp_path / "run", "evaluate", 3)
    assert told[-1] == ("end", "failed")


def test_every_arm_and_seed_is_a_run_of_its_own(told: list[tuple[Any, ...]], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = kdrun("train", *KD, *MINE, "run.seeds=[1,2]", f"run.dir={tmp_path / 'run'}", f"run.root={tmp_path}", "-q")
    assert outcome.code == 0, outcome.err
    assert [run_.name for (run_,) in of(told, "begin")] == ["arms-kd-seed-1", "arms-kd-seed-2"]


def test_the_first_of_several_ranks_alone_tracks(tmp_path: Path) -> None:
    """The tracker of this test writes a file for each process that opens it."""
    (tmp_path / "per_process.py").write_text(
        "import os\nfrom dataclasses import dataclass\nfrom tests.track.standin import StandIn\n\n\n"
        "@dataclass(eq=False)\nclass PerProcess(StandIn):\n    def begin(self, run):\n"
        "        (run.folder / f'rank-{os.environ[\"RANK\"]}').touch()\n        return super().begin(run)\n"
    )
    command = [sys.executable, "-m", "kdrun", "train", *KD, "hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2"]
    mine = ["run.allow=[per_process]", "track.mine._target_=per_process.PerProcess", f"run.dir={tmp_path / 'run'}", f"run.root={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([*command, *mine, "-q"], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "run").glob("rank-*")] == ["rank-0"]


def test_a_missing_package_is_refused_before_the_run(kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    absent = ["run.allow=[tests]", "track.mine._target_=tests.track.standin.Absent"]
    for more in ([], ["run.seeds=[1,2]"]):
        outcome = kdrun("train", *KD, *absent, *more, f"run.dir={tmp_path / 'run'}")
        assert outcome.code == 2
        assert "track.mine: the package no_such_tracker is not installed" in outcome.err
        assert 'pip install no_such_tracker, or pip install "kdrun[track]"' in outcome.err
        assert not (tmp_path / "run").exists()


def test_trackers_are_not_part_of_the_experiment() -> None:
    assert compose([*KD, "track=[tensorboard,mlflow]"]).hash() == compose(KD).hash()


def test_several_are_chosen_at_once_and_each_setting_has_its_line() -> None:
    composed = compose([*KD, "track=[tensorboard,mlflow]", "track.mlflow.experiment=mine"])
    assert composed.choices["track"] == "tensorboard,mlflow"
    assert list(composed.tree["track"]) == ["tensorboard", "mlflow"]
    assert composed.origins["track.tensorboard.folder"] == "conf/track/tensorboard.yaml:4"
    assert composed.origins["track.mlflow.experiment"] == "command line"


def test_faults_of_trackers_are_refused_with_their_remedy(kdrun: Callable[..., Outcome]) -> None:
    outcome = kdrun("train", *KD, "track=[tensorbord,mlflow]")
    assert outcome.code == 2
    assert "there is no track named 'tensorbord'" in outcome.err
    assert "did you mean tensorboard?" in outcome.err
    outcome = kdrun("train", *KD, "track=wandb", "track.wandb.mode=on", "track.wandb.projct=x")
    assert outcome.code == 2
    assert "track.wandb.mode: 'on' is not one of auto, online, offline" in outcome.err
    assert "did you mean project?" in outcome.err


def test_the_trackers_are_listed_and_shown(kdrun: Callable[..., Outcome]) -> None:
    assert kdrun("ls", "track", "-q").out.split() == ["mlflow", "none", "tensorboard", "wandb"]
    shown = json.loads(kdrun("show", *KD, "track=wandb", "--json").out)
    assert shown["track.wandb.mode"] == {"value": "auto", "origin": "conf/track/wandb.yaml:6"}


def test_settings_of_a_tracker_that_is_not_chosen_are_refused(kdrun: Callable[..., Outcome]) -> None:
    outcome = kdrun("train", *KD, "track.wandb.project=mine")
    assert outcome.code == 2
    assert "track.wandb: this tracker is not chosen" in outcome.err
    assert "track=wandb" in outcome.err
