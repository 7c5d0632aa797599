"""Images with boxes: batches in which both are mirrored alike, and images brought to one size without distortion.

A batch has targets [B, M] int64, the class of each box, and in `extra`:

boxes   float32 [B, M, 4]: x1, y1, x2, y2 in pixels of the network's input
crowd   bool [B, M]: boxes around many objects at once, which nobody is taught to find and no one loses for finding
area    float32 [B, M]: of the object in pixels of the file, by which benchmarks call it small, medium or large
zoom    float32 [B, 2]: pixels of the input for one of the file, (x, y)

M is the largest number of boxes in the split (at least 1); rows left over have class -1. An image may have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdrun import rng
from kdrun.dataset.augment import Normalise
from kdrun.dataset.base import Request, Split, Storage
from kdrun.types import Batch

CLASSES = "classes"  # the rows of a split that become its batches' targets


class Box(NamedTuple):
    """One annotated object, in pixels of the file."""

    corners: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int
    area: float
    crowd: bool = False


def padded(images: Sequence[Sequence[Box]], zoom: Tensor) -> dict[str, Tensor]:
    """Rows of a split out of the boxes of each image; zoom [N, 2]."""
    shape = len(images), max(1, max((len(boxes) for boxes in images), default=0))
    classes = torch.full(shape, -1)
    boxes, area, crowd = torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for row, found in enumerate(images):
        n = len(found)
        if not n:
            continue
        classes[row, :n] = torch.tensor([box.label for box in found])
        boxes[row, :n] = torch.tensor([box.corners for box in found], dtype=torch.float32)
        area[row, :n] = torch.tensor([box.area for box in found], dtype=torch.float32)
        crowd[row, :n] = torch.tensor([box.crowd for box in found])
    return {CLASSES: classes, "boxes": boxes * zoom.repeat(1, 2)[:, None], "area": area, "crowd": crowd, "zoom": zoom}


@dataclass(frozen=True, eq=False)
class BoxSplit(Split):
    """A split of images with boxes. Its own `targets` [N] are 0: an image has no class but its boxes'."""

    flip: float = 0.0  # the transform's, of images `width` pixels wide
    width: int = 0

    @staticmethod
    def of(storage: Storage, ids: Tensor, rows: Mapping[str, Tensor], flip: float, width: int) -> BoxSplit:
        return BoxSplit(storage, torch.zeros(len(ids), dtype=torch.int64), ids, rows, flip=flip, width=width)

    def batch(self, request: Request, inputs: Tensor, device: torch.device) -> Batch:
        rows = super().batch(request, inputs, device)
        extra = dict(rows.extra)
        if request.augment and self.flip:
            x1, y1, x2, y2 = extra["boxes"].unbind(-1)
            other = torch.stack([self.width - x2, y1, self.width - x1, y2], -1)
            turned = mirrored(request, self.flip).to(device, non_blocking=True)
            extra["boxes"] = torch.where(turned[:, None, None], other, extra["boxes"])
        return rows._replace(targets=extra.pop(CLASSES), extra=extra)


def mirrored(request: Request, probability: float) -> Tensor:
    """Which images of a request are mirrored, bool [B], on the CPU."""
    return rng.uniform(rng.key(request.seed, "mirror"), request.view, request.ids) < probability


def mirror(images: Tensor, request: Request, probability: float) -> Tensor:
    """Images [B, C, H, W], some of them from right to left."""
    if not (request.augment and probability):
        return images
    turned = mirrored(request, probability).to(images.device, non_blocking=True)
    return torch.where(turned[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class Mirror:
    """Images that are stored as the models see them, mirrored at random in training."""

    flip: float = 0.0

    def sample(self, image: Any, key: int | None) -> Any:
        return image

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        return mirror(inputs, request, self.flip)


@dataclass(frozen=True)
class Letterbox:
    """Brings an image into `size` (H, W), at the upper left, its sides in proportion; the rest has the mean colour."""

    normalise: Normalise
    size: tuple[int, int]
    flip: float = 0.0

    def sample(self, image: Any, key: int | None) -> Any:
        canvas = Image.new("RGB", self.size[::-1], tuple(round(255 * value) for value in self.normalise.mean))
        width, height = within(np.array([image.size]), self.size)[0].tolist()
        canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR))
        return canvas

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        return mirror(self.normalise(inputs), request, self.flip)


def within(sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(width, height) [N, 2] int64 of images of these sizes when they are brought into `size` (H, W)."""
    factor = (np.array(size[::-1]) / sizes).min(1, keepdims=True)
    return (sizes * factor).round().astype(np.int64).clip(1)
