"""Plain regression of the teacher's maps of logits (Ba, Caruana, NIPS 2014, arXiv 1312.6184, Eq. 3, at every position).

    L = CE + beta * mean (F_T - F_S)^2,      summed over the distilled maps

The baseline without masks of ACAM-KD (ICCV 2025): the same maps, pooled and scaled alike, every entry with weight 1.

Units: squared feature units, the mean over the entries of a sample's map, per sample; nats per labelled pixel. Constants:
beta 1 gives the error the weight that alpha = 1 gives each of ACAM-KD's two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdrun.losses.feature import mean_squared_error
from kdrun.objective._checks import require_nonnegative
from kdrun.objective._maps import MapObjective
from kdrun.objective._tasks import task_terms
from kdrun.types import Batch, Connectors, Output, Progress, Signal, Term


@dataclass(eq=False)
class MapMSE(MapObjective):
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(self, "beta")

    def distils(self) -> bool:
        return self.beta > 0

    def weights(self, progress: Progress) -> dict[str, float]:
        return {**self.task_weights(), "mse": self.beta}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = task_terms(self.task, output, batch)
        if self.distils():
            errors = [mean_squared_error(student, teacher).sum() for teacher, student in self.maps(output, signal, connectors)]
            terms["mse"] = Term(torch.stack(errors).sum(), "sample")
        return terms
