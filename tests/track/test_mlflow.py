"""MLflow holds a run once, with its settings, however often it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdrun.engine.records import METRICS, read_json, read_lines
from kdrun.engine.tracking import TRACKED
from tests.conftest import TINY
from tests.engine.running import Notes, resume, run, run_killed

mlflow = pytest.importorskip("mlflow")
KD = [*TINY, "objective=kd", "run.checkpoint_every=0.4", "track=mlflow"]


def stored(folder: Path) -> tuple[Any, list[tuple[int, float]]]:
    """(the run, its losses)."""
    kept = read_json(folder / TRACKED)["mlflow"]
    client = mlflow.MlflowClient(tracking_uri=kept["uri"])
    history = client.get_metric_history(kept["run"], "student/loss")
    return client.get_run(kept["run"]), [(m.step, m.value) for m in history]


def test_a_killed_and_resumed_run_is_one_run_with_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_killed(KD, tmp_path / "run", "logged", 6)
    before, _ = stored(tmp_path / "run")
    assert before.info.status == "FAILED"
    summary = resume(KD, tmp_path / "run")
    after, losses = stored(tmp_path / "run")
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    lines = [line for line in read_lines(tmp_path / "run" / METRICS) if "loss" in line]
    assert sorted(losses) == [(line["step"], line["loss"]) for line in lines]
    assert after.data.params["optim.lr"] == "0.05"
    assert after.data.metrics["student/test/top1"] == summary["value"]
    assert after.data.tags["summary.value"] == str(summary["value"])


def test_a_server_that_does_not_answer_costs_a_warning(tmp_path: Path) -> None:
    notes = Notes()
    summary = run([*KD, "track.mlflow.uri=http://127.0.0.1:9"], tmp_path / "run", notes)
    assert summary["steps"] == 6
    assert len([note for note in notes.notes if note.startswith("track=mlflow is left out")]) == 1
