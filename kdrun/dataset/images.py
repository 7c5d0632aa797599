"""Labelled images: from the hub, parquet, a folder per class, save_to_disk or npz."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kdrun.dataset import labels
from kdrun.dataset.augment import Augmented, Crop, Interpolation, Normalise, PadCropFlip, Recolour, ResizedCropFlip, Rotate
from kdrun.dataset.base import Data, Resident, Split, Storage, Transform
from kdrun.dataset.colour import ColorJitter
from kdrun.dataset.decode import IMAGE_COLUMNS, Decoder, ImageColumn
from kdrun.dataset.erase import Erase
from kdrun.dataset.files import Files, Format, Table, extra_columns, find_column
from kdrun.dataset.mix import Mixing, mixed
from kdrun.dataset.policy import RAND_LEVELS, AutoAugment, Learned, RandAugment
from kdrun.dataset.select import Selection, select
from kdrun.dataset.streamed import Streamed

CHUNK = 4096  # images of which channel statistics are taken at once


@dataclass
class ImageData:
    """A data set of images with one label each.

    `resident` keeps all pixels in memory as one tensor, augmented in batches on the device. Otherwise workers read,
    decode and crop. `crop` is "pad" (zero padding and a random crop of the same size, as on CIFAR) or "resized" (random
    resized crop in training, resize and centre crop in evaluation, as on ImageNet; streamed only).
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    path: str | None = None
    format: Format = "auto"
    access: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    columns: dict[str, str] = field(default_factory=dict)
    classes: int | None = None
    input_shape: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    resident: bool = True
    workers: int = 4
    convert: bool = False
    resize: int | None = None
    crop: Literal["pad", "resized"] = "pad"
    padding: int = 0
    flip: float = 0.0
    rotation: float = 0.0  # degrees at most either way, before padding, crop and flip
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    interpolation: Interpolation = "bilinear"
    eval_resize: int = 256
    eval_interpolation: Interpolation = "bilinear"
    auto_augment: Learned | None = None
    rand_augment: list[int] | None = None  # number of operations, their magnitude
    color_jitter: list[float] | None = None  # brightness, contrast, saturation, hue
    lighting: float = 0.0  # standard deviation
    erasing: float = 0.0  # probability
    erasing_value: Literal["zero", "random"] = "zero"
    mixup: float = 0.0  # alpha of its Beta distribution
    cutmix: float = 0.0
    mix_probability: float = 1.0
    switch_probability: float = 0.5  # to CutMix, where both are on
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    sizes: dict[str, int] | None = None  # rows of the published splits, so that a run can be planned where the data are not

    def __post_init__(self) -> None:
        check_splits(self.splits, self.validation)
        shape = self.input_shape
        if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1):
            raise ValueError(f"input_shape is [channels, height, width] with 1 or 3 channels, not {shape}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together, or both null: then they are measured on the training rows")
        if self.mean is not None and shape is not None and not len(self.mean) == len(self.std or []) == shape[0]:
            raise ValueError(f"mean {self.mean} and std {self.std} need one number for each of the {shape[0]} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}")
        if self.crop == "resized" and self.resident:
            raise ValueError("crop=resized works on streamed images: dataset.resident=false")
        if self.rotation and self.crop == "resized":
            raise ValueError(f"rotation={self.rotation}: works with dataset.crop=pad")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation={self.rotation}: legal range [0, 180] degrees")
        if not self.resident and (shape is None or self.mean is None):
            raise ValueError("streamed images (resident=false) need input_shape, mean and std")
        if shape is not None and self.crop == "resized" and self.eval_resize < max(shape[1:]):
            raise ValueError(f"eval_resize={self.eval_resize} is smaller than the centre crop {shape[1:]}")
        for key, low in (("padding", 0), ("workers", 0), ("resize", 1), ("classes", 1)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ValueError(f"{key}={value} must be at least {low}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} is a probability")
        for key, span in (("scale", self.scale), ("ratio", self.ratio)):
            if len(span) != 2 or not 0 < span[0] <= span[1]:
                raise ValueError(f"{key}={span} is two numbers above 0, the smaller first")
        self._check_colours()

    def _check_colours(self) -> None:
        """Raises ValueError for changes of colour and erasing that cannot be."""
        jitter, rand, channels = self.color_jitter, self.rand_augment, (self.input_shape or [3])[0]
        if jitter is not None and (len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5):
            legal = "[brightness, contrast, saturation, hue], none below 0, the hue up to 0.5, e.g. [0.4, 0.4, 0.4, 0.1]"
            raise ValueError(f"color_jitter={jitter}: legal {legal}")
        if rand is not None and (len(rand) != 2 or rand[0] < 1 or not 0 <= rand[1] < RAND_LEVELS):
            legal = f"[number of operations from 1, magnitude from 0 to {RAND_LEVELS - 1}], e.g. [2, 9]"
            raise ValueError(f"rand_augment={rand}: legal {legal}")
        if rand is not None and self.auto_augment is not None:
            raise ValueError(f"rand_augment={rand}: null beside auto_augment={self.auto_augment}")
        if not 0 <= self.lighting < math.inf:
            raise ValueError(f"lighting={self.lighting}: legal range [0, inf)")
        if self.lighting and channels != 3:
            raise ValueError(f"lighting={self.lighting}: 0 for images of one channel")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"erasing={self.erasing}: a probability from 0 to 1")
        for key in ("mixup", "cutmix"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: legal range [0, inf), 0 for none")
        for key in ("mix_probability", "switch_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)}: a probability from 0 to 1")

    def load(self) -> Data:
        """Read the data.

        Raises:
            Refused: files missing or unreadable, columns, labels, image modes or sizes other than configured.
        """
        tables = self._open()
        label = find_column(tables, self.columns.get("label"), labels.LABEL_COLUMNS, labels.LABEL_KEY)
        targets, class_names = labels.encode(tables, label, self.classes)
        column = find_column(tables, self.columns.get("image"), IMAGE_COLUMNS, "dataset.columns.image")
        images = {split: ImageColumn.of(table, column) for split, table in tables.items()}
        chosen = select(targets, self.validation, self.subset, self.subset_test)
        shape = self._shape(images["train"])
        pixels = {t: images[t].pixels(self._decoder(shape)) for t in tables} if self.resident else {}
        mean, std = self._statistics(pixels, chosen)
        transform = self._transform(shape, Normalise(mean, std))
        # A random resized crop takes images of any size; all others must have the size that the models see.
        decoder = self._decoder(None if self.crop == "resized" else shape)
        extra = {t: extra_columns(table, self.columns, ("image", "label")) for t, table in tables.items()}
        splits = {}
        for name, part in chosen.items():
            further = {k: v[part.rows] for k, v in extra[part.table].items()}
            storage: Storage = Streamed(images[part.table], part.rows, decoder, transform, self.workers)
            if self.resident:
                storage = Resident(pixels[part.table][part.rows], transform)
            splits[name] = Split(storage, targets[part.table][part.rows], part.ids, further)
        if self.mixup or self.cutmix:
            mixing = Mixing(self.mixup, self.cutmix, self.mix_probability, self.switch_probability)
            splits["train"] = mixed(splits["train"], mixing, shape)
        return Data(self.name, class_names, shape, mean, std, splits, sum(len(t) for t in tables.values()))

    def _open(self) -> dict[str, Table]:
        wanted = [self.columns.get("image", "image"), self.columns.get("label", "label")]
        return Files(self.path, self.hub, self.revision, self.format, self.splits, wanted, self.access).open()

    def _shape(self, images: ImageColumn) -> tuple[int, int, int]:
        """(C, H, W) that the models see."""
        if self.input_shape is not None:
            channels, height, width = self.input_shape
            return channels, height, width
        channels, height, width = images.shape()
        return (channels, height, width) if self.resize is None else (channels, self.resize, self.resize)

    def _decoder(self, shape: tuple[int, int, int] | None) -> Decoder:
        """A decoder that asks for this shape; None: for any size."""
        channels = shape[0] if shape else (self.input_shape or [3])[0]
        return Decoder(channels, self.convert, (self.resize, self.resize) if self.resize else None, shape[1:] if shape else None)

    def _transform(self, shape: tuple[int, int, int], normalise: Normalise) -> Transform:
        crop, erase = self._crop(shape, normalise), Erase(self.erasing, self.erasing_value) if self.erasing else None
        recolours: list[Recolour] = [AutoAugment(self.auto_augment)] if self.auto_augment else []
        if self.rand_augment:
            recolours.append(RandAugment(*self.rand_augment))
        if self.color_jitter and any(self.color_jitter):
            recolours.append(ColorJitter(*self.color_jitter))
        # Alone a crop is named as ever: the fingerprint of the data says which transforms they go through.
        return Augmented(crop, tuple(recolours), self.lighting, erase) if recolours or self.lighting or erase else crop

    def _crop(self, shape: tuple[int, int, int], normalise: Normalise) -> Crop:
        if self.crop == "pad":
            cropped = PadCropFlip(normalise, self.padding, self.flip)
            return Rotate(cropped, self.rotation) if self.rotation else cropped
        scale, ratio = (self.scale[0], self.scale[1]), (self.ratio[0], self.ratio[1])
        return ResizedCropFlip(normalise, shape[1:], scale, ratio, self.interpolation, self.flip, self.eval_resize, self.eval_interpolation)

    def _statistics(self, pixels: Mapping[str, Tensor], chosen: Mapping[str, Selection]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.mean is not None and self.std is not None:
            return tuple(self.mean), tuple(self.std)
        return channel_statistics(pixels["train"][chosen["train"].rows])


def check_splits(splits: Mapping[str, str], validation: float) -> None:
    """Raises ValueError for splits that no run can use."""
    missing, unknown = {"train", "test"} - set(splits), set(splits) - {"train", "validation", "test"}
    if missing or unknown:
        raise ValueError(f"splits names train and test, and perhaps validation, each with its name in the files; not {dict(splits)}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation} is a share of the training rows, from 0 to below 1")
    if validation and "validation" in splits:
        raise ValueError(f"the files have a validation split ('{splits['validation']}'): validation=0, or leave it out of splits")


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of uint8 images [N, C, H, W], on the scale [0, 1]. Exact: summed as integers."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in images.split(CHUNK):
        values = chunk.to(torch.int64)
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp_min(0).sqrt()
    return tuple((mean / 255).tolist()), tuple((std.clamp_min(1) / 255).tolist())
