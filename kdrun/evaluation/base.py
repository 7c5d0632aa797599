"""What an evaluation is: the part of an experiment that says what counts as good, how often it is measured and which number is reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.evaluation.breakdown import Sums
from kdrun.evaluation.protocol import Protocol as WhichEpoch
from kdrun.student.taps import ask
from kdrun.types import Batch, Teacher

if TYPE_CHECKING:
    from kdrun.dataset.base import Data

Rows = Iterable[tuple[Batch, Tensor | None]]  # batches of a split with the teacher's logits, where there is a teacher


class Meter(Protocol):
    """A stream over an evaluation set. In a process group `compute` is a collective: the result is over all ranks' samples."""

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None: ...
    def compute(self) -> dict[str, float]: ...


@dataclass(eq=False)
class Evaluation:
    """Base of all evaluations. Raises `Refused` for a field outside its range."""

    uses_teacher: ClassVar[bool] = True  # False where `measure` does not look at the teacher's logits: they are then not computed

    writes: ClassVar[bool] = False  # True where networks write after prompts: then they bound what they make at once themselves

    every_epochs: float = 1
    primary: str = "top1"  # what the protocol, the verdict and claims without a metric speak of
    protocol: WhichEpoch = "last"
    last_k: int = 5  # evaluations behind "median_last_k"
    ties: Literal["first", "last"] = "first"  # which of equally good validation epochs is the best
    patience: int | None = None  # a stage stops after so many evaluations without a better validation value
    latency: bool = False  # whether to time a forward pass of the models at the end of the run

    def __post_init__(self) -> None:
        problems = [
            Problem(f"must be above 0, not {getattr(self, name)}", f"evaluation.{name}", "", f"e.g. evaluation.{name}={example}")
            for name, example in (("every_epochs", 1), ("last_k", 5), ("patience", 50))
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        problems += self.own_problems()
        if not problems and self.primary not in self.names():
            problems.append(
                Problem(f"'{self.primary}' is not measured", "evaluation.primary", "", did_you_mean(self.primary, self.names()))
            )
        if problems:
            raise Refused(problems)

    def own_problems(self) -> list[Problem]:
        """What is wrong with the fields of a subclass; called before its `names`."""
        return []

    def problems(self, data: Data) -> list[Problem]:
        """What does not fit to the data, or is not installed; found before anything is spent."""
        return []

    def names(self, classes: int | None = None) -> list[str]:
        """The metrics that are measured on so many classes, those that need a teacher's logits included."""
        raise NotImplementedError

    def meter(self, classes: int, device: torch.device | str) -> Meter:
        """A fresh meter. Raises `Refused` where the primary metric says nothing of so many classes."""
        raise NotImplementedError

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        """The metrics of a network in evaluation mode on the rows of a split."""
        meter = self.meter(data.classes, device)
        for batch, said in rows:
            meter.update(ask(network, batch).float(), batch.targets, said)
        return meter.compute()

    def breakdown(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> Sums:
        """Sums by class and by confidence over the rows of a split, of a network in evaluation mode; none by default."""
        return {}

    def picture(self, folder: Path, network: nn.Module, teacher: Teacher, data: Data, device: torch.device) -> None:
        """Draw what people would rather look at than read, into the run folder; nothing by default."""
