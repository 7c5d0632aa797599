"""What the parts of kdrun hand to each other: batches, signals, outputs, loss terms and the protocols between them.

Shape legend, used in every docstring of the package:
``B`` batch, ``C`` classes or channels, ``H W`` space, ``T`` time or tokens, ``V`` vocabulary, ``N`` nodes or samples,
``D`` features, ``K`` kept entries.

The tensors' containers are named tuples, so that `torch.compile` and DistributedDataParallel see through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """One micro-batch of one optimiser step."""

    inputs: Tensor  # [B, ...] augmented and normalised, what both models see
    targets: Tensor  # [B] int64 class indices, or [B, H, W] of pixels; -1: no label here, which losses and metrics leave out
    ids: Tensor  # [B] int64, stable over the whole data set: one sample has one id for ever
    view: Tensor  # [B] int64, which random view of the sample this is (the epoch, unless a source draws several)
    extra: dict[str, Tensor]  # further rows by name, e.g. "truth_logits" [B, C]; or what all rows share: a graph's edges [2, E]

    def to(self, device: torch.device) -> Batch:
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return Batch(move(self.inputs), move(self.targets), move(self.ids), move(self.view), {k: move(v) for k, v in self.extra.items()})


class Kept(NamedTuple):
    """The K likeliest of C classes (or of V tokens) of every row, at the objective's temperature, and all others as one."""

    ids: Tensor  # [..., K] int64, distinct
    log_probs: Tensor  # [..., K]
    log_rest: Tensor  # [...] of all other ids together


class Signal(NamedTuple):
    """What the teacher says of one micro-batch. Fields that were not asked for are None or empty."""

    logits: Tensor | None  # [B, C], or [B, C, H, W] of pixels; a network that does not classify says another tensor [B, ...]
    taps: dict[str, Tensor]  # by tap name, [B, ...]
    kept: Kept | None = None  # in place of the logits, where only the largest were kept


class Output(NamedTuple):
    """What the student says of one micro-batch, with gradient."""

    logits: Tensor  # shaped as the teacher's
    taps: dict[str, Tensor]  # by tap name, [B, ...]
    keep: dict[str, Tensor]  # filled by an objective with detached rows [B, ...] that its after_step wants to see


class Term(NamedTuple):
    """One named part of a loss: the SUM over its valid items, and what an item is.

    Never a mean: the loop divides by the number of items over all micro-batches and ranks, so that a result does not
    depend on how a batch was split, and the weight of a term has a unit.
    """

    sum: Tensor  # scalar, float32 or wider
    unit: str  # one that the objective counts ("sample", "label", ...), or a key of COUPLED_UNITS


# Units that do not add up over micro-batches: made of B = samples of the whole optimiser step and C = classes.
COUPLED_UNITS: Mapping[str, Any] = {
    "class": lambda B, C: 0 * B + C,
    "pair": lambda B, C: B * B,
    "triplet": lambda B, C: B * B * B,
}


@dataclass(frozen=True)
class Needs:
    """What an objective asks for; checked before anything is spent."""

    teacher_logits: bool = False
    teacher_taps: tuple[str, ...] = ()
    student_taps: tuple[str, ...] = ()
    teacher_network: bool = False  # the live teacher itself, to be called in `compute` with gradient to its inputs
    extra: tuple[str, ...] = ()  # names the dataset must put into Batch.extra
    silence: bool = False  # a teacher may say nothing (logits None), as the student's past does in the first epoch
    held_out: bool = False  # validation rows beside every step's batch: source.held_out


@dataclass(frozen=True)
class ModelSpec:
    """The outside of a model: enough to build what must fit to it."""

    classes: int
    input_shape: tuple[int, ...]  # without the batch: (C, H, W) or (D,)
    taps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes without the batch
    output: tuple[int, ...] = ()  # shape of what it says, without the batch


@dataclass(frozen=True)
class Context:
    """What an objective may know when it is set up."""

    student: ModelSpec
    teacher: ModelSpec | None
    classes: int
    labels: Tensor  # [N] int64 by sample id, -1 for ids that are not trained on
    seed: int
    steps_per_epoch: int
    total_steps: int


@dataclass(frozen=True)
class Start:
    """What an objective may look at before step 0, when the teacher's weights are there."""

    student: nn.Module  # the bare student
    teacher: nn.Module | None  # the bare teacher, frozen; one that follows the student is changed in place after every step
    rows: Callable[[], Iterator[tuple[Batch, Signal]]]  # the training rows in order, not augmented, with the teacher's signal


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: a function of the optimiser step alone, so it is the same after a resume."""

    step: int  # optimiser steps done
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """Epochs count from 1, as in the papers' schedules."""
        return self.step // self.steps_per_epoch + 1


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Source(Stateful, Protocol):
    """Where batches come from."""

    steps_per_epoch: int

    def group(self, step: int) -> list[Batch]:
        """The micro-batches of ONE optimiser step, on this rank. A function of (seed, step) and the source's state."""

    def feedback(self, ids: Tensor, scores: Tensor) -> None:
        """Scores by sample id, pushed after the step, for sources that select."""


@runtime_checkable
class Writes(Protocol):
    """A source whose batches are written by the networks themselves."""

    def attach(self, student: nn.Module, teacher: nn.Module | None, total_steps: int = 0, autocast: torch.dtype | None = None) -> None:
        """The bare networks, the steps of the stage and the precision in which it computes, before the first step."""

    def report(self) -> dict[str, float]:
        """What this rank has written in this process: sums, none of which depends on the clock."""

    def seconds(self) -> float:
        """What that has taken."""


@runtime_checkable
class Hears(Protocol):
    """A source that is steered by the student's own validation."""

    def hear(self, metrics: Mapping[str, float]) -> None:
        """What was measured on the validation split, before the first step and at every evaluation; the same on all ranks."""


class Teacher(Stateful, Protocol):
    """What speaks to the student. It is never trained by the loop and owns its train/eval policy."""

    spec: ModelSpec | None
    follows: bool  # the student itself, earlier or averaged: it changes during the run, so nothing it says can be kept

    def signal(self, batch: Batch, needs: Needs) -> Signal: ...

    def after_step(self, student: nn.Module, progress: Progress) -> None:
        """Called after every optimiser step with the bare student, for teachers that follow it."""


Connectors = nn.ModuleDict
