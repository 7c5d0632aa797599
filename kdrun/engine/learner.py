"""The learner: student and connectors, everything that is trained, and the only thing that is wrapped or compiled."""

from __future__ import annotations

from torch import Tensor, nn

from kdrun.engine.distributed import Ranks
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Signal, Term


class Learner(nn.Module):
    """Student [B, ...] -> terms. Its forward is the whole differentiable part of one phase.

    `student` returns (logits, taps by name). The objective is no submodule: it has no parameters of its own.
    """

    def __init__(self, student: nn.Module, connectors: Connectors, objective: Objective, ranks: Ranks) -> None:
        super().__init__()
        self.student = student
        self.connectors = connectors
        self._objective = objective
        self._gather = ranks.gather_with_grad if objective.coupling == "batch" and ranks.world > 1 else None

    def forward(self, batch: Batch, signal: Signal, phase: str) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """(terms by name, detached rows that after_step wants)."""
        return self._objective.compute(self.student, batch, signal, phase, self.connectors, self._gather)
