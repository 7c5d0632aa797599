"""What an objective is: the part of a method that says what is minimised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from kdrun.errors import Problem
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Start, Term

Gather = Callable[[Tensor], Tensor]  # rows of all ranks, with gradient to one's own


@dataclass(eq=False)
class Objective:
    """Base of all objectives. A subclass is a dataclass whose fields are the method's hyper-parameters.

    The loop minimises  sum over terms of  weights()[name] * terms()[name].sum / count[unit].
    State (banks, moving averages) lives on the objective, moves only in `after_step`, and is in `state_dict`.
    Trained modules live in the connectors that `setup` returns: they are optimised with the student and never exported.
    """

    coupling: ClassVar[Literal["none", "batch"]] = "none"  # "batch": a term looks at several samples at once
    phases: ClassVar[tuple[str, ...]] = ("student",)  # one optimiser each
    sparse: ClassVar[Literal["bounded", "invalid"]] = "invalid"  # "bounded": takes `Signal.kept`; a lower bound of the whole loss
    mixes: ClassVar[bool] = False  # whether its labels may be those of mixed images: all taken from `kdrun.objective._labels`
    compilable: ClassVar[bool] = True  # False where `compute` differentiates twice

    def needs(self) -> Needs:
        """What must be there, declared, so that a bad pairing is refused before the run."""
        return Needs()

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        """What does not fit in the whole configuration and between the bare networks (a live teacher's, before its weights are there),
        found before anything is spent."""
        return []

    def setup(self, context: Context) -> Connectors:
        """Build the connectors (initialised from the global torch RNG, which the caller has seeded) and the state.

        Raises `kdrun.errors.Refused` where the shapes in the context cannot work.
        """
        return nn.ModuleDict()

    def start(self, start: Start, connectors: Connectors) -> None:
        """Called once before step 0, when the teacher's weights are loaded: copy weights, walk the data, build state.

        Before a resume it is called too; the checkpoint then overwrites connectors and state.
        """

    def units(self) -> tuple[str, ...]:
        """Every unit that the terms use."""
        return ("sample", "label")

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        """The items of each unit in one micro-batch, of those units that add up over micro-batches and ranks."""
        return {"sample": len(batch.ids), "label": (batch.targets >= 0).sum()}

    def active(self, phase: str, progress: Progress) -> bool:
        """Whether a phase runs in this step."""
        return True

    def weights(self, progress: Progress) -> dict[str, float]:
        """The weight of every term at this step. A term whose weight is 0 must cost nothing where that is possible."""
        raise NotImplementedError

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Add what this step needs to batch.extra (drawn negatives, per-id history). Runs outside the compiled step."""
        return batch

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        """The terms of one micro-batch (of the whole gathered batch if coupling is "batch"). Pure but for `output.keep`."""
        raise NotImplementedError

    def compute(
        self, student: Any, batch: Batch, signal: Signal, phase: str, connectors: Connectors, gather: Gather | None
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """The whole differentiable part of one phase: (terms, detached rows that after_step wants).

        `student(inputs, extra)` returns (logits, taps by name); `student.module` is the bare network. `gather` is None on one
        rank and for objectives that do not couple samples. Override it where a method calls the student in another way.
        """
        logits, taps = student(batch.inputs, batch.extra)
        output = Output(logits, taps, {})
        if gather is not None:
            # A term that couples samples must see the whole batch: every rank evaluates it on all rows, with gradient
            # to its own. The counts are added over ranks as well, so the sum of the ranks' gradients is the exact one.
            output = Output(gather(logits), {k: gather(v) for k, v in taps.items()}, {})
            signal, batch = gathered(signal, batch, gather)
        return self.terms(output, signal, batch, phase, connectors), output.keep

    def report(self) -> dict[str, float]:
        """Numbers about the objective's own state, written beside the metrics of every evaluation."""
        return {}

    def trained_in(self, phase: str) -> tuple[str, ...]:
        """Prefixes of the learner's parameter names that a phase trains ("student.", "connectors.")."""
        return ("student.", "connectors.")

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        """The only place where state moves. `ids` [B] and `kept` rows [B, ...] are those of the whole step, all ranks."""

    def to(self, device: Any) -> None:
        """Move the state to a device."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state but was given {sorted(state)}")


def gathered(signal: Signal, batch: Batch, gather: Gather) -> tuple[Signal, Batch]:
    """Signal and batch of all ranks, the inputs left out: they are this rank's own."""
    said = Signal(None if signal.logits is None else gather(signal.logits), {k: gather(v) for k, v in signal.taps.items()})
    extra = {k: gather(v) for k, v in batch.extra.items()}
    return said, Batch(batch.inputs, gather(batch.targets), gather(batch.ids), gather(batch.view), extra)
