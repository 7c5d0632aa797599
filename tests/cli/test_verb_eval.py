"""kdrun eval: whatever holds a student's weights is measured again, beside its teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.told import Problem, only
from tests.conftest import TINY, Outcome

Refusal = Callable[..., list[Problem]]
METRICS = ("top1", "top5", "nll", "ece", "agreement", "kl_teacher", "teacher_top1")


@pytest.mark.parametrize("inside", ["", "student.safetensors", "checkpoints", "checkpoints/step-00000006"])
def test_everything_in_a_run_s_folder_measures_as_the_run_did(
    kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome], inside: str
) -> None:
    folder = finished[0]
    outcome = kdrun("eval", str(folder / inside), "--no-latency", "--json")
    assert outcome.code == 0, outcome.err
    recorded = json.loads((folder / "summary.json").read_text())["test"]
    assert outcome.json["metrics"]["test"] == pytest.approx(recorded)
    assert outcome.json["weights"].startswith(str(folder))


def test_an_older_checkpoint_measures_as_it_did_then(kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome]) -> None:
    folder = finished[0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (then,) = [line for line in lines if line.get("split") == "test" and line["step"] == 3]
    outcome = kdrun("eval", str(folder / "checkpoints" / "step-00000003"), "--no-latency", "--json")
    assert outcome.json["metrics"]["test"] == pytest.approx({k: then[k] for k in METRICS})


def test_the_table_shows_quality_agreement_and_cost_of_both(kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome]) -> None:
    outcome = kdrun("eval", str(finished[0]))
    assert outcome.code == 0, outcome.err
    shown = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.split()}
    recorded = json.loads((finished[0] / "summary.json").read_text())
    for name in METRICS:
        assert shown[name] == [f"{recorded['test'][name]:.4g}"]
    assert shown["student"][0] == f"{recorded['student']['parameters']:,}"
    assert shown["teacher"][0] == "474"  # 32 * 12 + 12 + 12 * 6 + 6
    assert shown["student"][-1] == shown["teacher"][-1] == "ms"


def test_json_tells_cost_and_latency(kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome]) -> None:
    cost = kdrun("eval", str(finished[0]), "--json").json["cost"]
    assert cost.keys() == {"student", "teacher"}
    assert all({"parameters", "flops", "median_ms"} <= row.keys() for row in cost.values())
    assert "median_ms" not in kdrun("eval", str(finished[0]), "--json", "--no-latency").json["cost"]["student"]


@pytest.fixture
def export(finished: tuple[Path, Outcome], here: Path) -> Path:
    """The exported student, away from its run."""
    return Path(shutil.copy(finished[0] / "student.safetensors", here / "student.safetensors"))


def test_a_file_alone_is_refused_with_what_to_add(refusal: Refusal, export: Path) -> None:
    problem = only(refusal("eval", str(export)))
    assert problem.head.endswith("this file says nothing of its network and data")
    assert problem.remedy == "add recipe=NAME, or dataset=... student=..."


def test_a_file_with_its_groups_is_measured(kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome], export: Path) -> None:
    outcome = kdrun("eval", str(export), *TINY, "--no-latency", "--json")
    assert outcome.code == 0, outcome.err
    recorded = json.loads((finished[0] / "summary.json").read_text())["test"]
    assert outcome.json["metrics"]["test"]["top1"] == recorded["top1"]
    assert outcome.json["metrics"]["test"]["teacher_top1"] == 100.0  # beside the world's posterior, which these groups name


def test_a_file_of_another_network_is_refused(refusal: Refusal, export: Path) -> None:
    problems = refusal("eval", str(export), *TINY, "student.hidden=[9]")
    assert "fc1.weight is [8, 32] in the file, [9, 32] here" in problems[0].head
    assert problems[0].where == str(export)


def test_a_run_may_be_measured_on_other_data(kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome]) -> None:
    outcome = kdrun("eval", str(finished[0]), "dataset.n_test=30", "--no-latency", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["metrics"]["test"] != json.loads((finished[0] / "summary.json").read_text())["test"]


def test_one_arm_of_a_comparison_is_measured_and_the_whole_is_refused_with_one(
    kdrun: Callable[..., Outcome], refusal: Refusal, compared: tuple[Path, Outcome]
) -> None:
    arm = compared[0] / "arms" / "pld" / "seed-1"
    assert kdrun("eval", str(arm), "--no-latency").code == 0
    problem = only(refusal("eval", str(compared[0])))
    assert "comparison" in problem.head
    assert "kdrun eval " in problem.remedy
    assert Path(problem.remedy.split()[-1]).is_dir()


def test_what_is_not_there_is_refused(refusal: Refusal) -> None:
    problem = only(refusal("eval", "nowhere"))
    assert problem.head == "nowhere: no such run, checkpoint or file"


def test_a_run_without_a_whole_checkpoint_is_refused(refusal: Refusal, finished: tuple[Path, Outcome], here: Path) -> None:
    (here / "run").mkdir()
    shutil.copy(finished[0] / "run.json", here / "run" / "run.json")
    problem = only(refusal("eval", "run"))
    assert problem.head == "there is no finished student and no whole checkpoint here"
    assert problem.remedy == f"kdrun resume {here / 'run'}"


def test_a_damaged_checkpoint_is_refused(refusal: Refusal, finished: tuple[Path, Outcome], here: Path) -> None:
    shutil.copytree(finished[0], here / "run")
    file = here / "run" / "checkpoints" / "step-00000006" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    problem = only(refusal("eval", str(file.parent)))
    assert "damaged" in problem.head
    assert "the one before it" in problem.remedy


def test_a_teacher_whose_weights_are_gone_is_left_out(kdrun: Callable[..., Outcome], finished: tuple[Path, Outcome], here: Path) -> None:
    shutil.copytree(finished[0], here / "run")
    summary = json.loads((here / "run" / "summary.json").read_text())
    summary["teacher"]["from"] = str(here / "gone")
    (here / "run" / "summary.json").write_text(json.dumps(summary))
    outcome = kdrun("eval", "run", "--no-latency", "--json")
    assert outcome.code == 0, outcome.err
    assert "agreement" not in outcome.json["metrics"]["test"]
    assert outcome.json["cost"].keys() == {"student"}
