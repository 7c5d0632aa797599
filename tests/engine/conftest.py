"""What the engine's tests share: a teacher's file, and runs without pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrun.student.mlp import mlp
from kdrun.student.weights import save_student


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; no law speaks of it."""
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained MLP for the tiny world, large enough for it to have opinions."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = mlp(6, 32, [16, 16])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    save_student(network, path)
    return path


@pytest.fixture
def live(teacher_file: Path) -> list[str]:
    """Overrides that put that teacher beside the tiny student."""
    return ["teacher=mlp", "teacher.hidden=[16,16]", f"teacher.checkpoint={teacher_file}", "run.allow=[tests]"]
