"""What an objective is: the part of a method that says what is minimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Term


@dataclass(eq=False)
class Objective:
    """Base of all objectives. A subclass is a dataclass whose fields are the method's hyper-parameters.

    The loop minimises  sum over terms of  weights()[name] * terms()[name].sum / count[unit].
    State (banks, moving averages) lives on the objective, moves only in `after_step`, and is in `state_dict`.
    Trained modules live in the connectors that `setup` returns: they are optimised with the student and never exported.
    """

    coupling: ClassVar[Literal["none", "batch"]] = "none"  # "batch": a term looks at several samples at once
    phases: ClassVar[tuple[str, ...]] = ("student",)  # one optimiser each

    def needs(self) -> Needs:
        """What must be there, declared, so that a bad pairing is refused before the run."""
        return Needs()

    def setup(self, context: Context) -> Connectors:
        """Build the connectors (initialised from the global torch RNG, which the caller has seeded) and the state.

        Raises `kdrun.errors.Refused` where the shapes in the context cannot work.
        """
        return nn.ModuleDict()

    def units(self) -> tuple[str, ...]:
        """Every unit that the terms use."""
        return ("sample",)

    def weights(self, progress: Progress) -> dict[str, float]:
        """The weight of every term at this step. A term whose weight is 0 must cost nothing where that is possible."""
        raise NotImplementedError

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Add what this step needs to batch.extra (drawn negatives, per-id history). Runs outside the compiled step."""
        return batch

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        """The terms of one micro-batch (of the whole gathered batch if coupling is "batch"). Pure but for `output.keep`."""
        raise NotImplementedError

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
