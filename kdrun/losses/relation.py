"""Relations inside a batch or inside a prediction: correlation, pairwise distances, angles. Float32 or wider inside."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.losses.precision import widen, without_autocast


def pearson(a: Tensor, b: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Pearson correlation of a and b along `dim`: centred a.b / (|a| |b| + eps). Same shapes -> the shape without `dim`.

    eps 1e-8 is that of the public code of DIST (NeurIPS 2022, arXiv 2205.10536). A constant vector correlates 0 with all.
    """
    a, b = widen(a), widen(b)
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + eps)


def relative_distances(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs over the mean of the positive ones.  x [B, ...] -> [B, B], 0 on the diagonal.

    psi_D of RKD (CVPR 2019, arXiv 1904.05068). All zeros where all points coincide. O(B^2) memory.
    """
    x = widen(x).flatten(1)
    # Without the |a|^2 + |b|^2 - 2ab shortcut: it cancels for close points, and its root has no gradient at 0.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def angles(x: Tensor) -> Tensor:
    """cos of the angle at i between the directions to j and to k, for all triplets.  x [B, ...] -> [B, B, B] (i, j, k).

    psi_A of RKD (CVPR 2019, arXiv 1904.05068). Triplets without an angle (j = i, k = i, coinciding points) are 0
    and get no gradient. Memory B^2 D for the directions and B^3 for the result: 64 MiB of float32 each at B 256, D 256.
    """
    x = widen(x).flatten(1)
    towards = x[None, :, :] - x[:, None, :]  # [i, j, D]
    length = torch.linalg.vector_norm(towards, dim=-1, keepdim=True)
    # Not F.normalize: at coinciding points its gradient is 1 / 1e-12.
    unit = torch.where(length > 0, towards / torch.where(length > 0, length, 1.0), 0.0)
    with without_autocast(unit):
        return unit @ unit.transpose(1, 2)
