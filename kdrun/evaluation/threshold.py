"""Where to cut a critic's scores: thresholds by recall, after Symbolic Knowledge Distillation (NAACL 2022, arXiv 2110.07178).

Two rules, on scores s and labels in {0, 1}; recall counts what has s >= threshold:
    largest   the largest threshold whose recall is at least R; kept is s >= tau
    released  the authors' public code: from the lowest threshold up, the first whose recall is at most R; kept is s > tau. It takes the
              mean of the thresholds of two sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["largest", "released"]


class Point(NamedTuple):
    """What a threshold does to labelled rows."""

    precision: float
    recall: float
    kept: int


def threshold(rule: Rule, scores: Tensor, labels: Tensor, recall: float) -> float:
    """The threshold of one set, scores [N] and labels [N] in {0, 1}. Raises ValueError where no label is 1 or R is outside (0, 1]."""
    from sklearn.metrics import precision_recall_curve

    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall}: legal range (0, 1]")
    if not bool((labels > 0).any()):
        raise ValueError(f"none of {len(labels)} labels is accepted, so that no recall can be told")
    # Rising thresholds, falling recall; the last point of the curve has no threshold.
    _, recalls, thresholds = precision_recall_curve(labels.cpu().numpy(), scores.double().cpu().numpy())
    recalls = recalls[:-1]
    if rule == "largest":
        return float(thresholds[recalls >= recall][-1])
    below = thresholds[recalls <= recall]
    return float(below[0] if len(below) else thresholds[-1])


def common_threshold(rule: Rule, sets: Sequence[tuple[Tensor, Tensor]], recall: float) -> float:
    """The mean of the thresholds of several sets of (scores, labels)."""
    return math.fsum(threshold(rule, scores, labels, recall) for scores, labels in sets) / len(sets)


def keeps(rule: Rule, scores: Tensor, tau: float | None) -> Tensor:
    """Which rows are kept, bool [N]; all without a threshold."""
    if tau is None:
        return torch.ones(scores.shape, dtype=torch.bool)
    return scores.double() >= tau if rule == "largest" else scores.double() > tau


def point(kept: Tensor, labels: Tensor) -> Point:
    """Precision and recall of what is kept, bool [N]; NaN where there is nothing to divide by."""
    right, true = int((kept & (labels > 0)).sum()), int((labels > 0).sum())
    number = int(kept.sum())
    return Point(right / number if number else math.nan, right / true if true else math.nan, number)
