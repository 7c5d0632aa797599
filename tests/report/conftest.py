"""What the report's tests share: tiny finished runs of two arms, as a comparison leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.engine.running import run

ARMS = {"kd": ["objective=kd"], "ce": ["objective=ce", "teacher=none"]}
SEEDS = (1, 2, 3)


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """arms/<arm>/seed-<n> of two arms over three seeds."""
    folder = tmp_path_factory.mktemp("outputs") / "tiny" / "first"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        for arm, own in ARMS.items():
            for seed in SEEDS:
                run([*TINY, *own, f"seed={seed}"], folder / "arms" / arm / f"seed-{seed}")
    return folder
