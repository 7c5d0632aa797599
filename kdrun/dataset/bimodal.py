"""Classes of several Gaussian modes: a world in which a class is not one cloud, and whose exact posterior is known.

    m_(c, j) ~ N(0, spread^2 I),   x = m_(y, j) + sigma e,   j uniform,   p(c | x) prop. to sum_j exp(-|x - m_(c, j)|^2 / (2 sigma^2))

Definition and constants are ours: with 10 classes of two modes in 16 dimensions a model of one class's density needs more
than a mean, and single classes are near enough to each other for such a model to be wrong now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.images import check_splits


@dataclass
class BimodalData:
    """Samples as they are drawn, not standardised: distances in this world mean what they say. Every class has the same number of rows.

    Every batch carries in `extra`: "truth_logits" float32 [B, C], the exact log posterior.
    """

    name: str = "bimodal"
    classes: int = 10
    modes: int = 2
    dimension: int = 16
    spread: float = 1.04
    sigma: float = 0.7
    train_per_class: int = 400
    test_per_class: int = 200
    validation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_splits({"train": "train", "test": "test"}, self.validation)
        for key in ("classes", "modes", "dimension", "train_per_class", "test_per_class"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.spread < 0 or self.sigma <= 0:
            raise ValueError(f"spread={self.spread} must not be below 0, sigma={self.sigma} must be above 0")

    def means(self) -> Tensor:
        """The centre of every mode, float64 [C, modes, D], drawn from the world's seed alone."""
        source = rng.generator(rng.key(self.seed, "bimodal", "world"))
        return self.spread * torch.randn(self.classes, self.modes, self.dimension, generator=source, dtype=torch.float64)

    def posterior(self, x: Tensor) -> Tensor:
        """Exact Bayes log p(c | x) of x [N, D], float64 [N, C]; classes and modes are equally likely."""
        distance = torch.cdist(x.double(), self.means().flatten(0, 1)).view(len(x), self.classes, self.modes)
        return torch.log_softmax((-distance.square() / (2 * self.sigma**2)).logsumexp(2), dim=1)

    def load(self) -> Data:
        """Draw the samples. Validation rows are further samples beside the training rows, not taken from them."""
        sizes = {
            "train": self.train_per_class,
            "test": self.test_per_class,
            "validation": round(self.validation * self.train_per_class),
        }
        splits, first = {}, 0
        for part, size in sizes.items():
            if size:
                x, y = self._draw(part, size)
                ids = torch.arange(first, first + len(y))
                splits[part] = Split(Resident(x.float()), y, ids, {"truth_logits": self.posterior(x).float()})
                first += len(y)
        flat = (0.0,) * self.dimension, (1.0,) * self.dimension
        return Data(self.name, tuple(map(str, range(self.classes))), (self.dimension,), *flat, splits, first)

    def _draw(self, part: str, per_class: int) -> tuple[Tensor, Tensor]:
        """(x float64 [N, D], y int64 [N]) of one split, the classes in turn."""
        source = rng.generator(rng.key(self.seed, "bimodal", part))
        y = torch.arange(per_class * self.classes) % self.classes
        mode = torch.randint(self.modes, (len(y),), generator=source)
        x = self.means()[y, mode] + self.sigma * torch.randn(len(y), self.dimension, generator=source, dtype=torch.float64)
        return x, y
