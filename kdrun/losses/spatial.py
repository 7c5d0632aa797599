"""Losses over maps: feature errors under spatial and channel masks, the overlap of masks, a divergence over labelled pixels.

`B` batch, `C` channels, `H W` space, `M` masks, `K` masked entries (channels, or the H*W positions). Values are one per
sample, or a sum over pixels, in float32 or wider.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdrun.losses.divergence import kl_divergence
from kdrun.losses.precision import widen, without_autocast

Norm = Literal["mask_sum", "literal"]
Dice = Literal["pairwise", "pooled"]
# A lower bound, where the code of MasKD (github.com/hunto/MasKD) adds it: masks of ordinary size keep their exact value.
LEAST_MASK_SUM = 1e-5
LEAST_MASK_NORM = 1e-12  # added to each squared norm in the overlap: as in the code of MasKD


def channel_masked_error(difference: Tensor, masks: Tensor, norm: Norm = "mask_sum") -> Tensor:
    """1/M sum_m |M_m (x) D|^2 / (HW sum_k M_mk), each mask broadcast over positions.  [B, C, H, W], [B, M, C] -> [B].

    `norm="literal"`: 1/M sum_m |M_m (x) D|^2 sum_k M_mk / HW.
    """
    return _masked_error(widen(difference).square().sum((2, 3)), widen(masks), difference[0, 0].numel(), norm)


def spatial_masked_error(difference: Tensor, masks: Tensor, norm: Norm = "mask_sum") -> Tensor:
    """1/M sum_m |M_m (x) D|^2 / (C sum_p M_mp), each mask broadcast over channels.  [B, C, H, W], [B, M, HW] -> [B].

    `norm="literal"`: 1/M sum_m |M_m (x) D|^2 sum_p M_mp / C.
    """
    return _masked_error(widen(difference).square().sum(1).flatten(1), widen(masks), difference.shape[1], norm)


def _masked_error(energy: Tensor, masks: Tensor, shared: int, norm: Norm) -> Tensor:
    """`energy` [B, K]: squared errors, added up over the `shared` entries that a mask is broadcast over; masks [B, M, K] -> [B]."""
    masked = (masks.square() * energy[:, None]).sum(-1)
    size = masks.sum(-1)
    per_mask = masked / (shared * size.clamp_min(LEAST_MASK_SUM)) if norm == "mask_sum" else masked * size / shared
    return per_mask.mean(-1)


def mask_overlap(masks: Tensor, form: Dice = "pairwise") -> Tensor:
    """Dice overlap of the masks of one sample.  [B, M, K] -> [B], 0 for disjoint masks and for a single one.

    pairwise: 1/(M(M-1)) sum_{i != j} 2<M_i, M_j> / (|M_i|^2 + |M_j|^2), 1 for identical masks.
    pooled: 2 sum_{i != j} <M_i, M_j> / (sum_i |M_i|^2 + sum_j |M_j|^2), M - 1 for identical masks.
    """
    count = masks.shape[1]
    if count == 1:
        return widen(masks).new_zeros(len(masks))
    with without_autocast(masks):
        products = widen(masks) @ widen(masks).mT  # [B, M, M]
    norms = products.diagonal(dim1=1, dim2=2) + LEAST_MASK_NORM
    if form == "pooled":
        # The pooled norms are those of both sums, hence the 2 on both sides of the fraction.
        return (products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)) / norms.sum(1)
    overlaps = 2 * products / (norms[:, :, None] + norms[:, None, :])
    return (overlaps.sum((1, 2)) - overlaps.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))


def pixel_kl_divergence(student: Tensor, teacher: Tensor, labelled: Tensor, temperature: float = 1.0) -> Tensor:
    """sum over labelled pixels of KL(softmax(teacher / T) || softmax(student / T)), nats.

    Logits [B, C, ...], `labelled` bool [B, ...] -> scalar. Without T^2, which belongs to the paper's term.
    """
    per_pixel = kl_divergence(student.movedim(1, -1), teacher.movedim(1, -1), temperature)
    return torch.where(labelled, per_pixel, 0.0).sum()
