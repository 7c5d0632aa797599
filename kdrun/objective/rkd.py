"""RKD: Relational Knowledge Distillation (Park et al., CVPR 2019, arXiv 1904.05068).

    L = CE + distance_weight * mean_ij h(d_ij^s - d_ij^t) + angle_weight * mean_ijk h(a_ijk^s - a_ijk^t)

d are the Euclidean distances of a batch's pooled features over their mean, a the cosines at i between the directions to j
and k, h Huber's loss with threshold 1. Both are free of rotation, translation and scale of either side, so the two widths
need not agree and nothing has to be trained in between.

Units: per pair (B^2, the diagonal included) and per triplet (B^3, degenerate ones as 0). Both look at the whole batch.
Memory O(B^2 D + B^3) per side, see `kdrun.losses.relation.angles`. Constants: 25 and 50 on the penultimate features are
those of the benchmark code of CRD (HobbitLong/RepDistiller).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F

from kdrun.losses.relation import angles, relative_distances
from kdrun.objective._checks import require_nonnegative
from kdrun.objective._labels import label_cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term


@dataclass(eq=False)
class RKD(Objective):
    coupling: ClassVar[Literal["none", "batch"]] = "batch"
    mixes: ClassVar[bool] = True

    ce_weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0
    student_tap: str = "pooled"
    teacher_tap: str = "pooled"

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight", "distance_weight", "angle_weight")

    def needs(self) -> Needs:
        if not (self.distance_weight or self.angle_weight):
            return Needs()
        return Needs(teacher_taps=(self.teacher_tap,), student_taps=(self.student_tap,))

    def units(self) -> tuple[str, ...]:
        return ("label", "pair", "triplet")

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "distance": self.distance_weight, "angle": self.angle_weight}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(label_cross_entropy(output.logits, batch).sum(), "label")}
        for name, weight, relation, unit in (
            ("distance", self.distance_weight, relative_distances, "pair"),
            ("angle", self.angle_weight, angles, "triplet"),
        ):
            if weight:
                student, teacher = relation(output.taps[self.student_tap]), relation(signal.taps[self.teacher_tap].detach())
                terms[name] = Term(F.smooth_l1_loss(student, teacher, reduction="sum"), unit)
        return terms
