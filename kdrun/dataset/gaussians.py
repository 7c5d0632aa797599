"""Hierarchical Gaussians: a world of vectors whose true class probabilities are known for every sample.

Classes hang below superclasses in a latent space, samples are drawn around their class, and a fixed two-layer map makes
them non-linear. The Bayes posterior is exact in the latent space, so it serves as an oracle teacher and as the truth that
a student's distribution is compared with. Definition and constants are ours.

    sup_k ~ N(0, BETWEEN^2 I),  sub_c ~ N(0, within^2 I),  mu_c = sup_(c mod S) + sub_c
    u = mu_y + sigma e,  x = 1.5 tanh(u W1) W2 + 0.3 u W3,  log p(c | x) = log softmax_c( -|u - mu_c|^2 / (2 sigma^2) )
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.images import check_splits
from kdrun.dataset.vectors import moments, standardised

LATENT, HIDDEN, OBSERVED = 16, 64, 32  # dimensions of u, of tanh(u W1), of x
BETWEEN = 1.6  # spread of the superclasses
CURVED, STRAIGHT = 1.5, 0.3  # weights of the non-linear and the linear part of x


@dataclass(frozen=True)
class World:
    """What all samples share. float64."""

    means: Tensor  # [C, LATENT]
    w1: Tensor  # [LATENT, HIDDEN]
    w2: Tensor  # [HIDDEN, OBSERVED]
    w3: Tensor  # [LATENT, OBSERVED]

    def observe(self, u: Tensor) -> Tensor:
        """Latent [N, LATENT] to observed [N, OBSERVED]."""
        return CURVED * torch.tanh(u @ self.w1) @ self.w2 + STRAIGHT * u @ self.w3

    def posterior(self, u: Tensor, sigma: float) -> Tensor:
        """Exact Bayes log p(c | u), [N, C]; classes are equally likely."""
        return torch.log_softmax(-torch.cdist(u, self.means).square() / (2 * sigma**2), dim=1)


@dataclass
class GaussianData:
    """Samples of one world, standardised by the training rows.

    Every batch carries in `extra`: "truth_logits" float32 [B, C] (the exact log posterior), "clean_targets" int64 [B],
    and "noisy" bool [B] (the training label was replaced by a uniform class, which may be the true one).
    """

    name: str = "gaussians"
    classes: int = 60
    superclasses: int = 10
    within: float = 0.8
    sigma: float = 0.8
    n_train: int = 3000
    n_test: int = 3000
    noise: float = 0.0
    validation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_splits({"train": "train", "test": "test"}, self.validation)
        for key in ("classes", "superclasses", "n_train", "n_test"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.superclasses > self.classes:
            raise ValueError(f"superclasses={self.superclasses} is more than classes={self.classes}")
        if self.within < 0 or self.sigma <= 0:
            raise ValueError(f"within={self.within} must not be below 0, sigma={self.sigma} must be above 0")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise={self.noise} is a probability")

    def world(self) -> World:
        """The class means and the maps, drawn from the world's seed alone."""
        source = rng.generator(rng.key(self.seed, "gaussians", "world"))

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=source, dtype=torch.float64)

        superclass = BETWEEN * normal(self.superclasses, LATENT)
        own = self.within * normal(self.classes, LATENT)
        means = superclass[torch.arange(self.classes) % self.superclasses] + own
        w1, w2, w3 = (normal(rows, columns) / rows**0.5 for rows, columns in ((LATENT, HIDDEN), (HIDDEN, OBSERVED), (LATENT, OBSERVED)))
        return World(means, w1, w2, w3)

    def load(self) -> Data:
        """Draw the samples. Validation rows are further clean samples beside the training rows, not taken from them."""
        world = self.world()
        sizes = {"train": self.n_train, "test": self.n_test, "validation": round(self.validation * self.n_train)}
        drawn = {part: self._draw(world, part, size) for part, size in sizes.items() if size}
        mean, std = moments(drawn["train"][1])
        splits, first = {}, 0
        for part, (y, x, truth) in drawn.items():
            ids = torch.arange(first, first + len(y))
            first += len(y)
            noisy = rng.uniform(rng.key(self.seed, "label noise"), ids) < (self.noise if part == "train" else 0.0)
            targets = torch.where(noisy, rng.integers(rng.key(self.seed, "noisy label"), self.classes, ids), y)
            extra = {"truth_logits": truth.to(torch.float32), "clean_targets": y, "noisy": noisy}
            splits[part] = Split(Resident(standardised(x, mean, std)), targets, ids, extra)
        names = tuple(f"{c % self.superclasses}.{c // self.superclasses}" for c in range(self.classes))  # superclass.member
        return Data(self.name, names, (OBSERVED,), tuple(mean.tolist()), tuple(std.tolist()), splits, first)

    def _draw(self, world: World, part: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(y [N], x [N, OBSERVED], log posterior [N, C]) of one split."""
        source = rng.generator(rng.key(self.seed, "gaussians", part))
        y = torch.randint(self.classes, (size,), generator=source)
        u = world.means[y] + self.sigma * torch.randn(size, LATENT, generator=source, dtype=torch.float64)
        return y, world.observe(u), world.posterior(u, self.sigma)
