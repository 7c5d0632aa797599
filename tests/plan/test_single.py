"""A teacher without weights is trained once, kept by content, and found by every run that needs the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.engine.records import METRICS, STUDENT_FILE, SUMMARY, read_json
from kdrun.engine.run import execute
from kdrun.engine.stage import StageRun
from kdrun.errors import Refused
from kdrun.plan.single import StageSpec, teacher_stage
from tests.conftest import Outcome
from tests.engine.processes import kdrun_to_end
from tests.engine.running import Notes, assert_bit_equal, assert_same_run, run, run_killed, training_lines, weights

TRAINED = ["objective=kd", "teacher=mlp", "teacher.hidden=[8]"]


def stage(overrides: list[str], fingerprint: str = "data") -> StageSpec:
    spec = teacher_stage(compose(overrides).tree, fingerprint)
    assert spec is not None
    return spec


def teachers(root: Path) -> list[Path]:
    return sorted(p for p in (root / "teachers").iterdir() if p.is_dir())


@pytest.mark.parametrize(
    "choice",
    [["teacher=none"], ["teacher=truth"], ["teacher=mlp", "teacher.checkpoint=weights.pth"], ["teacher=timm", "teacher.pretrained=true"]],
)
def test_a_teacher_whose_weights_come_from_elsewhere_is_not_trained(choice: list[str], tiny: list[str]) -> None:
    assert teacher_stage(compose([*tiny, *choice]).tree, "data") is None


def test_the_teacher_s_stage_is_plain_training_of_its_own_network(tiny: list[str]) -> None:
    base = [*tiny, *TRAINED, "teacher.seed=5", "optim.ema=0.9", "teacher.taps={f9: relu1}", "plan.start_from=elsewhere"]
    tree = stage(base).tree
    assert tree["student"]["_target_"] == "kdrun.student.mlp.mlp"
    assert tree["student"]["hidden"] == [8]
    assert (tree["teacher"], tree["objective"]) == ({"kind": "none"}, {"_target_": "kdrun.objective.ce.CE"})
    assert (tree["seed"], tree["optim"]["ema"], tree["plan"]["start_from"]) == (5, None, None)
    assert tree["optim"]["lr"] == compose(base).tree["optim"]["lr"]


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ("objective=pld", False), ("seed=9", False), ("student.hidden=[4]", False), ("hardware.micro_batch=8", False),
        ("run.log_every=3", False), ("optim.ema=0.5", False), ("evaluation.every_epochs=2", False),
        ("teacher.hidden=[9]", True), ("teacher.seed=1", True), ("optim.lr=0.01", True), ("optim.epochs=3", True),
        ("source.batch_size=16", True), ("teacher.fit={optim.lr: 0.01}", True), ("run.max_steps=3", True), ("run.dry=true", True),
    ],
)  # fmt: skip
def test_a_teacher_is_named_by_what_it_depends_on_and_nothing_else(change: str, another: bool, tiny: list[str]) -> None:
    base = [*tiny, *TRAINED]
    assert (stage([*base, change]).folder != stage(base).folder) is another


def test_another_content_of_the_data_is_another_teacher(tiny: list[str]) -> None:
    assert stage([*tiny, *TRAINED], "data").folder != stage([*tiny, *TRAINED], "other").folder


@pytest.mark.parametrize(
    "fit",
    ["teacher.fit={optim.lr: 0.01, optim.schedule.milestones: [0.5]}", "teacher.fit={optim: {lr: 0.01, schedule: {milestones: [0.5]}}}"],
)
def test_fit_changes_single_settings_however_it_is_written(fit: str, tiny: list[str]) -> None:
    ours, theirs = stage([*tiny, *TRAINED, fit]).tree["optim"], compose(tiny).tree["optim"]
    assert (ours["lr"], ours["schedule"]["milestones"]) == (0.01, [0.5])
    assert {k: v for k, v in ours.items() if k not in ("lr", "schedule")} == {
        k: v for k, v in theirs.items() if k not in ("lr", "schedule")
    }
    assert theirs["lr"] == 0.05  # the student's stays


@pytest.mark.parametrize(
    ("fit", "near"), [("{optim.lrr: 0.1}", "optim.lr"), ("{optm.lr: 0.1}", "optim.lr"), ("{optim.lr.x: 0.1}", "optim.lr")]
)
def test_a_setting_that_there_is_not_is_refused(fit: str, near: str, tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"teacher\.fit\..*unknown key") as caught:
        run([*tiny, *TRAINED, f"teacher.fit={fit}"], tmp_path / "run")
    assert near in caught.value.problems[0].remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fit", ["{optim.lr: fast}", "{optim.epochs: -1}", "{source.batch_size: 0}"])
def test_an_illegal_value_is_refused_before_anything_is_spent(fit: str, tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        run([*tiny, *TRAINED, f"teacher.fit={fit}"], tmp_path / "run")
    assert "teacher.fit" in caught.value.problems[0].where
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_is_trained_once_and_used_by_every_run_that_needs_it(tiny: list[str], tmp_path: Path) -> None:
    base = [*tiny, *TRAINED]
    first = run(base, tmp_path / "first")
    (folder,) = teachers(tmp_path / "root")
    record, made = (folder / METRICS).read_bytes(), (folder / STUDENT_FILE).stat().st_mtime_ns
    second = run([*base, "objective=pld", "seed=7"], tmp_path / "second")
    assert teachers(tmp_path / "root") == [folder]
    assert ((folder / METRICS).read_bytes(), (folder / STUDENT_FILE).stat().st_mtime_ns) == (record, made)
    assert first["teacher"] == second["teacher"]
    assert first["teacher"]["from"] == str(folder)
    run([*base, "teacher.fit={optim.lr: 0.01}"], tmp_path / "third")
    assert len(teachers(tmp_path / "root")) == 2


def test_the_trained_teacher_is_the_network_trained_alone(tiny: list[str], tmp_path: Path) -> None:
    """The stage is no second trainer: the same network as a student under the same settings gets the same weights, forward draws aside."""
    run([*tiny, *TRAINED, "teacher.seed=3"], tmp_path / "run")
    (folder,) = teachers(tmp_path / "root")
    run([*tiny, "teacher=none", "objective=ce", "seed=3"], tmp_path / "alone")  # the student's network is the teacher's here
    assert_bit_equal(weights(folder), weights(tmp_path / "alone"))
    assert read_json(folder / SUMMARY)["test"]["top1"] == read_json(tmp_path / "run" / SUMMARY)["teacher"]["top1"]


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("how", ["resume", "again"])
def test_a_run_killed_while_its_teacher_is_trained_ends_with_the_same_teacher(
    how: str, step: int, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    """Before the first checkpoint and after it; going on with the run, or starting another one that needs the same teacher."""
    base = [*tiny, *TRAINED]
    run(base, tmp_path / "a" / "run")
    run_killed(base, tmp_path / "b" / "run", "step_done", step, stage="teacher")
    assert not (tmp_path / "b" / "run" / METRICS).exists()
    if how == "resume":
        assert kdrun("resume", str(tmp_path / "b" / "run"), "--quiet").code == 0
        assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")
    else:
        run(base, tmp_path / "b" / "again")
        assert_same_run(tmp_path / "b" / "again", tmp_path / "a" / "run")
    (unbroken,), (broken,) = teachers(tmp_path / "a" / "root"), teachers(tmp_path / "b" / "root")
    assert broken.name == unbroken.name
    assert_same_run(broken, unbroken)


def test_a_stop_while_the_teacher_is_trained_names_the_run_to_go_on_with(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kdrun: Callable[..., Outcome]
) -> None:
    monkeypatch.setattr(StageRun, "stop_requested", lambda self: self.stage.name == "teacher" and self.stage.step == 2)
    stopped = kdrun("train", *tiny, *TRAINED, f"run.dir={tmp_path / 'run'}", f"run.root={tmp_path / 'root'}", "--quiet")
    assert stopped.code == 75
    assert f"kdrun resume {tmp_path / 'run'}" in stopped.err
    monkeypatch.undo()
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert [line["step"] for line in training_lines(*teachers(tmp_path / "root"))] == [1, 2, 3, 4, 5, 6]


def test_two_runs_that_want_one_teacher_at_once_train_it_once(tiny: list[str], tmp_path: Path) -> None:
    """The second one waits at the lock and then finds it."""
    base = [*tiny, *TRAINED, "optim.epochs=10", f"run.root={tmp_path / 'root'}"]
    runs = [compose([*base, f"seed={i}", f"run.dir={tmp_path / f'run{i}'}"]) for i in (0, 1)]
    notes = [Notes(), Notes()]
    with ThreadPoolExecutor(2) as pool:
        done = [result.summary for result in pool.map(execute, runs, notes)]
    (folder,) = teachers(tmp_path / "root")
    assert [line["step"] for line in training_lines(folder)] == list(range(1, 31))
    assert sum(any(n.startswith("teacher found") for n in note.notes) for note in notes) == 1
    assert done[0]["teacher"]["sha256"] == done[1]["teacher"]["sha256"]


@pytest.mark.slow
def test_two_processes_that_want_one_teacher_at_once_train_it_once(tiny: list[str], tmp_path: Path) -> None:
    base = [*tiny, *TRAINED, "optim.epochs=100", f"run.root={tmp_path / 'root'}"]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda i: kdrun_to_end("train", *base, f"seed={i}", f"run.dir={tmp_path / f'run{i}'}", "--json"), (0, 1)))
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    (folder,) = teachers(tmp_path / "root")
    assert [line["step"] for line in training_lines(folder)] == list(range(1, 301))
    assert len({json.loads(d.stdout)["teacher"]["sha256"] for d in done}) == 1


def test_the_stage_is_a_legal_configuration_of_its_own(tiny: list[str]) -> None:
    composed = compose([*tiny, *TRAINED])
    composed.tree = dict(stage([*tiny, *TRAINED]).tree)
    check(composed)
