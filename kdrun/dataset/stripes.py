"""Striped objects under a global bit: a small world for segmentation in which context decides the class. Definition ours.

Every 24x24 image has three objects, discs and squares at random places, filled with stripes that are vertical or horizontal; a
corner patch is bright or dark, one bit for the whole image; noise lies over all. An object's class is 1 + orientation + 2 * bit,
everything else (the patch too) is background. What a pixel's stripes look like is local, the bit is far away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident
from kdrun.dataset.images import check_splits
from kdrun.dataset.pixels import PixelSplit
from kdrun.dataset.select import select

SIZE, CHANNELS = 24, 3
OBJECTS = 3
RADIUS = 3.0, 5.0  # uniform between these, in pixels; half the side of a square
PERIOD = 4  # of the stripes, in pixels; amplitude 1 on all channels
PATCH = 4  # side of the corner patch, of value +1 or -1
CLASS_NAMES = ("background", "vertical_dark", "horizontal_dark", "vertical_bright", "horizontal_bright")


@dataclass
class StripesData:
    """`n_train` images to train on, `n_test` further ones to test on. Sample i is the same image however many there are."""

    name: str = "stripes"
    n_train: int = 500
    n_test: int = 150
    noise: float = 0.8
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

    def load(self) -> Data:
        """Draw the images. Raises `Refused` for a subset larger than its split."""
        sizes = {"train": self.n_train, "test": self.n_test}
        unlabelled = {part: torch.zeros(size, dtype=torch.int64) for part, size in sizes.items()}  # a row has no class of its own
        chosen = select(unlabelled, self.validation, self.subset, self.subset_test)
        splits = {name: PixelSplit.of(Resident(self.draw(part.table, part.rows)), part.ids) for name, part in chosen.items()}
        mean, std = (0.0,) * CHANNELS, (1.0,) * CHANNELS  # as drawn: already around 0 and about as wide as 1
        return Data(self.name, CLASS_NAMES, (CHANNELS, SIZE, SIZE), mean, std, splits, sum(sizes.values()))

    def draw(self, part: str, rows: Tensor) -> Tensor:
        """Images with their masks as the last channel, float32 [N, CHANNELS + 1, SIZE, SIZE]; `rows` [N] numbers them in their part."""
        u = rng.uniform(rng.key(self.seed, "stripes", part), rows[:, None, None], torch.arange(OBJECTS)[:, None], torch.arange(6))
        bit = rng.uniform(rng.key(self.seed, "stripes", part, "bit"), rows) < 0.5
        values, labels = torch.zeros(len(rows), SIZE, SIZE), torch.zeros(len(rows), SIZE, SIZE)
        for i in range(OBJECTS):
            inside, stripes, vertical = _object(u[:, i, :, None, None])
            values = torch.where(inside, stripes, values)
            labels = torch.where(inside, (1 + (~vertical) + 2 * bit[:, None, None]).float(), labels)
        values[:, :PATCH, :PATCH] = torch.where(bit, 1.0, -1.0)[:, None, None]
        labels[:, :PATCH, :PATCH] = 0
        noise = self.noise * rng.normal(rng.key(self.seed, "stripes", part, "noise"), (CHANNELS, SIZE, SIZE), rows)
        return torch.cat([values[:, None] + noise, labels[:, None]], 1)


def _object(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One object of each image from its draws [N, 6, 1, 1]: (pixels inside [N, H, W], stripe values [N, H, W], vertical [N, 1, 1])."""
    place = torch.arange(SIZE) + 0.5
    y, x = place[:, None] - SIZE * u[:, 0], place[None, :] - SIZE * u[:, 1]
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[:, 2]
    disc, vertical = u[:, 3] < 0.5, u[:, 4] < 0.5
    inside = torch.where(disc, x.square() + y.square() <= radius.square(), torch.maximum(x.abs(), y.abs()) <= radius)
    along = torch.where(vertical, x.expand(-1, SIZE, -1), y.expand(-1, -1, SIZE))  # vertical stripes change from left to right
    return inside, torch.cos(2 * math.pi * (along / PERIOD + u[:, 5])), vertical
