"""The precision that losses are computed in: float32 or wider, whatever the student ran in."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in at least float32: half precision is raised, float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which matrix products keep the precision of their operands on the device of `x`.

    Needed only around products: autocast leaves element-wise float32 work alone, but it would lower a matmul of
    widened operands again.
    """
    return torch.autocast(x.device.type, enabled=False)
