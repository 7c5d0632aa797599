"""Reports of runs that are unfinished, killed, diverged, repeated, of a sweep, and of other kinds of data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from kdrun.engine.records import METRICS, SUMMARY, read_json, write_json
from kdrun.report.page import to_html
from kdrun.report.text import to_markdown
from tests.conftest import TINY
from tests.engine.running import run, run_killed
from tests.report.test_pages import assert_alone, made


@pytest.fixture
def own(compared: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(compared, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_unfinished_run_counts_in_the_curves_alone(own: Path) -> None:
    (own / "arms" / "kd" / "seed-3" / SUMMARY).unlink()
    report = made(own)
    rows = {row[0]: row for row in report.boards[0].sections[0].tables[0].rows}
    assert rows["kd"][3] == "2"
    assert any("1 of 6 runs are not finished" in text for text in report.boards[0].summary)
    assert any("not finished: epoch 2 of 2" in row[3] for row in report.runs.rows)
    assert_alone(to_html(report))


def test_a_killed_run_with_half_a_line_is_read(tmp_path: Path) -> None:
    run_killed(TINY, tmp_path / "killed", "step_done", 3)
    with open(tmp_path / "killed" / METRICS, "a") as file:
        file.write('{"stage": "student", "st')
    report = made(tmp_path / "killed")
    assert report.boards[0].summary == ["No run of it is finished: there is no number yet.", *report.boards[0].summary[1:]]
    assert any(c.title.startswith("training loss") for s in report.boards[0].sections for c in s.charts)
    assert_alone(to_html(report))


def test_a_run_that_logged_nothing_is_said_to_have_logged_nothing(own: Path) -> None:
    folder = own / "arms" / "ce" / "seed-1"
    for name in (SUMMARY, METRICS, "provenance.json", "evaluation.json"):
        (folder / name).unlink()
    report = made(folder)
    assert "nothing logged yet" in report.runs.rows[0][3]
    assert "not recorded" in to_markdown(report)
    assert_alone(to_html(report))


def test_a_number_that_was_not_finite_is_shown_and_not_left_out(own: Path) -> None:
    file = own / "arms" / "kd" / "seed-2" / SUMMARY
    told = read_json(file)
    write_json(file, {**told, "value": math.nan, "test": {**told["test"], "top1": math.nan}})
    rows = {row[0]: row for row in made(own).boards[0].sections[0].tables[0].rows}
    assert rows["kd"][1] == "NaN"
    assert list(rows)[-1] == "kd"
    assert_alone(to_html(made(own)))


def test_a_repeated_run_counts_once(own: Path, compared: Path) -> None:
    report = made(compared, own)
    assert len(report.runs.rows) == 12
    assert {row[3] for row in report.boards[0].sections[0].tables[0].rows} == {"3"}
    assert any("6 runs repeat an arm and seed" in text for text in report.boards[0].summary)


def test_the_jobs_of_a_sweep_are_arms_over_seeds(own: Path, tmp_path: Path) -> None:
    jobs = [
        {"id": f"{arm}{seed}", "folder": f"arms/{arm}/seed-{seed}", "choices": {"objective": arm, "seed": str(seed)}, "status": "done"}
        for arm in ("kd", "ce")
        for seed in (1, 2, 3)
    ]
    jobs.append({"id": "x", "folder": "jobs/none", "choices": {"objective": "pld"}, "status": "pending"})
    (own / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    rows = [row[0] for row in made(own).boards[0].sections[0].tables[0].rows]
    assert sorted(rows) == ["ce (student alone)", "kd"]


def test_markup_in_names_is_shown_as_it_is(own: Path) -> None:
    shutil.move(own / "arms" / "kd", own / "arms" / "<b>kd & [red]x")
    report = made(own)
    assert "<b>kd & [red]x" in assert_alone(to_html(report)).text


OTHER = {
    "language": ["dataset=topics", "student=window_lm", "teacher=none", "objective=sft", "evaluation=language"],
    "graph": ["dataset=csbm", "student=mlp", "student.hidden=[8]", "teacher=none", "objective=ce", "source=whole", "evaluation=graph"],
    "segmentation": ["dataset=stripes", "dataset.subset=8", "student=segmenter", "teacher=none", "objective=ce", "evaluation=segmentation"],
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_kinds_of_data_have_their_report(kind: str, tmp_path: Path) -> None:
    summary = run([*OTHER[kind], "hardware=cpu", "hardware.threads=1", "optim.epochs=1", "run.max_steps=2"], tmp_path / kind)
    report = made(tmp_path / kind)
    text = assert_alone(to_html(report)).text
    assert summary["metric"] in report.boards[0].title
    assert "tainted" in text
    classes = next(s for s in report.boards[0].sections if s.key == "classes")
    assert (kind == "language") == (not classes.tables)


def test_a_diagnosed_run_shows_its_gradient_shares(tmp_path: Path) -> None:
    run([*TINY, "objective=kd", "run.diagnose=true"], tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "diagnostics.jsonl").read_text().splitlines()]
    section = next(s for s in made(tmp_path / "run").boards[0].sections if s.key == "gradients")
    rows = {row[1]: row for row in section.tables[0].rows}
    for name in ("ce", "kd"):
        assert rows[name][2] == f"{100 * lines[0]['terms'][name]['share']:.1f}"
        assert rows[name][3] == f"{100 * lines[-1]['terms'][name]['share']:.1f}"
    assert len(section.charts[0].series) == 2
    agreement = next(s for s in made(tmp_path / "run").boards[0].sections if s.key == "agreement")
    assert f"{lines[-1]['agreement']:.1f}" in agreement.tables[0].rows[0]


def test_a_line_of_half_a_diagnosis_is_read(tmp_path: Path) -> None:
    run([*TINY, "objective=kd"], tmp_path / "run")
    (tmp_path / "run" / "diagnostics.jsonl").write_text('{"stage": "student", "step": 1, "epoch": 0.3, "reason": "several phases"}\n{"st')
    section = next(s for s in made(tmp_path / "run").boards[0].sections if s.key == "gradients")
    assert section.words == ["kd: several phases"]
    assert not section.tables
