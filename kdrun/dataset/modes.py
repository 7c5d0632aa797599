"""Modes on a circle: a labelled density of the plane that is known exactly, for generative methods.

`modes` Gaussians of standard deviation `std` sit at equal angles on the unit circle; class k of C owns modes k, k + C, ...:
with 8 modes and 4 classes two opposite ones, so that the mean of a class lies where it has no density. Definition and
constants are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.images import check_splits


@dataclass
class ModesData:
    """Samples of the density, not standardised; classes and the modes of a class are equally frequent up to one row.

    Every batch carries in `extra` what is known of the world: "mode_centres" float32 [M, 2], "mode_classes" int64 [M].
    """

    name: str = "modes"
    modes: int = 8
    classes: int = 4
    std: float = 0.12
    n_train: int = 25_600
    n_test: int = 16_000
    validation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_splits({"train": "train", "test": "test"}, self.validation)
        for key in ("modes", "classes", "n_train", "n_test"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.modes % self.classes:
            raise ValueError(f"modes={self.modes} is no multiple of classes={self.classes}")
        if self.std <= 0:
            raise ValueError(f"std={self.std} must be above 0")

    def centres(self) -> Tensor:
        """Mode j sits at the angle 2 pi j / M: float64 [M, 2]."""
        angles = 2 * math.pi * torch.arange(self.modes, dtype=torch.float64) / self.modes
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def load(self) -> Data:
        """Draw the samples. Validation rows are further samples beside the training rows, not taken from them."""
        sizes = {"train": self.n_train, "test": self.n_test, "validation": round(self.validation * self.n_train)}
        known = {"mode_centres": self.centres().float(), "mode_classes": torch.arange(self.modes) % self.classes}
        splits, first = {}, 0
        for part, size in sizes.items():
            if size:
                x, y = self._draw(part, size)
                splits[part] = Split(Resident(x), y, torch.arange(first, first + size), constants=known)
                first += size
        names = tuple(str(c) for c in range(self.classes))
        return Data(self.name, names, (2,), (0.0, 0.0), (1.0, 1.0), splits, first)

    def _draw(self, part: str, size: int) -> tuple[Tensor, Tensor]:
        """(x float32 [N, 2], y int64 [N]) of one split: the modes in turn, hence the classes too."""
        source = rng.generator(rng.key(self.seed, "modes", part))
        mode = torch.arange(size) % self.modes
        x = self.centres()[mode] + self.std * torch.randn(size, 2, generator=source, dtype=torch.float64)
        return x.float(), mode % self.classes
