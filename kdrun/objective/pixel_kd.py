"""Pixel-wise KD: the first term of Structured Knowledge Distillation (Liu et al., CVPR 2019, arXiv 1903.04197, Sec. 3.2).

    L = ce_weight * CE + kd_weight * T^2 KL(p_T(zt) || p_T(zs)) of every labelled pixel,   p_T(z) = softmax(z / T)

Hinton's KD with a pixel for a sample, on logits of the size of the labels. Pixels without a label (-1) count in neither term.

Units: nats per labelled pixel. Constants: weights 1 and T 1 are those of the public benchmark code of CIRKD (CVPR 2022,
github.com/winycg/CIRKD), where the maps are compared before they are made larger.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdrun.losses.divergence import cross_entropy
from kdrun.losses.spatial import pixel_kl_divergence
from kdrun.objective._checks import require_nonnegative, require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term


@dataclass(eq=False)
class PixelKD(Objective):
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight", "kd_weight")
        require_positive(self, "temperature")

    def needs(self) -> Needs:
        return Needs(teacher_logits=self.kd_weight > 0)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "kd": self.kd_weight}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}
        if self.kd_weight:
            assert signal.logits is not None
            kl = pixel_kl_divergence(output.logits, signal.logits.detach(), batch.targets >= 0, self.temperature)
            terms["kd"] = Term(self.temperature**2 * kl, "label")
        return terms
