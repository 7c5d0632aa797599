"""Image augmentation whose every draw is a function of (seed, view, sample id).

`PadCropFlip` and `Rotate` are batched tensor code on uint8 images, on whatever device they lie; `ResizedCropFlip` runs torchvision's
transforms image by image in the workers. All end in torchvision's ToTensor and Normalize, to the last bit. `Augmented` puts what changes
colours and erases around one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun import rng
from kdrun.dataset.base import Request
from kdrun.dataset.colour import lighting
from kdrun.dataset.erase import Erase

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Normalise:
    """uint8 [B, C, H, W] to float32 (x / 255 - mean) / std, in torchvision's order of operations."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    # The constants, kept on each device: a copy from the host in every step would stall an accelerator.
    _constants: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, images: Tensor) -> Tensor:
        if images.device not in self._constants:
            mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
            self._constants[images.device] = mean, std
        mean, std = self._constants[images.device]
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class PadCropFlip:
    """Zero padding, a random crop of the old size, a horizontal flip: torchvision's RandomCrop(size, padding) and
    RandomHorizontalFlip, with black pixels as padding (before normalisation). Padding 0 and flip 0 leave the image.
    """

    normalise: Normalise
    padding: int = 0  # pixels on every side
    flip: float = 0.0  # probability

    by_image: ClassVar[bool] = False

    @property
    def random(self) -> bool:
        return bool(self.padding or self.flip)

    def sample(self, image: Any, key: int | None) -> Any:
        return image

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        return self.normalise(self.place(inputs, request))

    def place(self, inputs: Tensor, request: Request) -> Tensor:
        if not request.augment or not self.random:
            return inputs
        corner, mirrored = (d.to(inputs.device, non_blocking=True) for d in self.draws(request))
        return crop_flip(inputs, corner, mirrored, self.padding)

    def draws(self, request: Request) -> tuple[Tensor, Tensor]:
        """Where each crop begins in the padded image, (top, left) int64 [B, 2] in [0, 2 * padding]; which are mirrored, bool [B].

        Drawn on the CPU, where the ids lie: one small copy to an accelerator is cheaper than many small kernels there.
        """
        u = rng.uniform(rng.key(request.seed, "crop and flip"), request.view[:, None], request.ids[:, None], torch.arange(3))
        return (u[:, :2].double() * (2 * self.padding + 1)).long(), u[:, 2] < self.flip


def crop_flip(images: Tensor, corner: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Zero-pad images [B, C, H, W], crop the old size at `corner` [B, 2] = (top, left), mirror those marked in `mirrored` [B].

    One gather from the padded images does both: a mirrored crop reads its columns from right to left.
    """
    B, C, H, W = images.shape
    columns = torch.arange(W, device=images.device)
    columns = torch.where(mirrored[:, None], W - 1 - columns, columns) + corner[:, 1:]  # [B, W]
    rows = torch.arange(H, device=images.device) + corner[:, :1]  # [B, H]
    pixels = (rows[:, :, None] * (W + 2 * padding) + columns[:, None, :]).view(B, 1, H * W)
    padded = F.pad(images, [padding] * 4).view(B, C, -1)
    return padded.gather(2, pixels.expand(-1, C, -1)).view(B, C, H, W)


@dataclass(frozen=True)
class Rotate:
    """torchvision's RandomRotation(degrees) before another transform: about the centre, the nearest pixel, black corners."""

    then: PadCropFlip
    degrees: float  # of rotation at most, either way
    by_image: ClassVar[bool] = False

    @property
    def normalise(self) -> Normalise:
        return self.then.normalise

    def sample(self, image: Any, key: int | None) -> Any:
        return self.then.sample(image, key)

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        return self.normalise(self.place(inputs, request))

    def place(self, inputs: Tensor, request: Request) -> Tensor:
        if request.augment:
            inputs = rotate(inputs, self.draws(request).to(inputs.device, non_blocking=True))
        return self.then.place(inputs, request)

    def draws(self, request: Request) -> Tensor:
        """The angle of every image in degrees, float32 [B], uniform in [-degrees, degrees)."""
        return self.degrees * (2 * rng.uniform(rng.key(request.seed, "rotate"), request.view, request.ids) - 1)


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Turn images [B, C, H, W] counter-clockwise about their centres by `angles` [B] in degrees; what comes from outside is 0."""
    H, W = images.shape[2:]
    cos, sin = torch.cos(angles.deg2rad()), torch.sin(angles.deg2rad())
    none = torch.zeros_like(cos)
    # From a place in the result to one in the image, both from -1 to 1 over each side.
    back = torch.stack([torch.stack([cos, -sin * H / W, none], 1), torch.stack([sin * W / H, cos, none], 1)], 1)
    grid = F.affine_grid(back, list(images.shape), align_corners=False)
    return F.grid_sample(images.to(grid.dtype), grid, mode="nearest", align_corners=False).to(images.dtype)


@dataclass(frozen=True)
class ResizedCropFlip:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip in training; Resize of the shorter side and CenterCrop in evaluation."""

    normalise: Normalise
    size: tuple[int, int]  # (H, W) that the models see
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    interpolation: Interpolation = "bilinear"
    flip: float = 0.5
    eval_resize: int = 256  # shorter side before the centre crop
    eval_interpolation: Interpolation = "bilinear"
    by_image: ClassVar[bool] = True

    def sample(self, image: Any, key: int | None) -> Any:
        from torchvision.transforms import CenterCrop, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, Resize

        if key is None:
            return CenterCrop(self.size)(Resize(self.eval_resize, InterpolationMode(self.eval_interpolation))(image))
        with local_rng(key):
            image = RandomResizedCrop(self.size, self.scale, self.ratio, InterpolationMode(self.interpolation))(image)
            return RandomHorizontalFlip(self.flip)(image)

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        return self.normalise(inputs)

    def place(self, inputs: Tensor, request: Request) -> Tensor:
        return inputs


class Crop(Protocol):
    """A transform that only moves pixels before it normalises them."""

    by_image: ClassVar[bool]  # whether `sample` moves them, in the workers; else `place` does, on the device

    @property
    def normalise(self) -> Normalise: ...
    def sample(self, image: Any, key: int | None) -> Any: ...
    def batch(self, inputs: Tensor, request: Request) -> Tensor: ...
    def place(self, inputs: Tensor, request: Request) -> Tensor:
        """uint8 [B, C, H, W] -> the same."""


class Recolour(Protocol):
    """What changes the colours of uint8 images: one PIL image by the global generators, or a batch by counters."""

    def sample(self, image: Any) -> Any: ...
    def batch(self, images: Tensor, request: Request) -> Tensor: ...


@dataclass(frozen=True)
class Augmented:
    """A crop, then changes of colour one after the other, then the lighting of AlexNet, the normalisation and random erasing: the order of
    torchvision's reference training, and for the lighting that of the public ResNet code."""

    crop: Crop
    recolours: tuple[Recolour, ...] = ()
    lighting: float = 0.0  # standard deviation
    erase: Erase | None = None
    random: ClassVar[bool] = True

    def sample(self, image: Any, key: int | None) -> Any:
        image = self.crop.sample(image, key)
        if key is None or not self.crop.by_image:
            return image
        with local_rng(rng.key(key, "colours")):  # so that the crop is the same with and without
            for recolour in self.recolours:
                image = recolour.sample(image)
        return image

    def batch(self, inputs: Tensor, request: Request) -> Tensor:
        if not request.augment:
            return self.crop.batch(inputs, request)
        inputs = self.crop.place(inputs, request)
        for recolour in () if self.crop.by_image else self.recolours:
            inputs = recolour.batch(inputs, request)
        inputs = self.crop.normalise(inputs)
        if self.lighting:
            added = lighting(request, self.lighting) / torch.tensor(self.crop.normalise.std)
            inputs += added.to(inputs.device, non_blocking=True)[:, :, None, None]
        return inputs if self.erase is None else self.erase(inputs, request)


@contextmanager
def local_rng(key: int) -> Iterator[None]:
    """Library code inside draws from the stream of `key`; the global generators are as before afterwards."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)  # not torch.manual_seed, which would also reset the accelerators
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
