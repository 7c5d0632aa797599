"""What a plan is: the part of an experiment that says what runs after what.

A plan asks its session for stages. A stage either trains (`prepare`, then `train` or, bit by bit, `advance`: always the one
loop) or makes something (`kept`: select, score, aggregate, without an optimiser). Both go on where a killed run left them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kdrun.dataset.base import Data
from kdrun.errors import Problem
from kdrun.types import Teacher


class Parts(Protocol):
    """What a training stage is made of."""

    data: Data
    network: nn.Module  # the bare student
    teacher: Teacher
    objective: Any
    evaluation: Any
    steps_per_epoch: int
    total_steps: int


class Training(Protocol):
    """A training stage in its folder."""

    built: Any
    history: list[dict[str, Any]]  # of evaluations: {"step", "epoch", "validation", "test"}

    def advance(self, until: int | None = None, save: bool = True) -> None:
        """Train to that step, no further, and save there unless it is to be at the usual cadence alone; to the end if None; nothing
        where it is past it."""

    def save(self, step: int) -> None:
        """Write the checkpoint of the step it stands at, unless it is there."""

    def exported(self) -> nn.Module:
        """The network that counts, whole."""

    def take_best(self) -> None:
        """Put the weights of the best validation epoch into that network, where the evaluation's protocol is that epoch."""

    def spent(self) -> tuple[float, float]:
        """(seconds, CPU seconds) so far, those before a resume included."""


class Session(Protocol):
    """What a plan works with: one run, its configuration, data and folder."""

    tree: Mapping[str, Any]
    data: Data
    folder: Path
    device: torch.device
    ranks: Any  # that share every stage of it
    reporter: Any

    def alone(self) -> Session:
        """The same run for stages that are this rank's own: what it builds and prepares is shared with no other rank."""

    def build(self, tree: Mapping[str, Any] | None = None, data: Data | None = None) -> Any:
        """The parts of a stage with a tree or data of its own. Raises `Refused`."""

    def ready_teacher(self, built: Any) -> dict[str, Any]:
        """Train or load its teacher's weights; what is known of it ({} without a teacher)."""

    def prepare(self, name: str | None, built: Any, tree: Mapping[str, Any] | None = None) -> Training:
        """A training stage in the run's folder (None) or in a folder of that name in it, restored if it was begun."""

    def train(self, name: str | None, built: Any, tree: Mapping[str, Any] | None = None) -> Training:
        """`prepare`, then train to the end."""

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives (tensors, numbers, strings, lists, dicts), made once and kept in the run's folder."""

    def conclude(self, built: Any, metrics: Mapping[str, float], facts: Mapping[str, Any] | None = None) -> Any:
        """The end of a plan that trains nothing: a summary whose metrics are these, and no student."""

    def finish(self, training: Training, metrics: Mapping[str, float] | None = None, facts: Mapping[str, Any] | None = None) -> Any:
        """Export the stage's network as the run's student and write its summary, further metrics and facts included."""


@dataclass(eq=False)
class Plan:
    """Base of all plans; the fields of a subclass are its settings."""

    start_from: str | None = None

    def problems(self, tree: Mapping[str, Any], data: Data) -> list[Problem]:
        """What does not fit, found before anything is spent."""
        return []

    def describe(self) -> str:
        """How many stages it makes, in words for `kdrun plan`; "" for one student trained once."""
        return ""

    def view(self, tree: Mapping[str, Any], data: Data) -> Data:
        """The data as the first training stage sees it; `session.data` is all of it."""
        return data

    def run(self, session: Session) -> Any:
        """Carry it out; ends with `session.finish`."""
        raise NotImplementedError
