"""Distillation between models with different vocabularies.

Universal Logit Distillation (ULD; Boizard et al., TMLR 2025, arXiv 2402.12030): probabilities are compared by rank, not by
id, which is the 1-Wasserstein distance under a uniform transport cost, up to a factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.precision import widen


def uld(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_i |p_(i) - q_(i)| of the descending probabilities, the shorter vocabulary padded with zeros.

    Student logits [..., V], teacher logits [..., V'] -> [...], in [0, 2], float32 or wider.
    Blind to ids: two models that are equally sure of different tokens are at distance 0.
    """
    q, p = (F.softmax(widen(logits) / temperature, -1).sort(-1, descending=True).values for logits in (student, teacher))
    width = max(q.shape[-1], p.shape[-1])
    return (F.pad(p, (0, width - p.shape[-1])) - F.pad(q, (0, width - q.shape[-1]))).abs().sum(-1)


def aligned(student_mask: Tensor, teacher_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The scored positions that have a partner: the i-th of the student with the i-th of the teacher, up to the fewer.

    Masks [B, T] and [B, T'] bool -> bool of the same shapes; `student[keep]` and `teacher[keep']` are then paired rows. The
    masks must be those of the PREDICTING positions (`kdrun.losses.token.shifted`), one before the tokens themselves.
    """
    fewer = torch.minimum(student_mask.sum(1), teacher_mask.sum(1)).unsqueeze(1)
    return student_mask & (student_mask.cumsum(1) <= fewer), teacher_mask & (teacher_mask.cumsum(1) <= fewer)
