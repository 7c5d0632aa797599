"""A teacher, a tap or a checkpoint that does not fit is refused before the run has a folder."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdrun.student.mlp import mlp
from kdrun.student.resnet import resnet8
from kdrun.student.weights import save_student
from tests.cli.told import Problem, only, parse_problems
from tests.conftest import TINY, Outcome

Refusal = Callable[..., list[Problem]]
LIVE = [*TINY, "objective=kd", "teacher=mlp", "teacher.hidden=[8]"]
PICTURES = ["dataset=digits", "teacher=resnet8", "student=resnet8", "objective=kd", "hardware=cpu", "hardware.threads=1", "run.dry=true"]


def weights(path: Path, network: nn.Module) -> Path:
    save_student(network, path)
    return path


@pytest.mark.parametrize(
    ("settings", "key", "near"),
    [
        (["objective.student_tap=f9"], "objective.student_tap", "f3"),
        (["objective.teacher_tap=poled"], "objective.teacher_tap", "pooled"),
        (["objective.student_tap=f1", "student.taps.f1=layr1"], "student.taps.f1", "layer1"),
        (["objective.student_tap=lay1"], "objective.student_tap", "layer1"),
    ],
)
def test_a_tap_that_does_not_exist_is_refused_with_its_neighbours(refusal: Refusal, settings: list[str], key: str, near: str) -> None:
    problem = only(refusal("train", *PICTURES, "objective=fitnet", *settings))
    assert problem.key == key
    assert settings[-1].partition("=")[2] in problem.head
    assert problem.where == "command line"
    assert near in problem.remedy


def test_both_missing_taps_come_at_once(refusal: Refusal) -> None:
    problems = refusal("train", *PICTURES, "objective=fitnet", "objective.student_tap=f9", "objective.teacher_tap=f8")
    assert {p.key for p in problems} == {"objective.student_tap", "objective.teacher_tap"}


def test_a_tap_that_is_one_of_several_is_refused_under_their_field(refusal: Refusal) -> None:
    """A field that lists taps; and a teacher that is the student itself, whose taps the objective still asks of the teacher."""
    problem = only(refusal("train", *PICTURES, "objective=map_mse", "objective.student_taps=[maap]", "objective.teacher_taps=[layer1]"))
    assert problem.key == "objective.student_taps"
    follower = ["objective=fitnet", "objective.student_tap=f1", "objective.teacher_tap=f9", "teacher=ema"]
    assert only(refusal("train", *PICTURES, *follower)).key == "objective.teacher_tap"


def test_a_tap_asked_for_by_a_method_in_a_comparison_is_refused_too(refusal: Refusal) -> None:
    problems = refusal("train", *PICTURES, "objective=fitnet", "objective.student_tap=f9", "run.seeds=[1,2]")
    assert "unknown tap 'f9'" in problems[0].head


def test_all_that_a_teacher_says_of_itself_must_fit(refusal: Refusal) -> None:
    problems = refusal("train", *PICTURES, "teacher.classes=7", "teacher.input_size=[3,32,32]", "teacher.mean=[0.5]", "teacher.std=[0.25]")
    heads = {p.key: p for p in problems}
    assert heads.keys() == {"teacher.classes", "teacher.input_size", "teacher.mean"}
    assert "7 classes, digits has 10" in heads["teacher.classes"].head
    assert "[3, 32, 32], digits gives [1, 8, 8]" in heads["teacher.input_size"].head
    assert "mean [0.5], std [0.25]; digits is normalised with [0.306" in heads["teacher.mean"].head
    assert heads["teacher.mean"].remedy.startswith("teacher.renormalise=true")
    assert all(p.where == "command line" and p.remedy for p in problems)


def test_another_normalisation_is_taken_where_that_is_asked_for(kdrun: Callable[..., Outcome], here: Path) -> None:
    outcome = kdrun("train", *PICTURES, "teacher.mean=[0.5]", "teacher.std=[0.25]", "teacher.renormalise=true", "dataset.subset=20")
    assert outcome.code == 0, outcome.err


def test_half_a_normalisation_is_refused(refusal: Refusal) -> None:
    problem = only(refusal("train", *PICTURES, "teacher.mean=[0.5]", "teacher.renormalise=true"))
    assert problem.key == "teacher.mean"
    assert problem.remedy == "set teacher.std too"


def test_a_teacher_for_other_inputs_is_refused(refusal: Refusal) -> None:
    problem = only(refusal("train", *TINY, "objective=kd", "teacher=resnet8"))
    assert "cannot run on an input of shape [32]" in problem.head
    assert problem.remedy.startswith("choose a network for this input")


def test_a_teacher_of_other_classes_is_refused(refusal: Refusal) -> None:
    problem = only(refusal("train", *LIVE, "+teacher.num_classes=7"))
    assert problem.head == "teacher: the teacher speaks of 7 classes, gaussians has 6"


def test_an_objective_without_the_teacher_it_needs_is_refused(refusal: Refusal) -> None:
    problem = only(refusal("train", *TINY, "objective=kd", "teacher=none"))
    assert problem.head == "teacher: KD needs a teacher and there is none"
    assert "kdrun ls teachers" in problem.remedy


# -- its weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comparison", [False, True])
def test_a_checkpoint_of_other_classes_is_refused(refusal: Refusal, tmp_path: Path, comparison: bool) -> None:
    file = weights(tmp_path / "seven.safetensors", mlp(7, 32, [8]))
    problem = only(refusal("train", *LIVE, f"teacher.checkpoint={file}", *(["run.seeds=[1,2]"] if comparison else [])))
    assert problem.head == "teacher.checkpoint: wrong number of classes: the file's last layer has 7 classes, this network 6"
    assert problem.where == str(file)
    assert "6 classes" in problem.remedy


def test_a_checkpoint_of_another_model_is_refused_and_named(refusal: Refusal, tmp_path: Path) -> None:
    file = weights(tmp_path / "resnet.safetensors", resnet8(10, in_channels=1))
    problems = refusal("train", *LIVE, f"teacher.checkpoint={file}")
    assert {(p.key, p.where) for p in problems} == {("teacher.checkpoint", str(file))}
    assert all("these shapes are those of kdrun.student.resnet.resnet8(in_channels=1)" in p.remedy for p in problems)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_truncated_checkpoint_is_refused(refusal: Refusal, tmp_path: Path, suffix: str, share: float) -> None:
    file = tmp_path / f"teacher.{suffix}"
    if suffix == "pth":
        torch.save(mlp(6, 32, [8]).state_dict(), file)
    else:
        weights(file, mlp(6, 32, [8]))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    problem = only(refusal("train", *LIVE, f"teacher.checkpoint={file}"))
    assert problem.head.startswith("teacher.checkpoint: truncated or corrupt")
    assert (problem.where, problem.remedy) == (str(file), "fetch or write it again")


@pytest.mark.parametrize("key", ["teacher.checkpoint", "student.checkpoint", "plan.start_from"])
@pytest.mark.parametrize("name", ["notes.txt", "notes.pth", "notes.safetensors"])
def test_a_text_is_no_checkpoint(refusal: Refusal, tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / name).write_text("resnet32x4 of the benchmark, 240 epochs\n")
    problem = only(refusal("train", *LIVE, f"{key}={tmp_path / name}"))
    assert problem.head.startswith(f"{key}: ")
    assert "it begins with b'resnet32x4" in problem.head or "no safetensors file" in problem.head
    assert problem.where == str(tmp_path / name)
    assert problem.remedy


class Bomb:
    """What an attacker would put into a file of weights."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(refusal: Refusal, tmp_path: Path, wrapped: bool) -> None:
    mark, file = tmp_path / "the code ran", tmp_path / "teacher.pth"
    if wrapped:  # beside an honest state dict, in torch's own format
        torch.save({"state_dict": mlp(6, 32, [8]).state_dict(), "extra": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    problem = only(refusal("train", *LIVE, f"teacher.checkpoint={file}"))
    assert not mark.exists()
    assert "opening it could run code; it was not opened" in problem.head
    assert problem.where == str(file)
    torch.load(file, weights_only=False) if wrapped else pickle.loads(file.read_bytes())
    assert mark.exists()  # it would have run


def test_a_missing_checkpoint_is_refused_with_the_files_that_are_there(refusal: Refusal, tmp_path: Path) -> None:
    weights(tmp_path / "teacher.safetensors", mlp(6, 32, [8]))
    problem = only(refusal("train", *LIVE, f"teacher.checkpoint={tmp_path / 'teachr.safetensors'}"))
    assert problem.head == "teacher.checkpoint: no such file"
    assert problem.remedy == "in that folder there is teacher.safetensors"


@pytest.mark.parametrize(
    ("rival", "key"),
    [
        ("objective=kd, teacher=mlp, 'teacher.hidden=[8]', teacher.checkpoint={file}", "teacher.checkpoint"),
        ("objective=kd, student.checkpoint={file}", "student.checkpoint"),
        ("objective=kd, plan.start_from={file}", "plan.start_from"),
        ("objective=kd, dataset.sigma=0.9, student.checkpoint={file}", "student.checkpoint"),  # data of its own, not loaded yet
    ],
)
@pytest.mark.parametrize("spoilt", ["missing", "damaged"])
def test_a_rival_s_checkpoint_is_refused_before_the_first_arm(
    kdrun: Callable[..., Outcome], here: Path, own_recipes: Path, tmp_path: Path, rival: str, key: str, spoilt: str
) -> None:
    file = tmp_path / "w.safetensors"
    if spoilt == "damaged":
        file.write_bytes(weights(file, mlp(6, 32, [8])).read_bytes()[:200])
    text = (own_recipes / "recipes" / "small.yaml").read_text().replace("kd: [objective=kd]", f"kd: [{rival.format(file=file)}]")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(text)
    outcome = kdrun("train", "recipe=small", f"--config-dir={tmp_path}", "run.seeds=[1]")
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""  # no arm was announced
    problem = only(parse_problems(outcome.err))
    assert problem.head.startswith(f"{key}: {'no such file' if spoilt == 'missing' else 'truncated or corrupt'}")
    assert problem.where == str(file)
    assert not list(here.iterdir())


@pytest.mark.parametrize("override", ["student.checkpoint", "plan.start_from"])
def test_the_student_s_own_weights_are_held_to_the_same(refusal: Refusal, tmp_path: Path, override: str) -> None:
    file = weights(tmp_path / "seven.safetensors", mlp(7, 32, [8]))
    assert "wrong number of classes" in only(refusal("train", *TINY, "objective=ce", f"{override}={file}")).head


def test_a_teacher_that_is_not_what_it_is_said_to_be_stops_the_run(kdrun: Callable[..., Outcome], here: Path, tmp_path: Path) -> None:
    """A check that did not hold, exit code 3; nothing was trained and nothing is left."""
    torch.manual_seed(0)
    file = weights(tmp_path / "teacher.safetensors", mlp(6, 32, [8]))
    claim = "teacher.claim={metric: top1, value: 99.0, tolerance: 0.3, source: Table 1}"
    for extra in ([], ["run.seeds=[1,2]"]):
        outcome = kdrun("train", *LIVE, f"teacher.checkpoint={file}", claim, *extra)
        assert outcome.code == 3
        assert "the recipe states 99.0 within 0.3 (Table 1)" in outcome.err
        assert "remedy" in outcome.err
        assert not list(here.iterdir())


@pytest.mark.parametrize("extra", [[], ["run.seeds=[1,2]"]])
def test_a_teacher_that_is_trained_and_fails_its_claim_leaves_no_run_behind(
    kdrun: Callable[..., Outcome], here: Path, extra: list[str]
) -> None:
    """The teacher is kept, as it is good for another claim; of the student's run there is nothing but its configuration."""
    claim = "teacher.claim={metric: top1, value: 150.0, tolerance: 0.3, source: Table 1}"
    outcome = kdrun("train", *LIVE, claim, "run.dir=runs/mine", "run.root=root", *extra)
    assert outcome.code == 3, outcome.err
    assert "the recipe states 150.0 within 0.3 (Table 1)" in outcome.err
    assert [p.name for p in here.iterdir()] == ["root"]
    assert (here / "root" / "teachers").is_dir()


def test_a_good_checkpoint_is_taken(kdrun: Callable[..., Outcome], here: Path, tmp_path: Path) -> None:
    file = weights(tmp_path / "teacher.safetensors", mlp(6, 32, [8]))
    shutil.copy(file, tmp_path / "copy.safetensors")
    outcome = kdrun("train", *LIVE, f"teacher.checkpoint={tmp_path / 'copy.safetensors'}")
    assert outcome.code == 0, outcome.err
    assert "teacher measured here: top1" in outcome.out
