"""Distances between feature maps of one sample, in float32 or wider."""

from __future__ import annotations

from torch import Tensor

from kdrun.losses.precision import widen


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the elements of a sample of (student - teacher)^2.  [B, ...] twice -> [B]."""
    return (widen(student) - widen(teacher)).square().flatten(1).mean(1)
