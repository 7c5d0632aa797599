"""Label smoothing: Rethinking the Inception Architecture for Computer Vision (Szegedy et al., CVPR 2016, arXiv 1512.00567, Sec. 7).

    L = (1 - epsilon) CE + epsilon H(u, p),   u uniform over the classes

The control of self-distillation: a softer target that knows nothing of the sample. A class that the student excludes (-inf) is none of the
classes that u is spread over.

Unit: nats per sample. Constants: epsilon 0.1 (Sec. 7; also the rival of PS-KD, arXiv 2006.12000).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kdrun.losses.divergence import soft_cross_entropy
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_share
from kdrun.objective._labels import label_cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Output, Progress, Signal, Term


@dataclass(eq=False)
class LabelSmoothing(Objective):
    mixes: ClassVar[bool] = True

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require_share(self, "epsilon")

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": 1 - self.epsilon, "uniform": self.epsilon}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(label_cross_entropy(output.logits, batch).sum(), "label")}
        if self.epsilon:
            logits = widen(output.logits)
            there = (logits > -torch.inf).to(logits.dtype)
            smooth = soft_cross_entropy(logits, there / there.sum(1, keepdim=True))
            terms["uniform"] = Term((smooth * (batch.targets >= 0)).sum(), "label")
        return terms
