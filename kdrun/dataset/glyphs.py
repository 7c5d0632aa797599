"""Glyphs: eight simple shapes, shifted, faint and under noise. A small world in which deeper and wider networks do better. Definition ours.

    x = c m_y(p - shift) + sigma e,   c ~ U(0.5, 1) for each image, shift in {-s .. s}^2 pixels, e ~ N(0, 1) for each pixel and channel

m_y is 1 inside shape y and 0 outside, the same in all channels. On the grid [-1, 1]^2, (u, v) the pixel's place over RADIUS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.images import check_splits
from kdrun.dataset.select import select

CHANNELS = 3
CONTRAST = 0.5, 1.0
RADIUS = 0.6  # of a shape, where half the image is 1: with 16 pixels and a shift of 3 every shape stays inside

SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.55**2),
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.85,
    "plus": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 1),
    "diamond": lambda u, v: u.abs() + v.abs() < 1,
    "bar": lambda u, v: (v.abs() < 0.3) & (u.abs() < 1),
    "triangle": lambda u, v: (v > -0.6) & (v < 0.9 - 1.7 * u.abs()),
    "two_bars": lambda u, v: (v.abs() > 0.25) & (v.abs() < 0.65) & (u.abs() < 1),
}


@dataclass
class GlyphData:
    """`n_train` images to train on, `n_test` further ones to test on, float32 [3, size, size] as drawn. Sample i is the same
    image however many there are; classes are equally likely."""

    name: str = "glyphs"
    size: int = 16
    shift: int = 3
    noise: float = 0.5
    n_train: int = 1500
    n_test: int = 1000
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_splits({"train": "train", "test": "test"}, self.validation)
        for key, low in (("size", 8), ("n_train", 1), ("n_test", 1), ("shift", 0), ("noise", 0)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")
        room = int((1 - RADIUS) / 2 * self.size)  # pixels between a shape in the middle and the border
        if self.shift > room:
            raise ValueError(f"shift={self.shift}: legal range [0, {room}], so that every shape stays inside")

    def load(self) -> Data:
        """Draw the images. Raises `Refused` for a subset larger than its split."""
        targets = {part: self.labels(part, size) for part, size in (("train", self.n_train), ("test", self.n_test))}
        chosen = select(targets, self.validation, self.subset, self.subset_test)
        splits = {}
        for name, part in chosen.items():
            labels = targets[part.table][part.rows]
            splits[name] = Split(Resident(self.draw(part.table, part.rows, labels)), labels, part.ids)
        shape = (CHANNELS, self.size, self.size)
        return Data(self.name, tuple(SHAPES), shape, (0.0,) * CHANNELS, (1.0,) * CHANNELS, splits, self.n_train + self.n_test)

    def labels(self, part: str, size: int) -> Tensor:
        """int64 [size]."""
        return rng.integers(rng.key(self.seed, "glyphs", part, "label"), len(SHAPES), torch.arange(size))

    def masks(self) -> Tensor:
        """The shapes in the middle, float32 [classes, size, size]; v grows downwards."""
        place = ((torch.arange(self.size) + 0.5) * 2 / self.size - 1) / RADIUS
        v, u = torch.meshgrid(place, place, indexing="ij")
        return torch.stack([shape(u, v) for shape in SHAPES.values()]).float()

    def draw(self, part: str, rows: Tensor, targets: Tensor) -> Tensor:
        """float32 [N, 3, size, size] for the rows of a part, by their number [N] and class [N]."""
        key = rng.key(self.seed, "glyphs", part)
        offsets = rng.integers(rng.key(key, "shift"), 2 * self.shift + 1, rows[:, None], torch.arange(2)) - self.shift
        low, high = CONTRAST
        contrast = low + (high - low) * rng.uniform(rng.key(key, "contrast"), rows)
        shifted = roll(self.masks()[targets], offsets)
        noise = self.noise * rng.normal(rng.key(key, "noise"), (CHANNELS, self.size, self.size), rows)
        return (contrast[:, None, None] * shifted)[:, None] + noise


def roll(images: Tensor, offsets: Tensor) -> Tensor:
    """Images [N, H, W] moved by (down, right) [N, 2] pixels; what leaves on one side comes back on the other."""
    N, H, W = images.shape
    rows = (torch.arange(H) - offsets[:, :1]) % H  # [N, H]
    columns = (torch.arange(W) - offsets[:, 1:]) % W
    return images[torch.arange(N)[:, None, None], rows[:, :, None], columns[:, None, :]]
