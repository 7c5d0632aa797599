"""Whole runs on texts that are written on the way: killed and resumed, in micro-batches, over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdrun.engine.records import METRICS, TIMING, read_lines
from kdrun.student.weights import save_student
from tests.conftest import Outcome
from tests.engine.processes import kdrun_to_end
from tests.engine.running import assert_same_run, assert_same_training, resume, run, run_killed, training_lines
from tests.source.test_rollout import policy


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """Six steps of OPSD on running sums from a policy with opinions."""
    network = policy(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    save_student(network, tmp_path / "base.safetensors")
    return [
        "dataset=sums", "dataset.n_train=33", "dataset.n_test=10", "teacher=sum_policy", "teacher.prompt=privileged", "student=sum_policy",
        f"teacher.checkpoint={tmp_path / 'base.safetensors'}", "plan.start_from=teacher", "objective=opsd",
        "source=rollout", "source.batch_size=11", "source.max_new_tokens=6", "optim=adamw", "optim.lr=0.01", "optim.epochs=2",
        "evaluation=generation", "evaluation.max_new_tokens=6", "hardware=cpu", "hardware.threads=1", "run.log_every=1",
    ]  # fmt: skip


ARMS = {
    "opsd": ["objective.cap=0.5"],
    "grpo": ["objective=grpo", "source.per_prompt=4", "source.batch_size=11"],
    "mixed": ["source.share=0.5", "objective=lm_kd", "teacher.prompt=own"],
    "current": ["objective.cap=0.5", "teacher=current", "~teacher.checkpoint", "plan.start_from=null"],
    "ema": [
        "objective.cap=0.5",
        "teacher=ema",
        "~teacher.checkpoint",
        "teacher.prompt=privileged",
        "teacher.decay=0.5",
        "plan.start_from=null",
    ],
}


def overrides(base: list[str], name: str) -> list[str]:
    """An arm; a teacher that is the student has no weights of its own."""
    if name in ("current", "ema"):
        base = [word for word in base if not word.startswith(("teacher", "plan"))]
    return base + [word for word in ARMS[name] if not word.startswith("~")]


@pytest.mark.parametrize("name", ARMS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(name: str, base: list[str], tmp_path: Path) -> None:
    words = [*overrides(base, name), "run.checkpoint_every=0.34"]
    run(words, tmp_path / "unbroken")
    run_killed(words, tmp_path / "broken", "step_done", 4)
    resume(words, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    assert len(training_lines(tmp_path / "broken")) == 6


def assert_same_updates(ours: Path, theirs: Path) -> None:
    """`assert_same_training`; of GRPO without the loss, whose advantages cancel: what is left is rounding."""
    for lines in (training_lines(ours), training_lines(theirs)):
        if "policy" in lines[0]["terms"]:
            assert abs(lines[0]["loss"]) < 1e-6
    with pytest.MonkeyPatch.context() as patch:
        told = lambda folder: [{**line, "loss": 1.0, "terms": {}} if "policy" in line["terms"] else line for line in training_lines(folder)]  # noqa: E731
        patch.setattr("tests.engine.running.training_lines", told)
        assert_same_training(ours, theirs)


@pytest.mark.parametrize("name", ["opsd", "grpo", "mixed"])
def test_accumulation_changes_no_text_and_no_gradient(name: str, base: list[str], tmp_path: Path) -> None:
    words = overrides(base, name)
    run(words, tmp_path / "whole")
    run([*words, "hardware.micro_batch=4"], tmp_path / "cut")
    assert_same_updates(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opsd", "grpo", "mixed"])
def test_two_ranks_write_and_train_what_one_process_does(name: str, base: list[str], tmp_path: Path) -> None:
    words = overrides(base, name)
    run(words, tmp_path / "one")
    ranks = ["hardware=multi_gpu", "hardware.device=cpu", "hardware.procs=2", "hardware.threads=1"]
    done = kdrun_to_end("train", *words, *ranks, f"run.dir={tmp_path / 'two'}", f"run.root={tmp_path / 'root'}", "--json")
    assert done.returncode == 0, done.stderr
    assert_same_updates(tmp_path / "two", tmp_path / "one")
    told = [read_lines(tmp_path / folder / METRICS) for folder in ("one", "two")]
    for mine, other in zip(*told, strict=True):
        assert [mine.get(key) for key in ("generated_tokens", "tokens", "reward", "length")] == [
            other.get(key) for key in ("generated_tokens", "tokens", "reward", "length")
        ]


def test_what_writing_costs_is_told_apart(base: list[str], tmp_path: Path) -> None:
    run(base, tmp_path / "run")
    assert [line["generated_tokens"] for line in training_lines(tmp_path / "run")] == [11 * 6 * (i + 1) for i in range(6)]
    assert "seconds" not in (tmp_path / "run" / METRICS).read_text()  # the clock has a file of its own
    last = json.loads((tmp_path / "run" / TIMING).read_text().splitlines()[-1])
    assert last["writing_seconds"] > 0


@pytest.mark.parametrize("name", ["opsd", "grpo"])
def test_a_plan_probes_the_steps_that_will_be_taken(name: str, base: list[str], kdrun: Callable[..., Outcome]) -> None:
    done = kdrun("plan", *overrides(base, name), "--json")
    assert done.code == 0, done.err
    assert done.json["seconds_per_sample"] > 0
