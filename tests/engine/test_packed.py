"""Runs that share a process, their batches and their teacher leave the bytes that each would have left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.engine import packed, state
from kdrun.engine.compare import SUMMARY
from kdrun.engine.loop import NotFinite
from kdrun.engine.packed import Job, key, run_packed
from kdrun.engine.records import read_json
from kdrun.engine.report import Reporter
from kdrun.engine.stage import StageRun, Stopped
from kdrun.teacher.live import LiveTeacher
from tests.conftest import TINY
from tests.engine.running import Killed, assert_same_run, run

BASE = [o for o in TINY if o != "teacher=truth"] + ["hardware.compile=off", "run.checkpoint_every=0.7"]
ARMS = {
    "kd": ["objective=kd"],
    "kd_hot": ["objective=kd", "objective.temperature=8", "optim.lr=0.2"],
    "dkd": ["objective=dkd"],
    "pld": ["objective=pld", "optim=adamw", "optim.epochs=3"],
    "fitnet": ["objective=fitnet", "objective.student_tap=f1", "objective.teacher_tap=f1"],
    "late": ["objective=fitnet", "objective.student_tap=f1", "objective.teacher_tap=f2", "student.hidden=[8,8]"],
    "crd": ["objective=crd", "objective.negatives=20", "objective.width=8"],
    "micro": ["objective=kd", "optim.ema=0.9", "optim.clip_norm=1.0"],
    "ce": ["objective=ce", "teacher=none"],
}


def job(words: list[str], folder: Path, resume: bool = False) -> Job:
    composed = compose([*words, f"run.dir={folder}", f"run.root={folder.parent.parent / 'root'}"])
    check(composed)
    return Job(composed, folder, resume)


def words(name: str, live: list[str]) -> list[str]:
    return [*BASE, *([] if name == "ce" else live), *ARMS[name]]


def test_a_packed_run_is_the_run_alone(live: list[str], tmp_path: Path) -> None:
    """Other objectives, rates, optimisers, lengths, students, taps; weights, metrics and checkpoints."""
    ended = run_packed([job(words(name, live), tmp_path / "packed" / name) for name in ARMS], Reporter())
    assert [member.failure for member in ended] == [None] * len(ARMS)
    for name, member in zip(ARMS, ended, strict=True):
        run(words(name, live), tmp_path / "alone" / name)
        assert_same_run(tmp_path / "packed" / name, tmp_path / "alone" / name)
        assert member.summary is not None
        assert member.summary["packed"] == len(ARMS)
        assert member.summary["test"] == read_json(tmp_path / "alone" / name / SUMMARY)["test"]


def test_the_teacher_is_asked_once_for_all(live: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = LiveTeacher.signal
    monkeypatch.setattr(LiveTeacher, "signal", lambda self, batch, needs: (asked.append(len(batch.ids)), original(self, batch, needs))[1])
    names = ["kd", "dkd", "kd_hot", "pld", "fitnet", "late"]
    ended = run_packed([job(words(name, live), tmp_path / "packed" / name) for name in names], Reporter())
    assert len(ended) == len(names)
    # Three epochs of 96 rows in batches of 32; the rows of an epoch's evaluation are 60.
    assert asked.count(32) == 3 * 3


def test_a_cache_is_filled_and_read_as_alone(live: list[str], tmp_path: Path) -> None:
    more = ["cache=dense", "cache.dtype=fp32"]
    names = ["kd", "dkd"]
    run_packed([job([*words(name, live), *more], tmp_path / "packed" / name) for name in names], Reporter())
    for name in names:
        run([*words(name, live), *more], tmp_path / "alone" / name)
        assert_same_run(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_one_that_fails_leaves_the_others_alone(live: list[str], tmp_path: Path) -> None:
    bad = [*words("kd", live), "optim.lr=1e30"]
    jobs = [job(bad, tmp_path / "packed" / "bad"), job(words("dkd", live), tmp_path / "packed" / "dkd")]
    ended = run_packed(jobs, Reporter())
    assert isinstance(ended[0].failure, NotFinite)
    run(words("dkd", live), tmp_path / "alone" / "dkd")
    assert_same_run(tmp_path / "packed" / "dkd", tmp_path / "alone" / "dkd")


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_pack_that_is_killed_goes_on_to_the_same_bytes(
    step: int, live: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a round: some members are a step ahead of others, and their checkpoints of other steps."""
    names = ["kd", "pld", "crd"]
    original, seen = StageRun.step_done, []

    def killed(self: StageRun, now: int) -> None:
        original(self, now)
        seen.append(now)
        if seen.count(step) == 2:
            raise Killed

    def fatal(member: packed.Member, do: Callable[..., None], *arguments: object) -> None:
        do(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "step_done", killed)
        patch.setattr(packed, "_attempt", fatal)
        with pytest.raises(Killed):
            run_packed([job(words(name, live), tmp_path / "packed" / name) for name in names], Reporter())
    run_packed([job(words(name, live), tmp_path / "packed" / name, resume=True) for name in names], Reporter())
    for name in names:
        run(words(name, live), tmp_path / "alone" / name)
        assert_same_run(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_a_signal_stops_all_of_them_saved(live: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, original = ["kd", "dkd"], StageRun.step_done

    def asked(self: StageRun, now: int) -> None:
        original(self, now)
        if now == 2 and self.folder.name == "kd":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "step_done", asked)
        with pytest.raises(Stopped):
            run_packed([job(words(name, live), tmp_path / "packed" / name) for name in names], Reporter())
    assert all(state.newest(tmp_path / "packed" / name / "checkpoints")[0] == 2 for name in names)  # type: ignore[index]
    run_packed([job(words(name, live), tmp_path / "packed" / name, resume=True) for name in names], Reporter())
    for name in names:
        run(words(name, live), tmp_path / "alone" / name)
        assert_same_run(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_only_runs_that_see_the_same_batches_have_one_key(live: list[str]) -> None:
    def of(*more: str) -> str | None:
        return key(compose([*words("kd", live), *more]).tree)

    assert of() == of("objective=dkd") == of("optim.lr=0.3") == of("student.hidden=[4]") is not None
    assert len({of(), of("seed=2"), of("source.batch_size=16"), of("dataset.n_train=90"), of("hardware.micro_batch=8")}) == 5
    assert of("hardware.compile=on") is None
    assert of("plan=rounds") is None
