"""Sums over rows, from which an evaluation makes its numbers: float64, reduced over ranks at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Sums(Metric):
    """So many sums. In a process group `compute` is a collective."""

    higher_is_better = None
    full_state_update = False
    total: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *values: Tensor | float) -> None:
        """What one batch adds to each, scalars."""
        added = [torch.as_tensor(value, dtype=torch.float64, device=self.total.device) for value in values]
        self.total = self.total + torch.stack(added)

    def compute(self) -> Tensor:
        return self.total
