"""What a run expected to cost stands beside what it did cost, in its record."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.engine.records import read_json
from kdrun.ledger.forecasts import forecast_lines
from tests.conftest import TINY
from tests.engine.running import resume, run, run_killed

LONG = [*TINY, "optim.epochs=20", "evaluation.every_epochs=5", "run.checkpoint_every=10"]  # 60 steps
TAUGHT = ["objective=kd", "teacher=mlp", "teacher.hidden=[12]"]


def test_the_record_holds_predicted_and_actual(tmp_path: Path) -> None:
    summary = run([*LONG, *TAUGHT, "cache=dense"], tmp_path / "run")
    predicted, actual = summary["predicted"], summary["actual"]
    assert predicted["memory_bytes"].keys() == {"weights", "gradients", "optimiser state", "teacher", "activations"}
    assert predicted["peak_memory_bytes"] >= predicted["before_first_step_bytes"] > 0
    assert predicted["cache_bytes"] == 96 * 6 * 2  # one view of every row: six logits as float16
    assert 0 < actual["cache_bytes"] < 2**16  # whole blocks of the disk
    assert actual["peak_memory_bytes"] >= predicted["peak_before_bytes"]
    student, teacher = 2 * (32 * 8 + 8 * 6), 2 * (32 * 12 + 12 * 6)
    assert predicted["flops"] == (3 * student + teacher) * 96 * 20 + 4 * 60 * student + 60 * teacher
    assert all(side[key] > 0 for side in (predicted, actual) for key in ("seconds_per_step", "seconds"))
    assert read_json(tmp_path / "run" / "summary.json")["predicted"] == predicted


def test_what_is_known_before_the_first_step_is_written_before_it(tmp_path: Path) -> None:
    run_killed([*LONG, *TAUGHT], tmp_path / "run", "step_done", 1)
    predicted = read_json(tmp_path / "run" / "provenance.json")["predicted"]
    assert predicted["peak_memory_bytes"] > 0
    assert predicted["seconds"] is None  # of the run's own first steps
    summary = resume([*LONG, *TAUGHT], tmp_path / "run")
    assert summary["predicted"]["seconds"] > 0


def test_a_run_that_is_too_short_predicts_no_time(tmp_path: Path) -> None:
    summary = run([*TINY, *TAUGHT], tmp_path / "run")  # 6 steps
    assert summary["predicted"]["seconds"] is None
    assert summary["actual"]["seconds"] > 0
    assert not [line for line in forecast_lines(summary) if line.startswith(("a step", "in all"))]


@pytest.mark.parametrize("limit", ["run.max_steps=2", "run.dry=true"])
def test_a_run_that_is_cut_short_predicts_nothing(tmp_path: Path, limit: str) -> None:
    assert "predicted" not in run([*TINY, *TAUGHT, limit], tmp_path / "run")


def test_the_lines_tell_the_estimators_error() -> None:
    mebi = 2**20
    summary = {
        "predicted": {
            "peak_memory_bytes": 300 * mebi, "before_first_step_bytes": 200 * mebi, "peak_before_bytes": 210 * mebi,
            "seconds_per_step": 0.011, "seconds": 90.0, "cache_bytes": None,
        },
        "actual": {"peak_memory_bytes": 325 * mebi, "seconds_per_step": 0.010, "seconds": 100.0, "cache_bytes": None},
    }  # fmt: skip
    assert forecast_lines(summary) == [
        "peak memory 100 MiB predicted, 125 MiB measured above 200 MiB before the first step: off by -20 %",
        "a step      11 ms predicted, 10 ms measured: off by +10 %",
        "in all      90 s predicted, 100 s measured: off by -10 %",
    ]
    summary["actual"]["peak_memory_bytes"] = 205 * mebi
    assert forecast_lines(summary)[0] == "peak memory not above 205 MiB, which the process had used before the first step"
    summary["predicted"]["peak_before_bytes"], summary["actual"]["peak_memory_bytes"] = 190 * mebi, 199 * mebi
    assert forecast_lines(summary)[0] == "peak memory not above 199 MiB, which the process had used before the first step"
    assert forecast_lines({}) == []  # of a run before there were any
