"""Rounds of queries: what may be looked at, what is counted, and that a killed run ends with the same students."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrun.config.compose import compose
from kdrun.engine.build import load_data
from kdrun.engine.records import STUDENT_FILE, SUMMARY, read_json
from kdrun.errors import Refused
from kdrun.plan.rounds import Rounds, known_rows, one_hot, with_targets
from kdrun.teacher.truth import TruthTeacher
from kdrun.types import Batch, Needs, Signal
from tests.engine.running import Notes, assert_bit_equal, resume, run, run_killed, weights

SMALL = [
    "dataset=regions", "dataset.n_pool=60", "dataset.n_labelled=16", "dataset.n_validation=20", "dataset.n_test=30", "teacher=truth",
    "teacher.extra=teacher_logits", "student=mlp", "student.hidden=[6]", "objective=soft_ce", "plan=rounds", "plan.rounds=2",
    "plan.budget=8", "optim=adamw", "optim.steps=4", "source.batch_size=8", "hardware=cpu", "hardware.threads=1",
]  # fmt: skip
WITHOUT_TEACHER = [o for o in SMALL if not o.startswith("teacher")]


def test_the_teacher_is_asked_about_chosen_points_and_validation_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = TruthTeacher.signal

    def signal(self: TruthTeacher, batch: Batch, needs: Needs) -> Signal:
        if needs.teacher_logits:
            asked.extend(batch.ids.tolist())
        return original(self, batch, needs)

    monkeypatch.setattr(TruthTeacher, "signal", signal)
    summary = run(SMALL, tmp_path / "run")
    data = load_data(compose(SMALL).tree)
    train, held = data.split("train"), set(data.split("validation").ids.tolist())
    pool = [i for i in asked if i not in held and i in set(train.ids.tolist())]
    assert len(pool) == len(set(pool)) == 16 == summary["test"]["queries"]
    labelled = set(train.ids[train.extra["labelled"]].tolist())
    assert not labelled & set(pool)


def test_labels_of_the_pool_are_for_the_report_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other labels in the pool the same points are chosen and the same students come out."""
    from kdrun.dataset.regions import RegionData

    honest = run(SMALL, tmp_path / "honest")
    original = RegionData._draw

    def spoiled(self: RegionData, part: str, *rest: object, **more: object) -> object:
        y, *others = original(self, part, *rest, **more)  # type: ignore[arg-type]
        return ((y + 1) % self.classes if part == "pool" else y), *others

    monkeypatch.setattr(RegionData, "_draw", spoiled)
    other = run(SMALL, tmp_path / "other")
    assert_bit_equal(weights(tmp_path / "honest"), weights(tmp_path / "other"))
    assert honest["test"]["top1"] == other["test"]["top1"]
    assert honest["test"]["correct_share"] != other["test"]["correct_share"]


@pytest.mark.parametrize(("stage", "step", "after"), [("round-0", 2, False), ("round-1", 4, True), ("round-2", 3, False)])
def test_a_run_killed_in_any_round_ends_with_the_same_student(stage: str, step: int, after: bool, tmp_path: Path) -> None:
    unbroken = run(SMALL, tmp_path / "unbroken")
    run_killed(SMALL, tmp_path / "broken", "step_done", step, stage, after)
    broken = resume(SMALL, tmp_path / "broken")
    assert_bit_equal(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))
    assert broken["rounds"] == unbroken["rounds"]


def test_known_rows_are_trained_on_and_others_are_not_there() -> None:
    data = load_data(compose(SMALL).tree)
    known = known_rows(data, None, 1)
    seen = with_targets(data, known, one_hot(data)).split("train")
    assert seen.ids.tolist() == data.split("train").ids[known].tolist()
    assert len(seen.storage) == int(known.sum()) == 16
    assert torch.equal(seen.extra["soft_targets"].argmax(1), seen.targets)


def test_labelled_rows_of_an_ordinary_data_set_are_drawn_by_the_seed() -> None:
    data = load_data(compose(["dataset=digits"]).tree)
    one, same, other = (known_rows(data, 50, seed) for seed in (1, 1, 2))
    assert int(one.sum()) == 50
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_pool_too_small_and_a_missing_teacher_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        run([*WITHOUT_TEACHER, "plan.budget=50", "teacher=none"], tmp_path / "run")
    assert {p.key for p in refused.value.problems} == {"plan.budget", "teacher"}
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"plan\.feature"):
        Rounds(acquisition="coreset")


@pytest.mark.parametrize(
    ("change", "key", "remedy"),
    [
        (["plan.budget=31"], "plan.budget", "plan.budget=30 at most"),
        (["plan.labelled=75"], "plan.labelled", None),  # one point for two rounds
        (["plan.labelled=0"], "plan.labelled", None),
        (["plan.lam=-1"], "plan.lam", "[0, inf)"),
        (["plan.acquisition=coreset", "plan.feature=f9"], "plan.feature", "did you mean fc or f1?"),
        (["objective=ce"], "objective", "objective=soft_ce"),
        (["teacher=ema"], "teacher", "of its own"),
        (["dataset=digits", "plan.mistakes=0.1"], "plan.labelled", "plan.labelled="),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_student_is_trained(
    change: list[str], key: str, remedy: str | None, tmp_path: Path
) -> None:
    replaced = tuple(f"{c.partition('=')[0]}." for c in change if "." not in c.partition("=")[0])
    kept = [o for o in SMALL if not o.startswith(replaced)] if replaced else SMALL
    with pytest.raises(Refused) as refused:
        run([*kept, *change], tmp_path / "run")
    found = [p for p in refused.value.problems if p.key == key]
    assert found
    assert remedy is None or any(remedy in p.remedy for p in found), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("choice", [["plan.acquisition=coreset", "plan.feature=f1"], ["plan.warm_start=true"], ["plan.mistakes=0.3"]])
def test_other_selections_run(choice: list[str], tmp_path: Path) -> None:
    summary = run([*SMALL, *choice], tmp_path / "run")
    assert [row["queries"] for row in summary["rounds"]] == [0, 8, 16]
    assert (tmp_path / "run" / STUDENT_FILE).is_file()
    assert (tmp_path / "run" / "plots" / "queries.png").is_file()


def test_a_trained_teacher_has_seen_the_labelled_rows_alone(tmp_path: Path) -> None:
    notes = Notes()
    run([*WITHOUT_TEACHER, "teacher=mlp", "teacher.hidden=[8]"], tmp_path / "run", notes)
    (folder,) = [p for p in (tmp_path / "root" / "teachers").iterdir() if p.is_dir()]
    assert read_json(folder / SUMMARY)["steps"] == 4
