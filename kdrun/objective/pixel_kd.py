"""Pixel-wise KD: the first term of Structured Knowledge Distillation (Liu et al., CVPR 2019, arXiv 1903.04197, Sec. 3.2).

    L = ce_weight * CE + kd_weight * T^2 KL(p_T(zt) || p_T(zs)) of every labelled pixel,   p_T(z) = softmax(z / T)

Hinton's KD with a pixel for a sample, on logits of the size of the labels. Pixels without a label (-1) count in neither term.

Units: nats per labelled pixel. Constants: weights 1 and T 1 are those of the public benchmark code of CIRKD (CVPR 2022,
github.com/winycg/CIRKD), where the maps are compared before they are made larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kdrun.losses.spatial import pixel_kl_divergence
from kdrun.objective.kd import KD


@dataclass(eq=False)
class PixelKD(KD):
    mixes: ClassVar[bool] = False

    ce_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 1.0

    def divergence(self, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, str]:
        """(sum of KL over the labelled pixels, its unit) of logits [B, C, H, W] and targets [B, H, W]."""
        return pixel_kl_divergence(student, teacher, targets >= 0, self.temperature), "label"
