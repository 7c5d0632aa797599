"""Striped shapes to be found: a small world for detection whose boxes are known exactly. Definition ours.

A 64x64 image is four fields of 32x32; each holds an object with probability 0.6, a disc or a square, reddish or bluish, filled
with stripes that are vertical or horizontal; noise lies over all. The class is the shape and its tint; the stripes say nothing.
Objects keep to their fields, so that none hides another; an image without objects is drawn too (1 in 39).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident
from kdrun.dataset.boxes import Box, BoxSplit, Mirror, padded
from kdrun.dataset.images import check_splits
from kdrun.dataset.select import select

SIZE, CHANNELS, FIELDS = 64, 3, 2  # fields a side
FIELD = SIZE // FIELDS
RADIUS = 6.0, 14.0  # uniform between these, in pixels; half the side of a square
PERIOD = 6  # of the stripes, in pixels
DEPTH = 0.8  # of the stripes, as a share of the colour
THERE = 0.6  # probability of an object in a field
DRAWS = 11  # for an object
PALE = 0.2  # what the tint leaves of blue, or of red
CLASS_NAMES = ("disc_red", "disc_blue", "square_red", "square_blue")


@dataclass
class ShapesData:
    """`n_train` images to train on, `n_test` further ones to test on. Sample i is the same image however many there are."""

    name: str = "shapes"
    n_train: int = 500
    n_test: int = 200
    noise: float = 0.3
    flip: float = 0.5
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_splits({"train": "train", "test": "test"}, self.validation)
        for key in ("n_train", "n_test"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} must not be below 0")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} is a probability")

    def load(self) -> Data:
        """Draw the images. Raises `Refused` for a subset larger than its split."""
        sizes = {"train": self.n_train, "test": self.n_test}
        unlabelled = {part: torch.zeros(size, dtype=torch.int64) for part, size in sizes.items()}  # a row has no class of its own
        splits = {}
        for name, part in select(unlabelled, self.validation, self.subset, self.subset_test).items():
            images, boxes = self.draw(part.table, part.rows)
            rows = padded(boxes, torch.ones(len(boxes), 2))
            splits[name] = BoxSplit.of(Resident(images, Mirror(self.flip)), part.ids, rows, self.flip, SIZE)
        mean, std = (0.0,) * CHANNELS, (1.0,) * CHANNELS  # as drawn: already around 0 and about as wide as 1
        return Data(self.name, CLASS_NAMES, (CHANNELS, SIZE, SIZE), mean, std, splits, sum(sizes.values()))

    def draw(self, part: str, rows: Tensor) -> tuple[Tensor, list[list[Box]]]:
        """Images float32 [N, CHANNELS, SIZE, SIZE] and the objects of each; `rows` [N] numbers them in their part."""
        fields = torch.arange(FIELDS**2)
        u = rng.uniform(rng.key(self.seed, "shapes", part), rows[:, None, None], fields[:, None], torch.arange(DRAWS))
        images = self.noise * rng.normal(rng.key(self.seed, "shapes", part, "noise"), (CHANNELS, SIZE, SIZE), rows)
        boxes: list[list[Box]] = [[] for _ in rows]
        for field in fields.tolist():
            there, label, corners, pixels = _object(u[:, field], field)
            images += torch.where(there[:, None, None, None], pixels, 0.0)
            for row in torch.where(there)[0].tolist():
                x1, y1, x2, y2 = corners[row].tolist()
                boxes[row].append(Box((x1, y1, x2, y2), int(label[row]), (x2 - x1) * (y2 - y1)))
        return images, boxes


def _object(u: Tensor, field: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The object of one field in each image, from its draws [N, DRAWS]: whether it is there [N], its class [N], its corners [N, 4], and
    what it adds to the image [N, CHANNELS, SIZE, SIZE]."""
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[:, 1]
    down, right = divmod(field, FIELDS)
    x, y = (radius + (FIELD - 2 * radius) * u[:, 2 + axis] + FIELD * first for axis, first in enumerate((right, down)))
    square, horizontal, blue = u[:, 4] < 0.5, u[:, 5] < 0.5, u[:, 6] < 0.5
    place = torch.arange(SIZE) + 0.5
    dx, dy = place[None, None, :] - x[:, None, None], place[None, :, None] - y[:, None, None]
    edge = radius[:, None, None]
    inside = torch.where(square[:, None, None], torch.maximum(dx.abs(), dy.abs()) <= edge, dx.square() + dy.square() <= edge.square())
    along = torch.where(horizontal[:, None, None], dy.expand(-1, -1, SIZE), dx.expand(-1, SIZE, -1))
    stripes = torch.cos(2 * math.pi * (along / PERIOD + u[:, 7, None, None]))
    tint = torch.stack([torch.where(blue, PALE, 1.0), torch.ones(len(u)), torch.where(blue, 1.0, PALE)], 1)
    colour = tint * (0.5 + u[:, 8:11])  # green alone tells an object from the ground
    pixels = (inside * (1 + DEPTH * stripes))[:, None] * colour[:, :, None, None]
    corners = torch.stack([x - radius, y - radius, x + radius, y + radius], 1)
    return u[:, 0] < THERE, 2 * square.long() + blue, corners, pixels
