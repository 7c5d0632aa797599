"""AutoAugment and RandAugment, whose every draw is a function of (seed, view, sample id).

Image by image they are torchvision's own. Of a batch every operation is applied at once to all images that drew it, with the results that
torchvision's functions have image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset import colour
from kdrun.dataset.base import Request

Learned = Literal["imagenet", "cifar10", "svhn"]
Operation = tuple[str, float]  # its name and magnitude; a sign is part of the magnitude
# The largest magnitude of every operation that has a direction: a slope, a share of the side, degrees, a difference of the factor from 1.
# AutoAugment (Cubuk et al., CVPR 2019, arXiv 1805.09501), Table 6, as torchvision has it: translations are of 150 pixels in 331.
SIGNED = {
    **dict.fromkeys(("ShearX", "ShearY"), 0.3),
    **dict.fromkeys(("TranslateX", "TranslateY"), 150 / 331),
    "Rotate": 30.0,
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
}
LEVELS = 10  # of AutoAugment's magnitudes
RAND_LEVELS = 31  # of RandAugment's (Cubuk et al., NeurIPS 2020, arXiv 1909.13719): 0 to 30
RAND_OPERATIONS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")  # in torchvision's order
FACTORS = {"Brightness": colour.brightness, "Color": colour.saturation, "Contrast": colour.contrast}  # take one for each image


def magnitude(name: str, level: int, levels: int, size: tuple[int, int]) -> float:
    """Of an operation at a level from 0 to levels - 1, without its sign. `size`: (H, W) of the images."""
    if name in SIGNED:
        side = {"TranslateX": size[1], "TranslateY": size[0]}.get(name, 1)
        return float(torch.linspace(0.0, SIGNED[name] * side, levels)[level])
    if name == "Posterize":  # bits that are kept
        return 8 - round(level / ((levels - 1) / 4))
    return float(torch.linspace(255.0, 0.0, levels)[level]) if name == "Solarize" else 0.0


@dataclass(frozen=True)
class AutoAugment:
    """One of the 25 pairs of operations that were learned for a data set, each with its own probability and magnitude."""

    name: Learned

    def sample(self, image: Any) -> Any:
        """One PIL image, by the global generators."""
        return self._library()(image)

    def batch(self, images: Tensor, request: Request) -> Tensor:
        """uint8 [B, C, H, W] -> the same."""
        return apply(images, self.operations(request, (images.shape[2], images.shape[3])))

    def operations(self, request: Request, size: tuple[int, int]) -> list[list[Operation | None]]:
        """What happens to each of B images first and then: two lists of B; None: nothing."""
        pairs, rows = self._library().policies, (request.view[:, None], request.ids[:, None])
        chosen = rng.integers(rng.key(request.seed, "autoaugment pair"), len(pairs), *rows).flatten().tolist()
        u = rng.uniform(rng.key(request.seed, "autoaugment"), *rows, torch.arange(4)).tolist()
        known: dict[tuple[str, int | None], float] = {}

        def operation(row: int, place: int) -> Operation | None:
            name, probability, level = pairs[chosen[row]][place]
            if u[row][place] >= probability:
                return None
            if (name, level) not in known:
                known[name, level] = magnitude(name, level or 0, LEVELS, size)
            sign = -1 if name in SIGNED and u[row][2 + place] < 0.5 else 1
            return name, sign * known[name, level]

        return [[operation(row, place) for row in range(len(chosen))] for place in (0, 1)]

    def _library(self) -> Any:
        from torchvision.transforms import AutoAugment as Library
        from torchvision.transforms import AutoAugmentPolicy

        return Library(AutoAugmentPolicy(self.name))


@dataclass(frozen=True)
class RandAugment:
    """So many operations, each drawn uniformly from all, at one magnitude."""

    num_ops: int = 2
    level: int = 9  # of the magnitude, 0 to RAND_LEVELS - 1

    def sample(self, image: Any) -> Any:
        """One PIL image, by the global generators."""
        from torchvision.transforms import RandAugment as Library

        return Library(self.num_ops, self.level, RAND_LEVELS)(image)

    def batch(self, images: Tensor, request: Request) -> Tensor:
        """uint8 [B, C, H, W] -> the same."""
        return apply(images, self.operations(request, (images.shape[2], images.shape[3])))

    def operations(self, request: Request, size: tuple[int, int]) -> list[list[Operation | None]]:
        """What happens to each of B images first, second, ...: `num_ops` lists of B."""
        rows, each = (request.view[:, None], request.ids[:, None]), torch.arange(self.num_ops)
        drawn = rng.integers(rng.key(request.seed, "randaugment"), len(RAND_OPERATIONS), *rows, each).T.tolist()
        negative = (rng.uniform(rng.key(request.seed, "randaugment sign"), *rows, each) < 0.5).T.tolist()
        known = [magnitude(name, self.level, RAND_LEVELS, size) for name in RAND_OPERATIONS]

        def operation(which: int, minus: bool) -> Operation:
            name = RAND_OPERATIONS[which]
            return name, -known[which] if minus and name in SIGNED else known[which]

        return [[operation(*both) for both in zip(*step, strict=True)] for step in zip(drawn, negative, strict=True)]


def apply(images: Tensor, steps: list[list[Operation | None]]) -> Tensor:
    """One operation of every step to each image, uint8 [B, C, H, W], in a copy."""
    images = images.clone()
    for step in steps:
        for change, rows in _groups(step, images.device):
            images[rows] = change(images[rows])
    return images


def _groups(step: list[Operation | None], device: torch.device) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """What is to be done at once, and to which images, int64 [M]."""
    members: dict[Operation, list[int]] = {}
    for row, drawn in enumerate(step):
        if drawn is not None and drawn[0] != "Identity":
            members.setdefault((drawn[0], 0.0) if drawn[0] in FACTORS else drawn, []).append(row)
    if not members:
        return
    # The rows of all groups in one copy to the device.
    order = [row for rows in members.values() for row in rows]
    factors = torch.tensor([1 + drawn[1] for row in order if (drawn := step[row]) is not None])
    sizes = [len(rows) for rows in members.values()]
    parts = (t.to(device, non_blocking=True).split(sizes) for t in (torch.tensor(order), factors))
    for (name, by), rows, factor in zip(members, *parts, strict=True):
        if name in FACTORS:
            yield lambda x, name=name, factor=factor: FACTORS[name](x, factor), rows  # type: ignore[misc]
        else:
            yield lambda x, name=name, by=by: operate(x, name, by), rows  # type: ignore[misc]


def operate(images: Tensor, name: str, by: float) -> Tensor:
    """One operation of torchvision's AutoAugment on images [..., C, H, W]; what comes from outside is black."""
    from torchvision.transforms.v2 import functional as TF

    if name in ("ShearX", "ShearY"):
        degrees = math.degrees(math.atan(by))  # torchvision takes an angle, the paper a slope
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        return TF.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    if name in ("TranslateX", "TranslateY"):
        translate = [int(by), 0] if name == "TranslateX" else [0, int(by)]
        return TF.affine(images, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])
    known: dict[str, Callable[[], Tensor]] = {
        "Rotate": lambda: TF.rotate(images, by),
        "Sharpness": lambda: TF.adjust_sharpness(images, 1 + by),
        "Posterize": lambda: TF.posterize(images, int(by)),
        "Solarize": lambda: TF.solarize(images, by),
        "AutoContrast": lambda: TF.autocontrast(images),
        "Equalize": lambda: TF.equalize(images),
        "Invert": lambda: TF.invert(images),
    }
    return known[name]()
