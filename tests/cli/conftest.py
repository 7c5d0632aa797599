"""What the verbs' tests share: one finished run, one finished comparison, and a way to be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.told import Problem, parse_problems
from tests.conftest import TINY, Outcome, run_cli

# A live teacher, features and a connector, so that every kind of weights is in its checkpoints.
TAUGHT = [
    "objective=fitnet",
    "objective.teacher_tap=f1",
    "objective.student_tap=f1",
    "teacher=mlp",
    "teacher.hidden=[12]",
    "teacher.taps={f1: relu1}",
]

# Settings of a recipe may enter the ledger; settings of a command line may not.
RECIPE = """# @package _global_
defaults:
  - override /dataset: gaussians
  - override /teacher: truth
  - override /student: mlp
  - override /objective: pld
  - override /hardware: cpu
  - _self_
paper: {title: "A small world", authors: "Nobody", venue: none, year: 2025, arxiv: "0000.00000"}
scale: bench
family: theory
about: "Is pld above ce in a world of six classes?"
dataset: {classes: 6, superclasses: 3, n_train: 96, n_test: 60}   # ours
student: {hidden: [8]}        # ours
optim: {epochs: 2}            # ours
source: {batch_size: 32}      # ours
hardware: {threads: 1}
run: {rivals: true, seeds: [1, 2, 3], log_every: 1}
published:
  - {table: Table 9, metric: top1, rows: [{ce: 50.0, pld: 60.0}]}
rivals:
  ce: [objective=ce, teacher=none]
  kd: [objective=kd]
claims: ["pld > ce", "pld ~ kd"]
notes: ["a world of this size shows nothing"]
"""


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    patch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished run alone, which lives for the whole session, draws its curves."""
    without_pictures(monkeypatch)


@pytest.fixture(scope="session")
def own_recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --config-dir with the recipe `small`."""
    home = tmp_path_factory.mktemp("own")
    (home / "recipes").mkdir()
    (home / "recipes" / "small.yaml").write_text(RECIPE)
    return home


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of a taught student, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = run_cli("train", *TINY, *TAUGHT, f"run.dir={folder}", f"run.root={folder.parent / 'root'}")
    assert outcome.code == 0, outcome.err
    return folder, outcome


@pytest.fixture(scope="session")
def compared(own_recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A comparison of three arms over three seeds with its ledger record, and what it printed."""
    root = tmp_path_factory.mktemp("compared")
    arguments = ["train", "recipe=small", f"--config-dir={own_recipes}", f"run.dir={root / 'run'}", f"run.root={root}", "run.ledger=true"]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        outcome = run_cli(*arguments)
    assert outcome.code == 0, outcome.err
    return root / "run", outcome


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refusal(kdrun: Callable[..., Outcome], here: Path) -> Callable[..., list[Problem]]:
    """`refusal("train", ...)`: the problems of a command line that must be refused: exit code 2, said on standard error
    alone and without a traceback, and nothing left behind in the current folder (where outputs/ would be)."""

    def run(*arguments: str) -> list[Problem]:
        before = {path: path.read_bytes() if path.is_file() else b"" for path in here.rglob("*")}
        outcome = kdrun(*arguments)
        assert outcome.code == 2, outcome.out + outcome.err
        # A comparison announces its first arm before that arm's weights are read.
        assert not [line for line in outcome.out.splitlines() if not line.startswith("[1/")]
        assert "Traceback" not in outcome.err
        assert {path: path.read_bytes() if path.is_file() else b"" for path in here.rglob("*")} == before
        found = parse_problems(outcome.err)
        counted = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        assert outcome.err.startswith(f"refused: {counted}; nothing was started\n")
        return found

    return run
