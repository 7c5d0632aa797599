"""KD: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    L = ce_weight * CE + kd_weight * T^2 KL(p_T(zt) || p_T(zs)),   p_T(z) = softmax(z / T)

Of a teacher of which the K largest were kept, KL is over these and "any other class": at most the whole KL.

Unit: nats per sample; the mean is over samples, never over classes. Constants: 0.1, 0.9, T 4 are the CIFAR-100 protocol of
the public benchmark codes (HobbitLong/RepDistiller, megvii-research/mdistiller); ImageNet in the latter: 0.5, 0.5, T 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kdrun.losses.divergence import kl_divergence
from kdrun.losses.sparse import rest_bucket
from kdrun.objective._checks import require_nonnegative, require_positive
from kdrun.objective._labels import label_cross_entropy
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term


@dataclass(eq=False)
class KD(Objective):
    sparse: ClassVar[Literal["bounded", "invalid"]] = "bounded"
    mixes: ClassVar[bool] = True

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    temperature: float = 4.0

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight", "kd_weight")
        require_positive(self, "temperature")

    def needs(self) -> Needs:
        return Needs(teacher_logits=self.kd_weight > 0)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "kd": self.kd_weight}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(label_cross_entropy(output.logits, batch).sum(), "label")}
        if self.kd_weight:
            if signal.kept is not None:
                kl, unit = rest_bucket(output.logits, *signal.kept, temperature=self.temperature).sum(), "sample"
            else:
                assert signal.logits is not None
                kl, unit = self.divergence(output.logits, signal.logits.detach(), batch.targets)
            terms["kd"] = Term(self.temperature**2 * kl, unit)
        return terms

    def divergence(self, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        """(sum of KL(p_T(zt) || p_T(zs)), its unit) of logits [B, C]: every sample counts, labelled or not."""
        return kl_divergence(student, teacher, self.temperature).sum(), "sample"
