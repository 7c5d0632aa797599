"""The teacher is measured before anything is trained, and held to what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdrun.engine.records import read_json
from kdrun.student.mlp import mlp
from kdrun.student.weights import sha256_of
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def given(tiny: list[str], tmp_path: Path) -> list[str]:
    """A run beside a teacher from a file; its folder is `run`."""
    torch.manual_seed(0)
    torch.save(mlp(6, 32, [8]).state_dict(), tmp_path / "teacher.pth")
    return [
        *tiny,
        "objective=kd",
        "teacher=mlp",
        "teacher.hidden=[8]",
        f"teacher.checkpoint={tmp_path / 'teacher.pth'}",
        f"run.dir={tmp_path / 'run'}",
    ]


def score(given: list[str], kdrun: Command, tmp_path: Path) -> float:
    """What the teacher measures here."""
    told = kdrun("train", *given, "--json")
    assert told.code == 0, told.err
    return float(told.json["teacher"]["top1"])


def test_the_measured_score_and_the_weights_hash_are_on_record(given: list[str], kdrun: Command, tmp_path: Path) -> None:
    value = score(given, kdrun, tmp_path)
    network = mlp(6, 32, [8])
    network.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True))
    for file in ("summary.json", "provenance.json"):
        teacher = read_json(tmp_path / "run" / file)["teacher"]
        assert teacher["sha256"] == sha256_of(network)
        assert (teacher["top1"], teacher["from"]) == (value, str(tmp_path / "teacher.pth"))


@pytest.mark.parametrize(("off", "tolerance", "code"), [(0.0, 0.0, 0), (0.9, 1.0, 0), (-0.9, 1.0, 0), (1.1, 1.0, 3), (-1.1, 1.0, 3)])
def test_a_claim_holds_within_its_tolerance(
    off: float, tolerance: float, code: int, given: list[str], kdrun: Command, tmp_path: Path
) -> None:
    value = score([*given[:-1], f"run.dir={tmp_path / 'first'}"], kdrun, tmp_path)
    told = kdrun("train", *given, f"teacher.claim={{metric: top1, value: {value + off}, tolerance: {tolerance}, source: Table 9}}")
    assert told.code == code
    if code == 3:
        assert f"the teacher scores top1 {value:.2f}, the recipe states {value + off}" in told.err
        assert "Table 9" in told.err
        assert "remedy" in told.err
        assert not (tmp_path / "run").exists()


def test_a_claim_about_something_that_is_not_measured_is_refused(given: list[str], kdrun: Command, tmp_path: Path) -> None:
    told = kdrun("train", *given, "teacher.claim={metric: top_1, value: 50.0}")
    assert told.code == 2
    assert "teacher.claim.metric: 'top_1' is not measured" in told.err
    assert "top1" in told.err.split("remedy")[1]
    assert not (tmp_path / "run").exists()


def test_the_claim_of_a_teacher_that_is_trained_here_is_held_too(tiny: list[str], kdrun: Command, tmp_path: Path) -> None:
    base = [*tiny, "objective=kd", "teacher=mlp", "teacher.hidden=[8]", f"run.root={tmp_path / 'root'}"]
    told = kdrun("train", *base, f"run.dir={tmp_path / 'run'}", "teacher.claim={metric: top1, value: 100.0, tolerance: 1.0}")
    assert told.code == 3
    assert "the teacher scores top1" in told.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # no student was trained beside it


def test_a_limited_run_does_not_hold_a_teacher_to_its_claim(given: list[str], kdrun: Command) -> None:
    told = kdrun("train", *given, "teacher.claim={metric: top1, value: 100.0, tolerance: 0.1}", "run.dry=true", "--json")
    assert told.code == 0, told.err
    assert told.json["tainted"] == ["run.dry=True"]


def test_a_normalisation_of_other_channels_is_refused(given: list[str], kdrun: Command, tmp_path: Path) -> None:
    told = kdrun("train", *given, "teacher.renormalise=true", "teacher.mean=[0.1]", "teacher.std=[1.0]")
    assert told.code == 2
    assert "teacher.mean: 1 means and 1 standard deviations, where gaussians has 32" in told.err
    assert "remedy" in told.err
    assert not (tmp_path / "run").exists()
