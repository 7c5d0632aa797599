"""The learner: student and connectors, everything that is trained, and the only thing that is wrapped or compiled."""

from __future__ import annotations

from torch import Tensor, nn

from kdrun.engine.distributed import Ranks
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Output, Signal, Term


class Learner(nn.Module):
    """Student [B, ...] -> terms. Its forward is the whole differentiable part of one step.

    `student` returns (logits, taps by name). The objective is no submodule: it has no parameters of its own.
    """

    def __init__(self, student: nn.Module, connectors: Connectors, objective: Objective, ranks: Ranks) -> None:
        super().__init__()
        self.student = student
        self.connectors = connectors
        self._objective = objective
        self._ranks = ranks

    def forward(self, batch: Batch, signal: Signal, phase: str) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """(terms by name, detached rows that after_step wants)."""
        logits, taps = self.student(batch.inputs)
        output = Output(logits, taps, {})
        if self._objective.coupling == "batch" and self._ranks.world > 1:
            # A term that couples samples must see the whole batch: every rank evaluates it on all rows, with gradient
            # to its own. The counts are added over ranks as well, so the sum of the ranks' gradients is the exact one.
            gather = self._ranks.gather_with_grad
            output = Output(gather(logits), {k: gather(v) for k, v in taps.items()}, {})
            signal = Signal(None if signal.logits is None else gather(signal.logits), {k: gather(v) for k, v in signal.taps.items()})
            extra = {k: gather(v) for k, v in batch.extra.items()}
            batch = Batch(batch.inputs, gather(batch.targets), gather(batch.ids), gather(batch.view), extra)
        terms = self._objective.terms(output, signal, batch, phase, self.connectors)
        return terms, output.keep
