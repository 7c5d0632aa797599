"""Plain training on labels: what every distillation has to beat.

    L = -log softmax(zs)_y

Unit: nats per sample. No constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kdrun.objective._labels import label_cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Output, Progress, Signal, Term


@dataclass(eq=False)
class CE(Objective):
    mixes: ClassVar[bool] = True

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": 1.0}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        return {"ce": Term(label_cross_entropy(output.logits, batch).sum(), "label")}
