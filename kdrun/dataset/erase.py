"""Random erasing (Zhong et al., AAAI 2020, arXiv 1708.04896), whose every draw is a function of (seed, view, sample id)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Request

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)  # share of the area, height / width: the defaults of torchvision, and of timm (up to 1/3)
ATTEMPTS = 10  # at a rectangle that fits, as in torchvision; else the image stays


@dataclass(frozen=True)
class Erase:
    """torchvision's RandomErasing of normalised images: a rectangle becomes 0, which is the mean colour, or standard normal noise."""

    probability: float
    value: Literal["zero", "random"] = "zero"

    def __call__(self, inputs: Tensor, request: Request) -> Tensor:
        """float32 [B, C, H, W] -> the same."""
        boxes = self.draws(request, (inputs.shape[2], inputs.shape[3]))
        rows = (boxes[:, 2] > 0).nonzero().flatten()
        if not len(rows):
            return inputs
        there = rows.to(inputs.device, non_blocking=True)
        cut = inside(boxes[rows].to(inputs.device, non_blocking=True), inputs.shape[2], inputs.shape[3])
        fill: Tensor | float = 0.0
        if self.value == "random":
            counters = (c[rows].to(inputs.device, non_blocking=True) for c in (request.view, request.ids))
            fill = rng.normal(rng.key(request.seed, "erasing noise"), tuple(inputs.shape[1:]), *counters)
        return inputs.index_copy(0, there, torch.where(cut[:, None], fill, inputs[there]))

    def draws(self, request: Request, size: tuple[int, int]) -> Tensor:
        """(top, left, height, width) of what is erased from images of (H, W), int64 [B, 4]; height and width are 0 where nothing is."""
        height, width = size
        rows, each = (request.view[:, None], request.ids[:, None]), torch.arange(ATTEMPTS)
        area, aspect, down, across = (
            rng.uniform(rng.key(request.seed, "erasing", what), *rows, each).double() for what in ("area", "aspect", "top", "left")
        )
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * area)
        aspect = torch.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * aspect)
        high, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top, left = (down * (height - high + 1)).long(), (across * (width - wide + 1)).long()
        fits = (high < height) & (wide < width)
        first = fits.int().argmax(1, keepdim=True)
        wanted = rng.uniform(rng.key(request.seed, "erase"), request.view, request.ids) < self.probability
        boxes = torch.stack([part.gather(1, first).squeeze(1) for part in (top, left, high, wide)], 1)
        return boxes * (fits.any(1) & wanted)[:, None]


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in a box: (top, left, height, width) int64 [B, 4] -> bool [B, H, W]."""
    top, left, high, wide = (side[:, None] for side in boxes.unbind(1))
    rows, columns = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    return ((rows >= top) & (rows < top + high))[:, :, None] & ((columns >= left) & (columns < left + wide))[:, None, :]
