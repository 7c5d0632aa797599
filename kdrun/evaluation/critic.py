"""Evaluation of a critic: how precise what it keeps is, once it keeps a given share of what is right.

precision_at_recall   precision at the largest threshold whose recall is at least `recall`, as Symbolic Knowledge Distillation (arXiv
                      2110.07178) chooses the critic's epoch
kept_share            share of all rows that this threshold keeps
average_precision     area under the precision-recall curve
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from kdrun.dataset.base import Data
from kdrun.errors import Problem, RunFailed
from kdrun.evaluation.base import Evaluation
from kdrun.evaluation.threshold import keeps, point, threshold

METRICS = ("precision_at_recall", "kept_share", "average_precision")


@dataclass(eq=False)
class Critic(Evaluation):
    """Of two classes the second is what is right. Raises `Refused` for a field outside its range."""

    uses_teacher = False

    primary: str = "precision_at_recall"
    recall: float = 0.8

    def own_problems(self) -> list[Problem]:
        if 0 < self.recall <= 1:
            return []
        return [Problem(f"a share above 0 and up to 1, not {self.recall}", "evaluation.recall", "", "e.g. evaluation.recall=0.8")]

    def problems(self, data: Data) -> list[Problem]:
        if data.classes == 2 and data.vocabulary is None:
            return []
        return [
            Problem(f"{data.name} has {data.classes} classes, not right and wrong", "evaluation", data.name, "evaluation=classification")
        ]

    def names(self, classes: int | None = None) -> list[str]:
        return list(METRICS)

    def meter(self, classes: int, device: torch.device | str) -> CriticMeter:
        return CriticMeter(self.recall).to(device)


class CriticMeter(Metric):
    """Keeps scores and labels. In a process group `compute` is a collective."""

    higher_is_better = None
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, recall: float = 0.8) -> None:
        super().__init__()
        self.recall = recall
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Logits [B, 2], targets [B] in {0, 1}; -1: not judged, left out."""
        judged = targets >= 0
        self.scores.append(acceptance(logits[judged]))
        self.labels.append(targets[judged])

    def compute(self) -> dict[str, float]:
        """The metrics, in percent. Raises `RunFailed` where nothing is right: no recall can then be told."""
        from sklearn.metrics import average_precision_score

        scores, labels = dim_zero_cat(self.scores).cpu(), dim_zero_cat(self.labels).cpu()
        try:
            tau = threshold("largest", scores, labels, self.recall)
        except ValueError as error:
            raise RunFailed(f"the critic cannot be judged: {error}") from error
        kept = keeps("largest", scores, tau)
        found = point(kept, labels)
        return {
            "precision_at_recall": 100 * found.precision,
            "kept_share": 100 * found.kept / len(labels),
            "average_precision": 100 * float(average_precision_score(labels.numpy(), scores.numpy())),
        }


def acceptance(logits: Tensor) -> Tensor:
    """The probability of the second of two classes, float64 [B] of logits [B, 2]."""
    return (logits[:, 1].double() - logits[:, 0].double()).sigmoid()
