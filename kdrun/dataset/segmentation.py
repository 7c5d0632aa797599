"""Images with a mask of class ids each: files in folders (Cityscapes, CamVid, one's own), or packed in one npz per split."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdrun.dataset.augment import Normalise
from kdrun.dataset.base import Data, Resident, Storage
from kdrun.dataset.decode import DAMAGED, Decoder, ImageColumn
from kdrun.dataset.images import channel_statistics, check_splits
from kdrun.dataset.pixels import VOID, BlankSplit, PixelSplit, ScaleCropFlip
from kdrun.dataset.select import Selection, select
from kdrun.dataset.streamed import Streamed
from kdrun.errors import Problem, Refused

CHANNELS = 3
PACKED = ("images", "offsets", "mask")  # keys of a packed split: encoded images end to end, where each begins, masks [N, H, W]
MASK_MODES = ("L", "P", "I", "I;16", "1")  # Pillow's modes with one number for each pixel

Found = tuple[Sequence[Path | bytes], Any, str, tuple[Path, ...]]  # images, masks, where they lie (for messages), files


@dataclass(frozen=True, eq=False)
class Pairs(ImageColumn):
    """The images and masks of a split, decoded together when asked for. Picklable, so that workers can hold it.

    `cells` are the images (paths or encoded bytes), `masks` their masks (paths, or arrays [H, W]). `classes` [256] turns an id of
    the files into a class or VOID.
    """

    masks: Any = ()
    classes: Any = None
    size: tuple[int, int] | None = None  # (H, W) that all are brought to: the image bilinearly, the mask by its nearest pixel

    def cell(self, row: int) -> np.ndarray:
        """uint8 [H, W, 4]: red, green, blue, class. Raises `Refused` for files that cannot be read or do not belong together."""
        source, mask_source = self.cells[row], self.masks[row]
        image = self._open(source, row).convert("RGB")
        mask = Image.fromarray(mask_source) if isinstance(mask_source, np.ndarray) else self._open(mask_source, row)
        if mask.mode not in MASK_MODES:
            what = f"row {row}: the mask {mask_source} has mode {mask.mode}, where one class id for each pixel is needed"
            raise Refused(Problem(what, "dataset.masks", self.where, "masks of grey or palette images whose values are class ids"))
        if image.size != mask.size:
            what = f"row {row}: an image of {image.height}x{image.width} with a mask of {mask.height}x{mask.width} pixels"
            raise Refused(Problem(what, "dataset.masks", self.where, "check that the patterns pair each image with its own mask"))
        if self.size is not None:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
            mask = mask.resize(self.size[::-1], Image.Resampling.NEAREST)
        ids = np.asarray(mask).astype(np.int64).clip(0, VOID)
        return np.concatenate([np.asarray(image), self.classes[ids][..., None]], -1)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.cell, range(len(self)))

    def _open(self, source: Any, row: int) -> Image.Image:
        try:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            opened.load()
        except DAMAGED as error:
            what = f"row {row}: {source if isinstance(source, Path) else 'its image'} cannot be read ({error})"
            raise Refused(Problem(what, "dataset.path", self.where, "replace or remove this file and its partner")) from error
        return opened


@dataclass(frozen=True)
class PairDecoder(Decoder):
    """Pairs come decoded; only their size is held against what the models see."""

    def __call__(self, cell: Any, row: int, where: str) -> Any:
        if self.size is not None and cell.shape[:2] != self.size:
            what = f"row {row}: {cell.shape[0]}x{cell.shape[1]} pixels, where the others have {self.size[0]}x{self.size[1]}"
            raise Refused(Problem(what, "dataset.resize", where, f"dataset.resize=[{self.size[0]},{self.size[1]}] brings all to one size"))
        return cell


@dataclass
class SegmentationData:
    """A data set of images with a class for every pixel.

    The folder is `path`, or the one called `name` in the folder that the environment variable KDRUN_DATA names. It holds either
    one npz per split, or files that the patterns `images` and `masks` find ({split} stands for the split's name, a * in both for
    the same text). `ids`: the ids in the masks of the classes, in the order of `class_names`; all others mean "no label".
    `input_shape`: channels, height and width of a random crop in training; null: the whole image.
    """

    name: str
    class_names: list[str]
    classes: int | None = None
    path: str | None = None
    images: str = "{split}/*.png"
    masks: str = "{split}annot/*.png"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    ids: list[int] | None = None
    resize: list[int] | None = None
    input_shape: list[int] | None = None
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    flip: float = 0.0
    mean: list[float] | None = None
    std: list[float] | None = None
    resident: bool = True
    workers: int = 4
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    sizes: dict[str, int] | None = None  # rows of the published splits, so that a run can be planned where the data are not

    def __post_init__(self) -> None:
        check_splits(self.splits, self.validation)
        count = len(self.class_names)
        if not 1 <= count < VOID:
            raise ValueError(f"class_names={self.class_names}: the names of 1 to {VOID - 1} classes")
        if self.classes not in (None, count):
            raise ValueError(f"classes={self.classes}: class_names has {count}")
        if self.ids is not None and (len(self.ids) != count or len(set(self.ids)) != count):
            raise ValueError(f"ids={self.ids}: one id for each of the {count} classes, all different")
        if self.ids is not None and not all(0 <= i < VOID for i in self.ids):
            raise ValueError(f"ids={self.ids}: ids of classes lie from 0 to {VOID - 1}")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            raise ValueError(f"resize={self.resize} is [height, width]")
        if self.input_shape is not None and (len(self.input_shape) != 3 or self.input_shape[0] != CHANNELS or min(self.input_shape) < 1):
            raise ValueError(f"input_shape={self.input_shape} is [{CHANNELS}, height, width]")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={self.scale} is two numbers above 0, the smaller first")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} is a probability")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together, or both null: then they are measured on the training rows")
        if not self.resident and (self.mean is None or self.input_shape is None):
            raise ValueError("streamed images (resident=false) need input_shape, mean and std")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0")

    def load(self) -> Data:
        """Read the data.

        Raises:
            Refused: a folder or files that are missing, unreadable, of different sizes, or that do not pair.
        """
        pairs = self._open()
        unlabelled = {table: torch.zeros(len(p), dtype=torch.int64) for table, p in pairs.items()}  # a row has no class of its own
        chosen = select(unlabelled, self.validation, self.subset, self.subset_test)
        pixels = self._pixels(pairs) if self.resident else {}
        transform = ScaleCropFlip(self._normalise(pixels, chosen), self._crop(), (self.scale[0], self.scale[1]), self.flip)
        splits = {}
        for split, part in chosen.items():
            storage: Storage = Streamed(pairs[part.table], part.rows, PairDecoder(CHANNELS + 1), transform, self.workers)
            if self.resident:
                storage = Resident(pixels[part.table][part.rows], transform)
            splits[split] = PixelSplit.of(storage, part.ids)
        shape = tuple(self.input_shape or (CHANNELS, *pixels["train"].shape[2:]))
        mean, std = transform.normalise.mean, transform.normalise.std
        return Data(self.name, tuple(self.class_names), shape, mean, std, splits, sum(len(p) for p in pairs.values()))

    @staticmethod
    def stand_in(storage: Storage, ids: Tensor, shape: Sequence[int], classes: int) -> BlankSplit:
        """Rows of the right form without their content, to plan with."""
        return BlankSplit(storage, torch.zeros(len(ids), dtype=torch.int64), ids)

    def _crop(self) -> tuple[int, int] | None:
        return None if self.input_shape is None else (self.input_shape[1], self.input_shape[2])

    def _pixels(self, pairs: Mapping[str, Pairs]) -> dict[str, Tensor]:
        """All rows of every table, uint8 [N, CHANNELS + 1, H, W], of the size of the first image."""
        height, width = pairs["train"].cell(0).shape[:2]
        return {table: p.pixels(PairDecoder(CHANNELS + 1, size=(height, width))) for table, p in pairs.items()}

    def _normalise(self, pixels: Mapping[str, Tensor], chosen: Mapping[str, Selection]) -> Normalise:
        if self.mean is not None and self.std is not None:
            return Normalise(tuple(self.mean), tuple(self.std))
        return Normalise(*channel_statistics(pixels["train"][chosen["train"].rows][:, :CHANNELS]))

    def _open(self) -> dict[str, Pairs]:
        folder = self._folder()
        lookup = np.full(VOID + 1, VOID, np.uint8)
        lookup[self.ids or range(len(self.class_names))] = np.arange(len(self.class_names))
        size = None if self.resize is None else (self.resize[0], self.resize[1])
        packed = {split: folder / f"{theirs}.npz" for split, theirs in self.splits.items()}
        found: dict[str, Found] = {}
        for split, theirs in self.splits.items():
            is_packed = any(file.is_file() for file in packed.values())
            found[split] = _packed(packed[split]) if is_packed else self._paired(folder, theirs)
        # In the place of a column's name, by which decoded pixels are kept on disk: all that they depend on beside the files.
        read_as = f"masks of {self.ids or len(self.class_names)} at {size}"
        return {split: Pairs(c, read_as, where, sources, m, lookup, size) for split, (c, m, where, sources) in found.items()}

    def _folder(self) -> Path:
        given = self.path or (Path(os.environ["KDRUN_DATA"]) / self.name if os.environ.get("KDRUN_DATA") else None)
        if given is None or not Path(given).expanduser().is_dir():
            what = "no such folder" if given else f"it is not said where {self.name} lies"
            raise Refused(Problem(what, "dataset.path", str(given or ""), self._how_to_get()))
        return Path(given).expanduser()

    def _paired(self, folder: Path, split: str) -> Found:
        """The files of a split, each image with the mask whose name has the same text in the places of the stars."""
        images, masks = (_matches(folder, pattern.format(split=split)) for pattern in (self.images, self.masks))
        where = f"{folder} ({split})"
        for found, pattern, key in ((images, self.images, "images"), (masks, self.masks, "masks")):
            if not found:
                what = f"no file matches {pattern.format(split=split)}"
                raise Refused(Problem(what, f"dataset.{key}", where, self._how_to_get()))
        alone = sorted(images.keys() ^ masks.keys())
        if alone:
            what = f"{len(alone)} images or masks have no partner, the first is {'/'.join(alone[0])}"
            raise Refused(Problem(what, "dataset.masks", where, "add or remove files, or correct dataset.images and dataset.masks"))
        names = sorted(images)
        files = tuple(images[n] for n in names), tuple(masks[n] for n in names)
        return list(files[0]), list(files[1]), where, (*files[0], *files[1])

    def _how_to_get(self) -> str:
        theirs = list(self.splits.values())
        shown = " and ".join(pattern.format(split=theirs[0]) for pattern in (self.images, self.masks))
        npz = ", ".join(f"{split}.npz" for split in theirs)
        return "\n          ".join(
            (
                f"put {shown} (and likewise {', '.join(theirs[1:])}) into a folder: dataset.path=FOLDER",
                f"or {npz} with the arrays {', '.join(PACKED)}",
                f"or that folder, called {self.name}, into the one that KDRUN_DATA names",
            )
        )


def _matches(folder: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """The files below a folder that a pattern of names and stars finds, by what stands in the places of its stars."""
    expression = re.compile("([^/]*)".join(map(re.escape, pattern.split("*"))))
    found = {}
    for file in folder.glob(pattern):
        match = expression.fullmatch(file.relative_to(folder).as_posix())
        if match is not None:
            found[match.groups()] = file
    return found


def _packed(file: Path) -> Found:
    """A split packed in one npz. Raises `Refused` where it is missing or lacks an array."""
    if not file.is_file():
        raise Refused(Problem("no such file", "dataset.path", str(file), "one npz for each split: see dataset.splits"))
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, offsets, masks = (arrays[key] for key in PACKED)
    except (OSError, ValueError, KeyError) as error:
        what = f"not a packed split ({error})"
        raise Refused(Problem(what, "dataset.path", str(file), f"an npz with the arrays {', '.join(PACKED)}")) from error
    cells = [images[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    if len(cells) != len(masks):
        raise Refused(Problem(f"{len(cells)} images and {len(masks)} masks", "dataset.path", str(file), "one mask for each image"))
    return cells, masks, str(file), (file,)
