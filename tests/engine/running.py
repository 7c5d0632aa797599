"""Real runs, and what is compared between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdrun.config.check import check
from kdrun.config.compose import compose
from kdrun.engine import state
from kdrun.engine.build import build, load_data
from kdrun.engine.device import set_up
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import METRICS, STUDENT_FILE, read_lines
from kdrun.engine.report import Reporter
from kdrun.engine.run import execute
from kdrun.engine.stage import StageRun, make_stage


class Notes(Reporter):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Killed(Exception):
    """The end of a process, as far as a test in the same process can have it."""


def run(overrides: Sequence[str], folder: Path, reporter: Reporter | None = None) -> dict[str, Any]:
    """A whole run into `folder`, from the configuration on; its summary."""
    composed = compose([*overrides, f"run.dir={folder}", f"run.root={folder.parent / 'root'}"])
    check(composed)
    return execute(composed, reporter or Reporter()).summary


def staged(overrides: Sequence[str], folder: Path, reporter: Reporter | None = None) -> StageRun:
    """The student's stage of a run whose teacher needs no weights, built and not started."""
    composed = compose([*overrides, f"run.dir={folder}"])
    check(composed)
    tree, device, reporter = composed.tree, torch.device("cpu"), reporter or Reporter()
    set_up(tree["hardware"], device)
    built = build(tree, load_data(tree), device, Ranks())
    folder.mkdir(parents=True, exist_ok=True)
    return StageRun(tree, built, make_stage(tree, built, device, Ranks(), "student", reporter), folder, reporter)


def killing(monkeypatch: pytest.MonkeyPatch, method: str, step: int, stage: str = "student", after: bool = False) -> None:
    """From now on the hook `method` of that stage raises `Killed` at `step`, before or after it has done its work."""
    original: Callable[..., None] = getattr(StageRun, method)

    def hook(self: StageRun, now: int, *rest: Any) -> None:
        at = self.stage.name == stage and now == step
        if at and not after:
            raise Killed
        original(self, now, *rest)
        if at:
            raise Killed

    monkeypatch.setattr(StageRun, method, hook)


def run_killed(overrides: Sequence[str], folder: Path, method: str, step: int, stage: str = "student", after: bool = False) -> None:
    """A run that ends in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, method, step, stage, after)
        with pytest.raises(Killed):
            run(overrides, folder)


def resume(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """The rest of a run that was killed; its summary."""
    composed = compose([*overrides, f"run.dir={folder}", f"run.root={folder.parent / 'root'}"])
    return execute(composed, Reporter(), folder=folder, resume=True).summary


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that speak of optimiser steps."""
    return [line for line in read_lines(folder / METRICS) if "grad_norm" in line]


def weights(folder: Path) -> dict[str, Tensor]:
    """The exported student."""
    return load_file(folder / STUDENT_FILE)


def parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested state by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, item in items for k, v in tensors_of(item, f"{name}/{key}").items()}


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint: weights, optimisers, moving average, the objective's state."""
    found = state.newest(folder / "checkpoints")
    assert found is not None
    return tensors_of(found[1])


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_run(broken: Path, unbroken: Path) -> None:
    """Law 2: nothing that a run leaves behind, but for the clock, tells that it was broken."""
    assert (broken / METRICS).read_bytes() == (unbroken / METRICS).read_bytes()
    assert_bit_equal(weights(broken), weights(unbroken))
    assert_bit_equal(checkpoint_tensors(broken), checkpoint_tensors(unbroken))


def assert_same_training(ours: Path, theirs: Path, rtol: float = 1e-5) -> None:
    """Law 1: the same gradients at every step and the same student, to float tolerance."""
    a, b = training_lines(ours), training_lines(theirs)
    assert [(line["step"], line["lr"]) for line in a] == [(line["step"], line["lr"]) for line in b]
    assert a
    for mine, other in zip(a, b, strict=True):
        for key in ("grad_norm", "loss", *mine["terms"]):
            x, y = (line[key] if key in line else line["terms"][key] for line in (mine, other))
            assert x == pytest.approx(y, rel=rtol), f"{key} at step {mine['step']}"
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        gap = (tensor.double() - second[name].double()).norm()
        assert gap <= rtol * second[name].double().norm(), name
