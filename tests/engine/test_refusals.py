"""What is refused before a folder exists, beyond what the configuration alone tells."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kdrun.config.compose import compose
from kdrun.engine.compare import Job, results
from kdrun.engine.records import SUMMARY, write_json
from kdrun.errors import Refused
from kdrun.ledger.statistics import summary
from tests.engine.running import run


@pytest.mark.parametrize(("override", "words"), [("optim.name=momentumm", "momentum"), ("optim.betas=[0.9]", "two numbers")])
def test_settings_that_an_optimiser_refuses_leave_nothing_behind(override: str, words: str, tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        run([*tiny, override], tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_root_that_cannot_hold_the_teacher_is_refused_before_the_run_has_a_folder(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file, not a folder")
    with pytest.raises(Refused) as caught:
        run([*tiny, "teacher=mlp", "teacher.hidden=[8]", "objective=kd"], tmp_path / "run")
    assert "run.root" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverged_is_not_left_out_of_its_comparison(tiny: list[str], tmp_path: Path) -> None:
    composed = compose(tiny)
    jobs = [Job("ce", seed, composed, tmp_path / str(seed)) for seed in (1, 2)]
    for job, value in zip(jobs, (50.0, float("nan")), strict=True):
        job.folder.mkdir()
        write_json(job.folder / SUMMARY, {"metric": "top1", "value": value, "test": {"top1": value}})
    found = results(jobs)["ce"]["top1"]
    assert "NaN" not in (jobs[1].folder / SUMMARY).read_text()
    assert (found[1], math.isnan(found[2])) == (50.0, True)
    assert summary(list(found.values())).sd is None  # no interval, so nothing can be concluded


def test_a_graph_network_on_rows_without_a_graph_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    with pytest.raises(Refused) as caught:
        run(["dataset=gaussians", "student=gcn", "teacher=none", "objective=ce", "hardware=cpu"], tmp_path / "run")
    assert "dataset=csbm" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_generator_unlike_the_teacher_is_refused_before_the_teacher_is_trained(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        run(["recipe=sfd_bench", "student.width=8", "source.exclude=[]", f"run.root={tmp_path}/root"], tmp_path / "run")
    assert [problem.key for problem in caught.value.problems] == ["student", "source.exclude"]
    assert not list(tmp_path.iterdir())


def test_an_evaluation_of_samples_is_refused_on_a_graph(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        run(["dataset=csbm", "student=gcn", "teacher=none", "objective=ce", "source=whole", "evaluation=classification"], tmp_path / "run")
    assert [(problem.key, problem.remedy) for problem in caught.value.problems] == [("evaluation", "evaluation=graph")]


def test_a_teacher_that_is_silent_at_first_is_refused_where_nobody_bears_it(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        run([*tiny, "objective=kd", "teacher=snapshot"], tmp_path / "run")
    assert [(problem.key, "teacher=ema" in problem.remedy) for problem in caught.value.problems] == [("teacher", True)]
    assert not (tmp_path / "run").exists()
