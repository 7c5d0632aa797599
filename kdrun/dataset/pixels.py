"""Images with a class for every pixel: image and mask are stored and transformed as one, so that they cannot come apart.

A stored row is the image with its mask as a further, last channel, [C + 1, H, W], where VOID marks pixels without a label.
`PixelSplit` cuts it into what a batch holds: inputs [B, C, H, W] and targets [B, H, W] with -1 for VOID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun import rng
from kdrun.dataset.augment import Normalise
from kdrun.dataset.base import Request, Split, Storage
from kdrun.types import Batch

VOID = 255  # in stored masks, as in the files of most data sets


class PixelSplit(Split):
    """A split whose labels lie in the last channel of its rows. Its own `targets` [N] are 0: a row has no label but its pixels'."""

    @staticmethod
    def of(storage: Storage, ids: Tensor) -> PixelSplit:
        return PixelSplit(storage, torch.zeros(len(ids), dtype=torch.int64), ids)

    def batch(self, request: Request, inputs: Tensor, device: torch.device) -> Batch:
        labels = inputs[:, -1].to(torch.int64)
        rows = super().batch(request, inputs[:, :-1].contiguous(), device)
        return rows._replace(targets=labels.masked_fill(labels == VOID, -1))


class BlankSplit(Split):
    """A split whose pixels are all of the first class, for planning without data."""

    def batch(self, request: Request, inputs: Tensor, device: torch.device) -> Batch:
        rows = super().batch(request, inputs, device)
        return rows._replace(targets=torch.zeros_like(inputs[:, 0], dtype=torch.int64))


@dataclass(frozen=True)
class ScaleCropFlip:
    """Random scale, crop and horizontal flip of image and mask together, on the device; evaluation takes the whole image.

    The image is read bilinearly, the mask at the nearest pixel. A crop that reaches beyond the scaled image, at the right and at
    the bottom (before the flip), is filled with the mean colour and VOID.
    """

    normalise: Normalise
    crop: tuple[int, int] | None = None  # (H, W); None: the size of the image
    scale: tuple[float, float] = (1.0, 1.0)  # uniform between these
    flip: float = 0.0  # probability

    @property
    def random(self) -> bool:
        return bool(self.crop is not None or self.flip or self.scale != (1.0, 1.0))

    def sample(self, image: Any, key: int | None) -> Any:
        return image

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        """Stored uint8 [B, C + 1, H, W] to float32 [B, C + 1, h, w]: the image normalised, the mask as it is."""
        images, masks = self.normalise(inputs[:, :-1]), inputs[:, -1:].to(torch.float32)
        if request.augment and self.random:
            grid = self.grid(request, inputs.shape[2], inputs.shape[3]).to(inputs.device, non_blocking=True)
            inside = (grid.abs() <= 1).all(-1)[:, None]
            images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False) * inside
            masks = F.grid_sample(masks, grid, "nearest", "border", align_corners=False).masked_fill(~inside, VOID)
        return torch.cat([images, masks], 1)

    def grid(self, request: Request, height: int, width: int) -> Tensor:
        """Where each pixel of the crops lies in its image, float32 [B, h, w, 2] as (x, y) with the image spanning [-1, 1]."""
        key = rng.key(request.seed, "scale, crop and flip")
        u = rng.uniform(key, request.view[:, None], request.ids[:, None], torch.arange(4)).double()
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 0]
        size = self.crop or (height, width)
        axes = []
        for whole, cropped, draw in ((height, size[0], u[:, 1]), (width, size[1], u[:, 2])):
            scaled = (whole * scale).round()
            first = (draw * ((scaled - cropped).clamp_min(0) + 1)).floor()
            axes.append((2 * (torch.arange(cropped) + 0.5 + first[:, None]) / scaled[:, None] - 1).float())
        y, x = axes
        x = torch.where((u[:, 3] < self.flip)[:, None], x.flip(1), x)
        return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
