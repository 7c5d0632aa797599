"""kdrun resume: the same run goes on with the same configuration."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdrun.engine.records import held
from kdrun.engine.stage import StageRun
from tests.cli.conftest import TAUGHT
from tests.cli.told import Problem, only
from tests.conftest import TINY, Outcome

Refusal = Callable[..., list[Problem]]


def assert_same_student(one: Path, other: Path) -> None:
    weights, expected = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_it_had_not_been_stopped(
    kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "stop_requested", lambda self: self.stage.name == "student" and self.stage.step >= 4)
        stopped = kdrun("train", *TINY, *TAUGHT, "run.dir=run", "run.root=root", "-q")
    assert stopped.code == 75
    assert stopped.err.strip() == f"stopped: stopped at step 4 of 6; go on with: kdrun resume {here / 'run'}"
    assert kdrun("ls", "runs", "--root=.", "--json").json[0]["state"] == "resumable"
    resumed = kdrun("resume", "run")
    assert resumed.code == 0, resumed.err
    assert "student: goes on at step 4 of 6" in resumed.out
    assert (here / "run" / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()
    assert_same_student(here / "run", finished[0])


def test_a_finished_run_is_shown_again(kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]) -> None:
    shutil.copytree(finished[0], here / "run")
    outcome = kdrun("resume", "run", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 6
    assert_same_student(here / "run", finished[0])


@pytest.mark.parametrize("of", ["finished", "compared"])
def test_a_run_that_another_process_works_on_is_refused_until_that_ends(
    kdrun: Callable[..., Outcome], refusal: Refusal, here: Path, request: pytest.FixtureRequest, of: str
) -> None:
    shutil.copytree(request.getfixturevalue(of)[0], here / "run")
    with held(here / "run", fresh=False):
        problem = only(refusal("resume", "run"))
    assert problem.head == "run.dir: another process works in this run folder"
    assert (problem.where, problem.remedy) == (str(here / "run"), f"wait until it ends or stop it, then: kdrun resume {here / 'run'}")
    assert kdrun("resume", "run", "-q").code == 0
    assert not (here / "run" / ".lock").exists()


def test_a_folder_that_another_process_has_just_taken_is_refused(refusal: Refusal, here: Path) -> None:
    """Two runs with one run.dir that start together: both find it empty."""
    with held(here / "run", fresh=True):
        assert "another process works in this run folder" in only(refusal("train", *TINY, "objective=ce", "run.dir=run")).head


def test_overrides_are_refused_with_both_ways_on(refusal: Refusal, finished: tuple[Path, Outcome]) -> None:
    folder = str(finished[0])
    problem = only(refusal("resume", folder, "optim.lr=3", "seed=2"))
    assert problem.head == "optim.lr=3 seed=2: a resumed run keeps its configuration"
    assert f"kdrun resume {folder} goes on unchanged" in problem.remedy
    assert f"kdrun train ... plan.start_from={folder} optim.lr=3 seed=2" in problem.remedy


def test_the_second_way_on_works(kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]) -> None:
    outcome = kdrun("train", *TINY, "objective=ce", f"plan.start_from={finished[0]}", "optim.lr=0.001", "run.dir=new")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_what_is_no_run_is_refused(refusal: Refusal, folder: str) -> None:
    problem = only(refusal("resume", folder))
    assert problem.head == "this is not a run folder (it has no run.json)"
    assert "kdrun ls runs" in problem.remedy
