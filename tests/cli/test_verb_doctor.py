"""kdrun doctor: what this machine offers, and an exit code for scripts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kdrun.cli import doctor
from tests.conftest import Outcome

Rows = dict[str, dict[str, str]]


@pytest.fixture
def rows(kdrun: Callable[..., Outcome], here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Rows]]:
    """`rows(...)`: exit code and the checks by name, on a machine whose memory and disk suffice."""
    monkeypatch.setattr(doctor, "LOW_DISK_GB", 0)
    monkeypatch.setattr(doctor, "LOW_MEMORY_GB", 0)
    monkeypatch.delenv("KDRUN_DATA", raising=False)

    def run(*arguments: str) -> tuple[int, Rows]:
        outcome = kdrun("doctor", *arguments, "--json")
        return outcome.code, {row["name"]: row for row in outcome.json}

    return run


def test_a_good_machine_has_exit_code_0_and_is_left_as_it_was(rows: Callable[..., tuple[int, Rows]], here: Path) -> None:
    code, found = rows()
    assert code == 0
    assert found["torch"] == {"name": "torch", "state": "ok", "found": metadata.version("torch"), "remedy": ""}
    assert {row["state"] for row in found.values()} <= {"ok", "note"}
    assert not list(here.iterdir())


def test_a_missing_package_has_exit_code_3_and_a_remedy(rows: Callable[..., tuple[int, Rows]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "kdrun-is-not-there"))
    code, found = rows()
    assert code == 3
    assert found["kdrun-is-not-there"]["state"] == "bad"
    assert found["kdrun-is-not-there"]["remedy"] == "pip install kdrun-is-not-there"


def test_a_missing_extra_is_a_note(rows: Callable[..., tuple[int, Rows]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"kdrun-is-not-there": "cluster"})
    code, found = rows()
    assert code == 0
    assert (found["kdrun-is-not-there"]["state"], found["kdrun-is-not-there"]["remedy"]) == ("note", 'pip install "kdrun[cluster]"')


def test_a_root_that_cannot_be_written_is_bad(rows: Callable[..., tuple[int, Rows]], here: Path) -> None:
    (here / "file").write_text("")
    code, found = rows("--root", "file/runs")
    assert code == 3
    assert "cannot be written" in found["disk"]["found"]
    assert "run.root" in found["disk"]["remedy"]


def test_little_space_is_bad(rows: Callable[..., tuple[int, Rows]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK_GB", 10**9)
    assert rows()[1]["disk"]["state"] == "bad"


def test_the_folder_of_real_data_is_looked_into(
    rows: Callable[..., tuple[int, Rows]], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "nowhere"))
    code, found = rows()
    assert (code, found["KDRUN_DATA"]["state"]) == (3, "bad")
    (tmp_path / "nowhere" / "cifar100").mkdir(parents=True)
    code, found = rows()
    assert (code, found["KDRUN_DATA"]["state"]) == (0, "ok")
    assert "cifar100" in found["KDRUN_DATA"]["found"]


@pytest.mark.parametrize(("value", "state"), [("1", "note"), ("0", "ok")])
def test_offline_mode_is_noted(rows: Callable[..., tuple[int, Rows]], monkeypatch: pytest.MonkeyPatch, value: str, state: str) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, value)
    assert rows()[1]["hub"]["state"] == state


def test_a_compiler_is_tried_only_if_asked_for(rows: Callable[..., tuple[int, Rows]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    assert "compile" not in rows()[1]
    code, found = rows("--compile")
    assert (code, found["compile"]["found"]) == (3, "no C++ compiler")
    assert "hardware.compile=off" in found["compile"]["remedy"]


def test_people_get_a_table(kdrun: Callable[..., Outcome], here: Path) -> None:
    lines = kdrun("doctor").out.splitlines()
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)
