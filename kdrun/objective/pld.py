"""PLD: A Choice-Theoretic List-Wise Knowledge Distillation (Bassam, Zhu, Bian, NeurIPS 2025, arXiv 2506.12542).

    L = sum_k alpha_k (log sum_{j >= k} exp s[pi_j] - s[pi_k]),   pi = (y, the rest by falling t),   alpha_k = softmax(t / tau)[pi_k]

The student's likelihood of one ranking of the classes in the Plackett-Luce model, each choice weighted by the teacher's
belief in the class that is chosen. The first step is cross-entropy on the label, so there is no separate CE term; tau
softens the weights alone, so there is no tau^2. Where the teacher gives the label little mass, it is pushed up little: meant
so by the authors.

`weighting` replaces alpha for the ablation: "ce" (1, 0, ..., 0), "listmle" 1/C each, "plistmle" fixed and falling with the
position (2^(C-k) - 1, normalised; which fixed weights the paper's row used is unconfirmed). A class that the teacher
excludes (-inf) is not ranked.

Unit: nats per sample. Constants: tau 4 on CIFAR-100, 1 on ImageNet-1K (published settings).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kdrun.losses.precision import widen
from kdrun.losses.rank import plackett_luce, position_weights, target_first_order
from kdrun.objective._checks import require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term

Weighting = Literal["pld", "ce", "listmle", "plistmle"]


@dataclass(eq=False)
class PLD(Objective):
    temperature: float = 4.0
    weighting: Weighting = "pld"

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting={self.weighting!r}: legal values {', '.join(get_args(Weighting))}")

    def needs(self) -> Needs:
        return Needs(teacher_logits=True)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"pld": 1.0}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        assert signal.logits is not None
        teacher = widen(signal.logits.detach())
        order = target_first_order(teacher, batch.targets)
        return {"pld": Term(plackett_luce(output.logits, order, self._step_weights(teacher, order)).sum(), "sample")}

    def _step_weights(self, teacher: Tensor, order: Tensor) -> Tensor:
        """alpha [B, C] in the order of the ranking, >= 0."""
        if self.weighting == "pld":
            return (teacher / self.temperature).softmax(-1).gather(-1, order)
        classes = teacher.shape[-1]
        first = torch.arange(classes, device=teacher.device) == 0
        if self.weighting == "ce":
            fixed = first
        elif self.weighting == "listmle":
            fixed = torch.full_like(teacher[0], 1 / classes)
        else:
            fixed = position_weights(classes, teacher.device).to(teacher.dtype)
        ranked = teacher.gather(-1, order) > -torch.inf
        return (fixed * (ranked | first)).to(teacher.dtype)
