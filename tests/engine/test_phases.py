"""Alternation is a phase: each trains its own part, sees through the other, and a kill between two steps costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrun.engine import loop
from tests.conftest import Outcome
from tests.engine.running import assert_same_run, assert_same_training, parameters, run, run_killed, staged, tensors_of, training_lines

PHASES = ["objective._target_=tests.engine.parts.TwoPhases", "run.allow=[tests]", "optim.epochs=3"]


class Watch:
    """The loop's hooks; remembers all parameters after each phase."""

    def __init__(self, learner: torch.nn.Module) -> None:
        self.learner = learner
        self.states = [parameters(learner)]
        self.records: list[dict[str, Any]] = []
        self.held: list[set[str]] = []

    def logged(self, step: int, record: dict[str, Any]) -> None:
        self.states.append(parameters(self.learner))
        self.records.append(record)
        self.held.append({name for name, p in self.learner.named_parameters() if p.requires_grad})

    def step_done(self, step: int) -> None: ...

    def stop_requested(self) -> bool:
        return False


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_phase_changes_its_own_parameters_alone(tiny: list[str], tmp_path: Path) -> None:
    stage = staged([*tiny, *PHASES], tmp_path / "run").stage
    names = {name for name, _ in stage.learner.named_parameters()}
    parts = {"critic": {n for n in names if n.startswith("connectors.")}, "student": {n for n in names if n.startswith("student.")}}
    assert parts["critic"] | parts["student"] == names
    watch = Watch(stage.learner)
    assert loop.train(stage, watch)
    assert [r["phase"] for r in watch.records] == ["critic", "student"] * 9
    for number, record in enumerate(watch.records):
        assert changed(watch.states[number], watch.states[number + 1]) == parts[record["phase"]]
        assert watch.held[number] == parts[record["phase"]]


def test_gradient_flows_through_the_frozen_part(tiny: list[str], tmp_path: Path) -> None:
    """The student of this objective has no loss but the critic's: what it learns came through the frozen critic, by the chain rule."""
    stage = staged([*tiny, *PHASES], tmp_path / "run").stage
    batch = stage.source.group(0)[0]
    watch = Watch(stage.learner)
    loop.train_step(stage, watch)
    weight, bias = (watch.states[1][f"connectors.critic.{n}"] for n in ("weight", "bias"))  # after the critic's phase
    network = {n.removeprefix("student.module."): p for n, p in watch.states[0].items() if n.startswith("student.")}
    leaves = {n: p.clone().requires_grad_() for n, p in network.items()}
    logits = torch.func.functional_call(stage.learner.student.module, leaves, (batch.inputs,))  # type: ignore[union-attr]
    torch.nn.functional.cross_entropy(logits @ weight.T + bias, batch.targets).backward()
    total = torch.stack([p.grad.norm() for p in leaves.values() if p.grad is not None]).norm()
    assert watch.records[1]["grad_norm"] == pytest.approx(float(total), rel=1e-5)
    for name, leaf in leaves.items():
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        step = gradient + 5e-4 * network[name]  # the first step of SGD with momentum and weight decay
        torch.testing.assert_close(watch.states[2][f"student.module.{name}"], network[name] - 0.05 * step, rtol=1e-5, atol=1e-7)


def test_each_phase_has_its_own_optimiser_state(tiny: list[str], tmp_path: Path) -> None:
    stage = staged([*tiny, *PHASES], tmp_path / "run").stage
    loop.train_step(stage, Watch(stage.learner))
    states = {phase: tensors_of(optimizer.state_dict()["state"]) for phase, optimizer in stage.optimizers.items()}
    assert {phase: len(tensors) for phase, tensors in states.items()} == {"critic": 2, "student": 4}


def test_the_moving_average_moves_once_a_step(tiny: list[str], tmp_path: Path) -> None:
    stage = staged([*tiny, *PHASES, "optim.ema=0.5"], tmp_path / "run").stage
    assert stage.ema is not None
    for _ in range(4):
        loop.train_step(stage, Watch(stage.learner))
    assert int(stage.ema.n_averaged) == 4


@pytest.mark.parametrize("step", [1, 3, 5])
def test_phases_survive_a_kill(step: int, tiny: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]) -> None:
    base = [*tiny, *PHASES, "optim.ema=0.5"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", step)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert len(training_lines(tmp_path / "run")) == 18
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_accumulation_does_not_change_the_gradients_of_any_phase(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, *PHASES], tmp_path / "whole")
    run([*tiny, *PHASES, "hardware.micro_batch=[20,7,5]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
