"""A pair of language models and texts of one's own, through the command line: distil, measure again, plan, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdrun.engine.records import read_lines
from tests.cli.told import Problem, only
from tests.conftest import Outcome
from tests.dataset.words import SPECIAL, WORDS, pairs, write_jsonl, write_model

pytest.importorskip("transformers")
SMALL = ["source.batch_size=4", "hardware=cpu", "hardware.threads=1", "run.log_every=1", "dataset.max_length=32"]


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Overrides of the recipe that name a wide and a narrow model of one tokenizer and a file of questions."""
    teacher = write_model(tmp_path / "teacher", seed=1, hidden_size=24, rows=32)  # its matrix is padded
    student = write_model(tmp_path / "student")
    file = write_jsonl(tmp_path / "my.jsonl", pairs(24))
    return ["recipe=lm_kd", f"teacher.name={teacher}", f"student.name={student}", f"dataset.path={file}"]


def changed(pair: list[str], **names: str) -> list[str]:
    """The pair with other values of teacher.name, student.name or dataset.path (dots as underscores)."""
    told = {key.replace("_", ".", 1): value for key, value in names.items()}
    return [f"{key}={told[key]}" if (key := word.partition("=")[0]) in told else word for word in pair]


def test_a_pair_is_distilled_and_measured_again(pair: list[str], here: Path, kdrun: Callable[..., Outcome]) -> None:
    done = kdrun("train", *pair, *SMALL, "run.rivals=false", "optim.epochs=2", "optim.lr=0.01", "run.dir=run")
    assert done.code == 0, done.err
    summary = json.loads((here / "run" / "summary.json").read_text())
    steps = [line for line in read_lines(here / "run" / "metrics.jsonl") if "loss" in line]
    assert len(steps) == summary["steps"] == 12  # 22 rows in steps of 4, twice
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert summary["test"]["kl_teacher"] > 0
    assert summary["teacher"]["nll"] > 0
    again = kdrun("eval", "run", "--json", "--no-latency")
    assert again.code == 0, again.err
    assert again.json["metrics"]["test"]["nll"] == pytest.approx(summary["test"]["nll"], rel=1e-6)
    assert again.json["metrics"]["test"]["kl_teacher"] == pytest.approx(summary["test"]["kl_teacher"], rel=1e-5)
    samples = [json.loads(line) for line in (here / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"].startswith("<s> what is")


def test_the_student_loads_with_plain_transformers(pair: list[str], here: Path, kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    done = kdrun("train", *pair, *SMALL, "run.rivals=false", "run.max_steps=1", "run.dir=run")
    assert done.code == 0, done.err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    told = plain.load_state_dict(load_file(here / "run" / "student.safetensors"), strict=False)
    assert not told.unexpected_keys
    assert any(not torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_the_comparison_runs_with_its_rivals(pair: list[str], here: Path, kdrun: Callable[..., Outcome]) -> None:
    done = kdrun("train", *pair, *SMALL, "run.rivals=true", "run.seeds=[1]", "run.max_steps=2", "run.dir=run")
    assert done.code == 0, done.err
    assert {folder.name for folder in (here / "run" / "arms").iterdir()} == {"lm_kd", "sft", "rkl"}


def test_a_pair_is_planned(pair: list[str], here: Path, kdrun: Callable[..., Outcome]) -> None:
    planned = kdrun("plan", *pair, *SMALL, "--json")
    assert planned.code == 0, planned.err
    plan = planned.json
    tokens = len(SPECIAL) + len(WORDS)
    assert plan["models"]["student"]["output"] == f"[B, 31, {tokens}]"
    assert plan["models"]["teacher"]["output"] == f"[B, 31, {tokens}]"  # without the padding of its matrix
    assert plan["models"]["teacher"]["parameters"] > plan["models"]["student"]["parameters"]
    assert plan["seconds_per_sample"] > 0
    assert not list(here.iterdir())


def test_nothing_named_is_refused_with_what_to_name(refusal: Callable[..., list[Problem]]) -> None:
    assert {problem.key for problem in refusal("train", "recipe=lm_kd")} <= {
        "teacher.name",
        "student.name",
        "dataset.tokenizer",
        "dataset.path",
    }


def test_a_vocabulary_that_is_too_small_is_refused(pair: list[str], refusal: Callable[..., list[Problem]], tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", words=WORDS[:6])
    problem = only(refusal("train", *changed(pair, teacher_name=str(small)), *SMALL, "run.rivals=false"))
    assert problem.key == "teacher.name"
    assert f"14 rows, the data's tokenizer has {len(SPECIAL) + len(WORDS)} tokens" in problem.head
    assert "dataset.tokenizer" in problem.remedy


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_teacher_of_another_tokenizer_is_refused_though_its_matrix_is_large_enough(
    verb: str, pair: list[str], refusal: Callable[..., list[Problem]], tmp_path: Path
) -> None:
    foreign = write_model(tmp_path / "foreign", words=[*reversed(WORDS), "more", "words"])
    problem = only(refusal(verb, *changed(pair, teacher_name=str(foreign)), *SMALL, "run.rivals=false"))
    assert problem.key == "teacher"
    assert "another tokenizer" in problem.head
    assert "id 8 is 'one' here and '.' there" in problem.head
    assert f"dataset.tokenizer={foreign}" in problem.remedy


def test_a_teacher_that_knows_more_words_of_the_same_tokenizer_may_teach(
    pair: list[str], here: Path, kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    wider = write_model(tmp_path / "wider", words=[*WORDS, "more", "words"])
    done = kdrun("train", *changed(pair, teacher_name=str(wider)), *SMALL, "run.rivals=false", "run.max_steps=1", "run.dir=run")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dataset_path": "nowhere.jsonl"}, "dataset.path"),
        ({"teacher_name": "nowhere"}, "teacher.name"),
        ({"student_name": "nowhere"}, "student.name"),
    ],
)
def test_what_is_not_there_is_refused(change: dict[str, str], key: str, pair: list[str], refusal: Callable[..., list[Problem]]) -> None:
    problems = refusal("train", *changed(pair, **change), *SMALL, "run.rivals=false")
    keys = {problem.key for problem in problems}
    assert keys == {key} or (key == "student.name" and keys == {"dataset.tokenizer"})  # the tokenizer is the student's
    assert all("Traceback" not in problem.head for problem in problems)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["objective=kd"], "objective"),
        (["student=mlp", "~student.name"], "student"),
        (["source=rollout", "dataset.pack=true"], "dataset.pack"),
        (["source=rollout", "objective=grpo", "source.per_prompt=2", "teacher=none"], "objective"),
        (["source=rollout", "teacher.prompt=privileged"], "teacher.prompt"),
        (["evaluation=generation"], "evaluation"),
    ],
)
def test_what_does_not_go_with_texts_is_refused(words: list[str], key: str, pair: list[str], refusal: Callable[..., list[Problem]]) -> None:
    if "student=mlp" in words:
        tokenizer = next(word for word in pair if word.startswith("student.name")).partition("=")[2]
        pair = [*(word for word in pair if not word.startswith("student.name")), f"dataset.tokenizer={tokenizer}"]
    elif "teacher=none" in words:
        pair = [word for word in pair if not word.startswith("teacher.name")]
    assert key in {problem.key for problem in refusal("train", *pair, *SMALL, *words, "run.rivals=false")}


def test_rollouts_of_texts_of_ones_own_are_distilled(pair: list[str], here: Path, kdrun: Callable[..., Outcome]) -> None:
    """On-policy: prompts of the file, the student's own completions, the teacher's word on them."""
    words = ["source=rollout", "source.max_new_tokens=5", "source.share=0.5", "objective.divergence=reverse_kl", "run.max_steps=6"]
    done = kdrun("train", *pair, *SMALL, *words, "run.rivals=false", "run.dir=run")
    assert done.code == 0, done.err
    told = [line["generated_tokens"] for line in read_lines(here / "run" / "metrics.jsonl") if "loss" in line]
    assert 0 < told[-1] < 6 * 4 * 5
    assert len(set(told)) > 1


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_rows_beyond_a_models_context_are_refused(who: str, pair: list[str], refusal: Callable[..., list[Problem]], tmp_path: Path) -> None:
    """Rotary positions would be read beyond what they were trained for, without a word."""
    write_jsonl(tmp_path / "my.jsonl", [*pairs(20), {"prompt": "what is", "completion": "one two three four " * 8}] * 2)
    words = [word for word in SMALL if "max_length" not in word]
    problem = only(
        refusal("train", *pair, *words, "dataset.max_length=64", f"+{who}.config.max_position_embeddings=16", "run.rivals=false")
    )
    assert problem.key == "dataset.max_length"
    assert f"the {who} has 16 positions" in problem.head
    assert "dataset.max_length=16 dataset.too_long=cut" in problem.remedy
