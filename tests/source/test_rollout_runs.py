"""Whole runs on texts that are written on the way: killed and resumed, in micro-batches, over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.engine.records import METRICS, TIMING, read_lines
from kdrun.errors import Refused
from kdrun.student.engines import writer_of
from kdrun.student.weights import save_student
from tests.conftest import Outcome
from tests.engine.processes import kdrun_to_end
from tests.engine.running import assert_same_run, assert_same_training, resume, run, run_killed, staged, training_lines
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
    "minillm": ["objective=minillm", "source.writer=mixture"],
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
        if lines[0]["terms"].keys() == {"policy"}:
            assert abs(lines[0]["loss"]) < 1e-6
    with pytest.MonkeyPatch.context() as patch:
        bare = lambda line: {**line, "loss": 1.0, "terms": {}} if line["terms"].keys() == {"policy"} else line  # noqa: E731
        patch.setattr("tests.engine.running.training_lines", lambda folder: list(map(bare, training_lines(folder))))
        assert_same_training(ours, theirs)


@pytest.mark.parametrize("name", ["opsd", "grpo", "minillm", "mixed"])
def test_accumulation_changes_no_text_and_no_gradient(name: str, base: list[str], tmp_path: Path) -> None:
    words = overrides(base, name)
    run(words, tmp_path / "whole")
    run([*words, "hardware.micro_batch=4"], tmp_path / "cut")
    assert_same_updates(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opsd", "grpo", "minillm", "mixed"])
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_texts_are_written_in_the_precision_that_the_run_computes_in(
    dtype: str, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[Any] = set()

    def spying(engine: Any, options: Any) -> Any:
        def write(network: Any, *rest: Any) -> Any:
            seen.add((torch.is_autocast_enabled("cpu"), network(torch.ones(1, 9, dtype=torch.int64)).dtype))
            return writer_of(engine, options)(network, *rest)

        return write

    monkeypatch.setattr("kdrun.source.rollout.writer_of", spying)
    run([*base, f"hardware.dtype={dtype}", "optim.epochs=1"], tmp_path / "run")
    assert seen == {(dtype == "bf16", torch.bfloat16 if dtype == "bf16" else torch.float32)}


LLAMA = (
    "{model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1, max_position_embeddings: %d}"
)
WRITING = [
    "dataset=sums", "dataset.n_train=8", "dataset.n_test=4", "objective=opsd", "source=rollout", "source.batch_size=4",
    "source.max_new_tokens=6", "evaluation=generation", "evaluation.max_new_tokens=6", "student=causal_lm", "hardware=cpu",
]  # fmt: skip


@pytest.mark.parametrize(
    ("positions", "more", "told"),
    [
        (12, ["teacher=current", "teacher.prompt=own"], ["source.max_new_tokens=5", "evaluation.max_new_tokens=5"]),
        (13, ["teacher=current", "teacher.prompt=own"], []),
        (13, ["teacher=current"], ["source.max_new_tokens"]),  # it reads 14 tokens before what is written
        (20, ["teacher=current"], []),
        (13, ["teacher=causal_lm", "teacher.prompt=privileged", f"teacher.config={LLAMA % 19}"], ["source.max_new_tokens=5"]),
        (13, ["teacher=causal_lm", "teacher.prompt=privileged", f"teacher.config={LLAMA % 20}"], []),
        (13, ["teacher=current", "teacher.prompt=own", "evaluation.max_new_tokens=7"], ["evaluation.max_new_tokens=6"]),
    ],
)
def test_texts_longer_than_a_networks_positions_are_refused(positions: int, more: list[str], told: list[str], tmp_path: Path) -> None:
    words = [*WRITING, f"student.config={LLAMA % positions}", *more]
    if not told:
        assert staged(words, tmp_path).built.total_steps > 0
        return
    with pytest.raises(Refused) as raised:
        staged(words, tmp_path)
    assert len(raised.value.problems) == len(told)
    assert all("positions of the" in problem.what for problem in raised.value.problems)
    assert all(any(remedy in (p.remedy, p.key) for p in raised.value.problems) for remedy in told)
