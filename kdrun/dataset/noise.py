"""Images of noise with labels drawn at random: nothing to learn, and enough to look at how networks at initialisation relate samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split


@dataclass
class NoiseData:
    """Pixels from N(0, 1), classes equally likely. Sample i is the same however many there are."""

    name: str = "noise"
    classes: int = 100
    input_shape: list[int] = field(default_factory=lambda: [3, 32, 32])
    n_train: int = 1024
    n_test: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("classes", "n_train", "n_test"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(f"input_shape={self.input_shape} has numbers from 1, e.g. [3, 32, 32]")

    def load(self) -> Data:
        """Draw the images."""
        shape, splits, first = tuple(self.input_shape), {}, 0
        for part, size in (("train", self.n_train), ("test", self.n_test)):
            rows = torch.arange(size)
            inputs = rng.normal(rng.key(self.seed, "noise", part), shape, rows)
            targets = rng.integers(rng.key(self.seed, "noise", part, "label"), self.classes, rows)
            splits[part] = Split(Resident(inputs), targets, rows + first)
            first += size
        channels = shape[0]
        return Data(self.name, tuple(map(str, range(self.classes))), shape, (0.0,) * channels, (1.0,) * channels, splits, first)
