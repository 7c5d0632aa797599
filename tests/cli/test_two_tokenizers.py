"""A teacher with a tokenizer of its own, through the command line: planned, distilled, measured again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.told import Problem, only
from tests.conftest import Outcome
from tests.dataset.tongues import words_of, write_two
from tests.dataset.words import SPECIAL, WORDS, write_model, write_tokenizer

pytest.importorskip("transformers")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return write_two(tmp_path)


def test_it_is_planned_and_measured_again(folders: dict[str, Path], here: Path, kdrun: Callable[..., Outcome]) -> None:
    planned = kdrun("plan", *words_of(folders), "--json")
    assert planned.code == 0, planned.err
    assert planned.json["models"]["teacher"]["output"] != planned.json["models"]["student"]["output"]
    done = kdrun("train", *words_of(folders), "run.dir=run", "run.max_steps=2")
    assert done.code == 0, done.err
    again = kdrun("eval", "run", "--json", "--no-latency")
    assert again.code == 0, again.err
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert again.json["metrics"]["test"]["nll"] == pytest.approx(summary["test"]["nll"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["objective=lm_kd"], "objective", "objective=uld"),
        (["objective=taid"], "objective", "objective=uld"),
        (["objective=opsd"], "objective", "dataset.teacher_tokenizer=null"),
        (["source=rollout"], "source", "source=loader"),
        (["cache=dense"], "cache", "cache=off"),
        (["teacher=ema", "~teacher.name"], "dataset.teacher_tokenizer", "a live teacher"),
        (["dataset.pack=true"], "dataset.pack", "false beside a teacher_tokenizer"),
        (["objective.align=bytes", "objective.projection=chunked"], "objective.projection", "objective.projection=whole"),
        (["evaluation.primary=kl_teacher"], "evaluation.primary", "evaluation.primary=nll"),
    ],
)
def test_what_does_not_go_with_two_tokenizers_is_refused(
    words: list[str], key: str, remedy: str, folders: dict[str, Path], refusal: Callable[..., list[Problem]]
) -> None:
    dropped = tuple(word[1:] for word in words if word.startswith("~"))
    base = [word for word in words_of(folders) if not (dropped and word.startswith(dropped))]
    problems = refusal("train", *base, *(word for word in words if not word.startswith("~")))
    told = [problem for problem in problems if problem.key.startswith(key)]
    assert told, problems
    assert any(remedy in problem.remedy or remedy in problem.head for problem in told)


def test_a_teacher_of_another_tokenizer_is_told_of_uld(
    folders: dict[str, Path], refusal: Callable[..., list[Problem]], tmp_path: Path
) -> None:
    foreign = write_model(tmp_path / "foreign", words=[*reversed(WORDS)])  # as many ids, in another order
    words = [word for word in words_of({**folders, "teacher": foreign}) if not word.startswith(("dataset.teacher_tokenizer", "objective="))]
    problem = only(refusal("train", *words))
    assert problem.key == "teacher"
    assert f"objective=uld dataset.teacher_tokenizer={foreign}" in problem.remedy
    problem = only(
        refusal("train", *words_of(folders, f"teacher.name={foreign}", f"dataset.teacher_tokenizer={write_tokenizer(tmp_path / 't')}"))
    )
    assert f"dataset.teacher_tokenizer={foreign}" in problem.remedy


def test_a_teacher_that_is_too_small_for_the_tokenizer_is_told_of_uld(
    folders: dict[str, Path], refusal: Callable[..., list[Problem]], tmp_path: Path
) -> None:
    small = write_model(tmp_path / "small", words=WORDS[:6])
    words = [word for word in words_of({**folders, "teacher": small}) if not word.startswith("dataset.teacher_tokenizer")]
    problem = only(refusal("train", *words))
    assert f"objective=uld dataset.teacher_tokenizer={small}" in problem.remedy
    assert f"{len(SPECIAL) + len(WORDS)} tokens" in problem.head


@pytest.mark.parametrize("name", ["align", "hybrid"])
def test_two_tokenizers_are_needed_where_they_are_compared(
    name: str, folders: dict[str, Path], refusal: Callable[..., list[Problem]]
) -> None:
    one = {**folders, "teacher": write_model(folders["file"].parent / "same", seed=3)}
    words = [word for word in words_of(one) if not word.startswith("dataset.teacher_tokenizer")]
    problem = only(refusal("train", *words, f"objective.{name}={ {'align': 'bytes', 'hybrid': 'true'}[name] }"))
    assert problem.key == f"objective.{name}"
    assert "dataset.teacher_tokenizer=" in problem.remedy
