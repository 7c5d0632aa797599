"""Weights & Biases without a network: the run lies in its folder, and the user is told how to send it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.engine.records import read_json
from kdrun.engine.tracking import TRACKED
from kdrun.track.wandb import Wandb, has_key
from tests.conftest import TINY
from tests.engine.running import Notes, resume, run, run_killed

KD = [*TINY, "objective=kd", "run.checkpoint_every=0.4", "track=wandb"]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no settings of this machine's."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def test_without_a_key_it_is_offline_and_with_one_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Wandb()._mode() == ("offline", "there is no key: wandb login")
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert has_key()
    assert Wandb()._mode()[0] == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert Wandb()._mode() == ("offline", "WANDB_MODE")
    assert Wandb(mode="online")._mode()[0] == "online"


def test_an_offline_run_lies_in_its_folder_and_keeps_its_name_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_killed(KD, tmp_path / "run", "logged", 6)
    name = read_json(tmp_path / "run" / TRACKED)["wandb"]["id"]
    resume(KD, tmp_path / "run")
    assert read_json(tmp_path / "run" / TRACKED)["wandb"]["id"] == name
    parts = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert parts
    assert all((part / f"run-{name}.wandb").stat().st_size for part in parts)


def test_it_says_that_it_is_offline_and_how_to_send_the_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    notes = Notes()
    run(KD, tmp_path / "run", notes)
    (told,) = [note for note in notes.notes if note.startswith("wandb")]
    assert "offline (there is no key: wandb login); send it with: wandb sync" in told
    assert Path(told.split()[-1]).is_dir()
