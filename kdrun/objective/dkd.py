"""DKD: Decoupled Knowledge Distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

    L = CE + warm * (alpha T^2 KL(b_t || b_s) + beta T^2 KL(n_t || n_s)),   warm = min(epoch / warmup_epochs, 1)

b = (p_y, 1 - p_y) is the binary split at temperature T (TCKD), n the distribution over the other C - 1 classes (NCKD). Per
sample KD = TCKD + (1 - p_T(zt)_y) NCKD: plain KD plays the dark knowledge down where the teacher is sure.

Unit: nats per sample. Constants: alpha 1, beta 8, T 4, warm-up over 20 epochs counted from 1 are the authors' CIFAR-100
setting for resnet32x4 -> resnet8x4 and for all students of another family (megvii-research/mdistiller). Their other pairs:
beta 2 (resnet56 -> resnet20, resnet110 -> resnet32), 6 (vgg13 -> vgg8, vgg13 -> MobileNetV2, wrn_40_2 -> wrn_16_2 and
wrn_40_1); ImageNet: T 1, warm-up 1, beta 0.5 (resnet34 -> resnet18) and 2 (resnet50 -> MobileNetV1).
"""

from __future__ import annotations

from dataclasses import dataclass

from kdrun.losses.divergence import cross_entropy, nontarget_divergence, target_divergence
from kdrun.objective._checks import require_nonnegative, require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term


@dataclass(eq=False)
class DKD(Objective):
    ce_weight: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup_epochs: float = 20

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight", "alpha", "beta", "warmup_epochs")
        require_positive(self, "temperature")

    def needs(self) -> Needs:
        return Needs(teacher_logits=self.alpha > 0 or self.beta > 0)

    def weights(self, progress: Progress) -> dict[str, float]:
        warm = min(progress.epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        return {"ce": self.ce_weight, "tckd": warm * self.alpha, "nckd": warm * self.beta}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}
        for name, weight, divergence in (("tckd", self.alpha, target_divergence), ("nckd", self.beta, nontarget_divergence)):
            if weight:
                assert signal.logits is not None
                kl = divergence(output.logits, signal.logits.detach(), batch.targets, self.temperature)
                terms[name] = Term(self.temperature**2 * kl.sum(), "sample")
        return terms
