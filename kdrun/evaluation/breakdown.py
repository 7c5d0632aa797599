"""What a mean over a test set hides: how right a classifier is on each class and at each confidence, and where it agrees with its teacher.

Sums alone, so that those of several ranks add up; `to_document` makes of them what is written beside a finished run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrun.evaluation.calibration import CalibrationError, confidence_and_hits

Sums = dict[
    str, Tensor
]  # "classes" [C, 2]: samples, hits; "bins" [M, 3]: samples, summed confidence, hits; "taught" [C, 3], "teacher_bins"


class Breakdown:
    """Streams over an evaluation set. A target of -1 is no sample."""

    def __init__(self, classes: int, bins: int, device: torch.device) -> None:
        self.classes = torch.zeros(classes, 2, dtype=torch.float64, device=device)
        self.taught = torch.zeros(classes, 3, dtype=torch.float64, device=device)  # samples with its logits, its hits, agreements
        self.bins, self.teacher_bins = CalibrationError(bins).to(device), CalibrationError(bins).to(device)

    def update(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch: logits [B, C], targets [B] int64, the teacher's logits [B, C] if there is one."""
        rows = confidence_and_hits(logits.float().softmax(1), targets)
        self.bins.update(*rows)
        self.classes += self._by_class(targets, torch.ones_like(rows[1]), rows[1])
        if teacher_logits is None:
            return
        theirs = confidence_and_hits(teacher_logits.float().softmax(1), targets)
        self.teacher_bins.update(*theirs)
        alike = (logits.argmax(1) == teacher_logits.argmax(1)).double()
        self.taught += self._by_class(targets, torch.ones_like(alike), theirs[1], alike)

    def sums(self) -> Sums:
        return {"classes": self.classes, "bins": self.bins.total, "taught": self.taught, "teacher_bins": self.teacher_bins.total}

    def _by_class(self, targets: Tensor, *columns: Tensor) -> Tensor:
        # A product and not a scatter: the same bits on every device.
        of_class = (targets[:, None] == torch.arange(len(self.classes), device=targets.device)).double()
        return of_class.T @ torch.stack(columns, dim=1)


def to_document(sums: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Any]:
    """Plain data: shares in percent by class (None where the set has no sample of it), and a row for each bin of confidence."""
    count, hits = sums["classes"].T.tolist()
    document: dict[str, Any] = {
        "classes": list(class_names),
        "count": [round(n) for n in count],
        "top1": _shares(hits, count),
        "bins": _bins(sums["bins"]),
    }
    heard, theirs, alike = sums["taught"].T.tolist()
    if sum(heard):
        document["teacher"] = {"top1": _shares(theirs, heard), "agreement": _shares(alike, heard), "bins": _bins(sums["teacher_bins"])}
    return document


def _shares(part: Sequence[float], whole: Sequence[float]) -> list[float | None]:
    return [100 * p / w if w else None for p, w in zip(part, whole, strict=True)]


def _bins(total: Tensor) -> list[dict[str, float | int]]:
    """Borders as `CalibrationError` has them; mean confidence and accuracy are shares in percent, of an empty bin absent."""
    rows: list[dict[str, float | int]] = []
    for i, (n, confidence, hits) in enumerate(total.tolist()):
        row: dict[str, float | int] = {"low": i / len(total), "high": (i + 1) / len(total), "count": round(n)}
        rows.append(row | ({"confidence": 100 * confidence / n, "accuracy": 100 * hits / n} if n else {}))
    return rows
