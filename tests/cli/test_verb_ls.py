"""kdrun ls: what there is, for people, for programs and for shells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.config.paths import SearchPath
from kdrun.engine.stage import StageRun
from tests.conftest import TINY, Outcome

GROUPS = {"recipes": "recipes", "objectives": "objective", "teachers": "teacher", "students": "student", "datasets": "dataset"}


@pytest.mark.parametrize("kind", GROUPS)
def test_every_option_is_listed_with_what_it_is(kdrun: Callable[..., Outcome], kind: str) -> None:
    names = list(SearchPath.of().options(GROUPS[kind]))
    rows = kdrun("ls", kind, "--json").json
    assert [row["name"] for row in rows] == names
    assert [row["name"] for row in rows if not row["about"]] == []
    assert kdrun("ls", kind, "-q").out.split() == names
    table = kdrun("ls", kind).out
    assert all(any(line.startswith(f"{name} ") for line in table.splitlines()) for name in names)


def test_recipes_are_listed_by_default_with_scale_and_paper(kdrun: Callable[..., Outcome]) -> None:
    rows = {row["name"]: row for row in kdrun("ls", "--json").json}
    assert rows["pld_cifar100"]["scale"] == "paper"
    assert rows["pld_cifar100"]["paper"] == "PLD: A Choice-Theoretic List-Wise Knowledge Distillation (2025)"


def test_equations_are_shown_as_they_are_written(kdrun: Callable[..., Outcome]) -> None:
    """`s[pi_k]` is no mark-up."""
    assert "exp s[pi_j] - s[pi_k]" in kdrun("ls", "objectives").out


def test_a_folder_of_ones_own_is_listed_too(kdrun: Callable[..., Outcome], own_recipes: Path) -> None:
    assert "small" in kdrun("ls", "recipes", "-q", f"--config-dir={own_recipes}").out.split()
    assert "small" not in kdrun("ls", "recipes", "-q").out.split()


def test_without_runs_that_is_said(kdrun: Callable[..., Outcome], here: Path) -> None:
    assert kdrun("ls", "runs").out.strip() == "no runs yet"
    assert kdrun("ls", "runs", "--json").json == []
    assert kdrun("ls", "runs", "-q").out == ""
    assert not list(here.iterdir())


def test_runs_are_listed_with_their_state(
    kdrun: Callable[..., Outcome],
    here: Path,
    finished: tuple[Path, Outcome],
    compared: tuple[Path, Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, folder in (("whole", finished[0]), ("many", compared[0])):
        shutil.copytree(folder, here / "outputs" / "run" / name)
    shutil.copytree(finished[0], here / "outputs" / "teachers" / "mlp-0123456789ab")  # a teacher is no run of anybody's
    kdrun("train", *TINY, "objective=kd", "run.dry=true", "run.dir=outputs/run/limited", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "stop_requested", lambda self: self.stage.step >= 3)
        kdrun("train", *TINY, "objective=dkd", "run.dir=outputs/run/stopped", "-q")
    rows = {Path(row["name"]).name: row for row in kdrun("ls", "runs", "--json").json}
    assert {name: row["state"] for name, row in rows.items()} == {
        "whole": "done",
        "many": "done",
        "limited": "tainted",
        "stopped": "resumable",
    }
    assert (rows["whole"]["objective"], rows["many"]["recipe"]) == ("fitnet", "small")
    assert rows["whole"]["result"].startswith("top1 ")
    assert rows["many"]["result"].startswith("pld ")
    assert rows["stopped"]["result"] == ""
    assert kdrun("ls", "runs", "-q").out.split() == [f"outputs/run/{name}" for name in sorted(rows)]
    assert "outputs/run/stopped" in kdrun("ls", "runs").out


def test_a_run_that_was_named_by_hand_is_found_where_it_lies(
    kdrun: Callable[..., Outcome], here: Path, finished: tuple[Path, Outcome]
) -> None:
    shutil.copytree(finished[0], here / "mine")
    assert kdrun("ls", "runs", "--root=.", "-q").out.split() == ["mine"]


def test_singular_and_plural_mean_the_same_and_every_group_is_listed(kdrun: Callable[..., Outcome]) -> None:
    assert kdrun("ls", "objective", "-q").out == kdrun("ls", "objectives", "-q").out
    assert "single" in kdrun("ls", "plans", "-q").out.split()
    assert "adamw" in kdrun("ls", "optim", "-q").out.split()


def test_a_list_that_there_is_not_is_refused_with_its_neighbour(kdrun: Callable[..., Outcome]) -> None:
    outcome = kdrun("ls", "objctives")
    assert (outcome.code, outcome.out) == (2, "")
    assert "did you mean objectives" in outcome.err


def test_sweeps_are_listed_with_the_state_of_jobs(kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kdrun("ls", "sweeps").out.strip() == "no sweeps yet"
    folder = tmp_path / "outputs" / "sweeps" / "mine"
    folder.mkdir(parents=True)
    words = {"overrides": ["objective=kd,ce"], "zipped": [], "table": []}
    (folder / "sweep.json").write_text(json.dumps({"words": words, "jobs": [{"status": "done"}, {"status": "failed"}]}), encoding="utf-8")
    assert kdrun("ls", "sweeps", "--json").json == [{"name": "mine", "jobs": 2, "state": "1 done, 1 failed", "words": "objective=kd,ce"}]
