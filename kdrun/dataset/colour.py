"""Random changes of colour whose every draw is a function of (seed, view, sample id): jitter, and the lighting of AlexNet.

The functions take one factor for each image and give what torchvision's give image by image: grey levels are cut off, not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Request

# Principal components of the pixels of ImageNet's training images on the scale [0, 1]: Krizhevsky et al. (NIPS 2012, Sec. 4.1) name the
# method, these numbers are those of the public ResNet code (facebookarchive/fb.resnet.torch, datasets/imagenet.lua).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))  # one column each; rows are R, G, B


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Times the factor: 0 is black, 1 the image.  uint8 [B, C, H, W], float32 [B] -> uint8 [B, C, H, W]."""
    return images.mul(_wide(factors)).clamp_(0, 255).to(torch.uint8)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Away from the mean of the grey image: 0 is that mean, 1 the image.  uint8 [B, C, H, W], float32 [B] -> uint8 [B, C, H, W]."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Away from the grey image: 0 is grey, 1 the image. Images of one channel stay.  uint8 [B, C, H, W], float32 [B] -> uint8."""
    return images if images.shape[1] == 1 else _blend(images, _grey(images), factors)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour circle by so many of its rounds. Images of one channel stay.  uint8 [B, C, H, W], float32 [B] -> uint8."""
    if images.shape[1] == 1:
        return images
    rgb = images.float().div_(255)
    low, value = torch.aminmax(rgb, dim=1)
    spread = value - low
    r, g, b = ((value[:, None] - rgb) / torch.where(spread == 0, 1, spread)[:, None]).unbind(1)
    sector = torch.where(value == rgb[:, 0], b - g, torch.where(value == rgb[:, 1], 2 + r - b, 4 + g - r))  # of six
    sector = sector + 6 * turns.view(-1, 1, 1)
    # Smith (SIGGRAPH 1978) without cases: each channel is the value less a trapezoid of the sector, moved by 5, 3 and 1 sectors.
    channels = []
    for moved in (5, 3, 1):
        k = (sector + moved).remainder(6)
        channels.append(value - spread * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1).mul_(255 + 1 - 1e-3).clamp_(0, 255).to(torch.uint8)  # torchvision's way back to whole numbers


def _grey(images: Tensor) -> Tensor:
    """float32 [B, 1, H, W], whole numbers."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    return rgb_to_grayscale(images.float()).floor_()


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    share = _wide(factors)
    return images.mul(share).add_(other * (1 - share)).clamp_(0, 255).to(torch.uint8)


def _wide(factors: Tensor) -> Tensor:
    return factors.view(-1, 1, 1, 1)


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: the four changes in random order, each by a factor from [max(0, 1 - amount), 1 + amount]; of the hue a
    share of a turn from [-amount, amount]."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @property
    def amounts(self) -> tuple[float, ...]:
        return self.brightness, self.contrast, self.saturation, self.hue

    def sample(self, image: Any) -> Any:
        """One PIL image, by the global generators."""
        from torchvision.transforms import ColorJitter as Library

        return Library(*self.amounts)(image)

    def batch(self, images: Tensor, request: Request) -> Tensor:
        """uint8 [B, C, H, W] -> the same."""
        order, factors = self.draws(request)
        images = images.clone()
        for place in range(len(CHANGES)):
            for which, change in enumerate(CHANGES):
                rows = (order[:, place] == which).nonzero().flatten()
                if len(rows) and self.amounts[which]:
                    there, by = (t.to(images.device, non_blocking=True) for t in (rows, factors[rows, which]))
                    images[there] = change(images[there], by)
        return images

    def draws(self, request: Request) -> tuple[Tensor, Tensor]:
        """Which change comes first, second, ..., a permutation int64 [B, 4] of CHANGES; the factor of each, float32 [B, 4]."""
        each, rows = torch.arange(len(CHANGES)), (request.view[:, None], request.ids[:, None])
        order = rng.bits(rng.key(request.seed, "order of colour jitter"), *rows, each).argsort(1)
        u = rng.uniform(rng.key(request.seed, "colour jitter"), *rows, each)
        low = torch.tensor([*(max(0.0, 1 - a) for a in self.amounts[:3]), -self.hue])
        high = torch.tensor([*(1 + a for a in self.amounts[:3]), self.hue])
        return order, low + (high - low) * u


def lighting(request: Request, std: float) -> Tensor:
    """What is added to the channels of each image on the scale [0, 1]: float32 [B, 3], along the principal components of ImageNet's
    pixels, by their eigenvalues times draws from N(0, std^2) (Krizhevsky et al., NIPS 2012, Sec. 4.1)."""
    drawn = std * rng.normal(rng.key(request.seed, "lighting"), (len(EIGENVALUES),), request.view, request.ids)
    # Not a matrix product, whose last bit may depend on the number of rows.
    return (drawn[:, None] * torch.tensor(EIGENVALUES) * torch.tensor(EIGENVECTORS)).sum(2)
