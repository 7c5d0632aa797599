"""Regions: a world in which it is known which points teach something, and which ones the teacher gets wrong.

A point lies in an easy region (around its class centre), an informative one (around a sub-centre of its class that no
labelled point shows) or an ambiguous one (around the midpoint of its centre and another class's). The teacher is simulated:
right with a known probability in each region. Definition and constants are ours.

    x = centre + e,  e ~ N(0, I);  centres and sub-centres ~ 2 N(0, I);  log p_t = log .9 on the named class, log (.1 / (C - 1)) elsewhere
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split

SPREAD = 2.0  # of centres and sub-centres
SUB_CENTRES = 3
EASY, INFORMATIVE, AMBIGUOUS = range(3)
RIGHT = (0.99, 0.95, 0.20)  # probability that the teacher names the true class, by region
SURE = 0.9  # its probability of the class that it names


@dataclass
class RegionData:
    """Splits: train (easy labelled rows, then the pool), validation (500 rows like the pool, for the teacher's accuracy), test.

    Every batch carries in `extra`: "region" int64 [B], "teacher_logits" float32 [B, C] (log p of the simulated teacher), and,
    in the training split, "labelled" bool [B]. Inputs are as drawn, not standardised.
    """

    name: str = "regions"
    classes: int = 8
    dimensions: int = 16
    ambiguous: float = 0.2
    informative: float = 0.2
    n_labelled: int = 80
    n_pool: int = 5000
    n_validation: int = 500
    n_test: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("n_labelled", "n_test", "dimensions"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.classes < 2:
            raise ValueError(f"classes={self.classes} must be at least 2")
        if min(self.ambiguous, self.informative) < 0 or self.ambiguous + self.informative > 1:
            raise ValueError(f"ambiguous={self.ambiguous}: shares of regions, with informative={self.informative} at most 1 together")

    def load(self) -> Data:
        source = rng.generator(rng.key(self.seed, "regions", "world"))
        centres = SPREAD * torch.randn(self.classes, self.dimensions, generator=source, dtype=torch.float64)
        inner = SPREAD * torch.randn(self.classes, SUB_CENTRES, self.dimensions, generator=source, dtype=torch.float64)
        labelled = self._draw("labelled", self.n_labelled, centres, inner, easy=True)
        drawn = {
            name: self._draw(name, size, centres, inner)
            for name, size in (("pool", self.n_pool), ("validation", self.n_validation), ("test", self.n_test))
            if size
        }
        train = tuple(torch.cat(parts) for parts in zip(labelled, drawn.pop("pool"), strict=True)) if self.n_pool else labelled
        splits, first = {}, 0
        for name, (y, x, region, said) in {"train": train, **drawn}.items():
            ids = torch.arange(first, first + len(y))
            extra = {"region": region, "teacher_logits": said}
            if name == "train":
                extra["labelled"] = torch.arange(len(y)) < self.n_labelled
            splits[name] = Split(Resident(x.float()), y, ids, extra)
            first += len(y)
        names = tuple(map(str, range(self.classes)))
        return Data(self.name, names, (self.dimensions,), (0.0,) * self.dimensions, (1.0,) * self.dimensions, splits, first)

    def _draw(self, part: str, size: int, centres: Tensor, inner: Tensor, easy: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y [N], x [N, D], region [N], log p of the teacher [N, C]) of one part."""
        source = rng.generator(rng.key(self.seed, "regions", part))
        y = torch.randint(self.classes, (size,), generator=source)
        sub = torch.randint(SUB_CENTRES, (size,), generator=source)
        other = (y + torch.randint(1, self.classes, (size,), generator=source)) % self.classes
        kind, right = torch.rand(2, size, generator=source, dtype=torch.float64)
        noise = torch.randn(size, self.dimensions, generator=source, dtype=torch.float64)
        region = torch.where(kind < self.ambiguous, AMBIGUOUS, torch.where(kind < self.ambiguous + self.informative, INFORMATIVE, EASY))
        if easy:
            region = torch.full_like(region, EASY)
        around = torch.stack([centres[y], inner[y, sub], (centres[y] + centres[other]) / 2])[region, torch.arange(size)]
        wrong = (y + torch.randint(1, self.classes, (size,), generator=source)) % self.classes
        named = torch.where(right < torch.tensor(RIGHT, dtype=torch.float64)[region], y, wrong)
        said = torch.full((size, self.classes), math.log((1 - SURE) / (self.classes - 1)))
        return y, around + noise, region, said.scatter_(1, named[:, None], math.log(SURE))
