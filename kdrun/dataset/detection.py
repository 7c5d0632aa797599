"""Images with annotated boxes in the format of COCO (Lin et al., ECCV 2014): a folder of images and a json for each split."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdrun.dataset.augment import Normalise
from kdrun.dataset.base import Data, Split, Storage
from kdrun.dataset.boxes import Box, BoxSplit, Letterbox, padded, within
from kdrun.dataset.decode import Decoder, ImageColumn
from kdrun.dataset.images import check_splits
from kdrun.dataset.select import select
from kdrun.dataset.streamed import Streamed
from kdrun.errors import Problem, Refused

CHANNELS = 3
SMALLEST = 1.0  # pixels of a side: thinner boxes are left out, as in the public code of MMDetection
STAND_IN_BOXES = 7  # an image of COCO has so many on average


@dataclass(frozen=True)
class Annotated:
    """One split as its json tells it: row i is image `files[i]` of `sizes[i]` (width, height) with `boxes[i]`."""

    files: Sequence[Path]
    sizes: np.ndarray  # int64 [N, 2]
    boxes: Sequence[Sequence[Box]]
    class_names: tuple[str, ...]
    where: Path

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class AnnotatedDecoder(Decoder):
    """An image must have the size that its annotations speak of: else all its boxes are wrong."""

    told: Any = field(default=None, repr=False)  # int64 [N, 2] (width, height)

    def __call__(self, cell: Any, row: int, where: str) -> Image.Image:
        image = super().__call__(cell, row, where)
        if image.size != tuple(self.told[row]):
            told = "x".join(map(str, self.told[row]))
            what = f"{Path(cell['path']).name} has {image.width}x{image.height} pixels, its annotations say {told}"
            raise Refused(Problem(what, "dataset.images", where, "the images that the annotations were made for"))
        return image


@dataclass
class DetectionData:
    """A data set of images with boxes, brought to `input_shape` in proportion and streamed by workers.

    The folder is `path`, or the one called `name` in the folder that the environment variable KDRUN_DATA names; `images` (a folder)
    and `annotations` (a json) lie in it, where {split} stands for the split's name in the files. Classes are the categories of the
    json by rising id. `drop_empty` leaves training images without a box to learn from out.
    """

    name: str
    input_shape: list[int]
    mean: list[float]
    std: list[float]
    classes: int | None = None
    path: str | None = None
    images: str = "{split}2017"
    annotations: str = "annotations/instances_{split}2017.json"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "val"})
    drop_empty: bool = True
    flip: float = 0.5
    workers: int = 4
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    sizes: dict[str, int] | None = None  # rows of the published splits, so that a run can be planned where the data are not

    def __post_init__(self) -> None:
        check_splits(self.splits, self.validation)
        if len(self.input_shape) != 3 or self.input_shape[0] != CHANNELS or min(self.input_shape) < 1:
            raise ValueError(f"input_shape={self.input_shape} is [{CHANNELS}, height, width]")
        if len(self.mean) != CHANNELS or len(self.std) != CHANNELS or min(self.std) <= 0:
            raise ValueError(f"std={self.std}: {CHANNELS} numbers above 0, beside as many of mean={self.mean}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} is a probability")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0")

    def load(self) -> Data:
        """Read the annotations.

        Raises:
            Refused: a folder, json or image that is missing, annotations that contradict themselves or each other, boxes outside.
        """
        folder = self._folder()
        read = {split: self._read(folder, theirs, split == "train") for split, theirs in self.splits.items()}
        names = read["train"].class_names
        for part in read.values():
            if part.class_names != names:
                what = f"{len(part.class_names)} categories, other than the {len(names)} of the training split"
                raise Refused(Problem(what, "dataset.annotations", str(part.where), "annotations with the same categories"))
        if self.classes not in (None, len(names)):
            what = f"{self.classes} classes are configured, {read['train'].where.name} has {len(names)} categories"
            raise Refused(Problem(what, "dataset.classes", str(read["train"].where), f"dataset.classes={len(names)}"))
        unlabelled = {split: torch.zeros(len(part), dtype=torch.int64) for split, part in read.items()}  # a row has no class of its own
        height, width = self.input_shape[1:]
        transform = Letterbox(Normalise(tuple(self.mean), tuple(self.std)), (height, width), self.flip)
        rows = {split: self._rows(part) for split, part in read.items()}
        splits = {}
        for split, chosen in select(unlabelled, self.validation, self.subset, self.subset_test).items():
            theirs = read[chosen.table]
            cells = [{"image": {"bytes": None, "path": str(file)}} for file in theirs.files]
            images = ImageColumn(cells, "image", str(theirs.where), ())
            storage = Streamed(images, chosen.rows, AnnotatedDecoder(CHANNELS, True, told=theirs.sizes), transform, self.workers)
            own = {name: values[chosen.rows] for name, values in rows[chosen.table].items()}
            splits[split] = BoxSplit.of(storage, chosen.ids, own, self.flip, width)
        total = sum(len(part) for part in read.values())
        return Data(self.name, names, (CHANNELS, height, width), tuple(self.mean), tuple(self.std), splits, total)

    @staticmethod
    def stand_in(storage: Storage, ids: Tensor, shape: Sequence[int], classes: int) -> Split:
        """Rows of the right form without their content, to plan with: every image has the same boxes."""
        count = len(ids)
        corners = torch.tensor([0.1, 0.1, 0.4, 0.4]) * torch.tensor([shape[2], shape[1], shape[2], shape[1]])
        rows = padded([[Box((0.0, 0.0, 1.0, 1.0), i % classes, 1.0) for i in range(STAND_IN_BOXES)]], torch.ones(1, 2))
        rows["boxes"] = corners.expand(1, STAND_IN_BOXES, 4)
        return BoxSplit.of(storage, ids, {name: value.expand(count, *value.shape[1:]) for name, value in rows.items()}, 0.0, shape[2])

    def _rows(self, part: Annotated) -> dict[str, Tensor]:
        height, width = self.input_shape[1:]
        zoom = torch.from_numpy(within(part.sizes, (height, width)) / part.sizes).float()
        return padded(part.boxes, zoom)

    def _folder(self) -> Path:
        given = self.path or (Path(os.environ["KDRUN_DATA"]) / self.name if os.environ.get("KDRUN_DATA") else None)
        if given is None or not Path(given).expanduser().is_dir():
            what = "no such folder" if given else f"it is not said where {self.name} lies"
            raise Refused(Problem(what, "dataset.path", str(given or ""), self._how_to_get()))
        return Path(given).expanduser()

    def _how_to_get(self) -> str:
        theirs = next(iter(self.splits.values()))
        shown = " and ".join(pattern.format(split=theirs) for pattern in (self.images, self.annotations))
        return (
            f"put {shown} (and the other splits) into a folder: dataset.path=FOLDER\n"
            f"          or that folder, called {self.name}, into the one that KDRUN_DATA names"
        )

    def _read(self, folder: Path, theirs: str, training: bool) -> Annotated:
        file = folder / self.annotations.format(split=theirs)
        if not file.is_file():
            raise Refused(Problem("no such file", "dataset.annotations", str(file), self._how_to_get()))
        try:
            content = json.loads(file.read_bytes())
            names, images, boxes = _parsed(content, file)
        except (ValueError, KeyError, TypeError) as error:
            what = f"no annotations of objects ({type(error).__name__}: {error})"
            remedy = "a json with images, annotations and categories, as of COCO"
            raise Refused(Problem(what, "dataset.annotations", str(file), remedy)) from error
        if training and self.drop_empty:
            images = [image for image in images if any(not box.crowd for box in boxes[image["id"]])]
        if not images:
            remedy = "dataset.drop_empty=false keeps images without a box"
            raise Refused(Problem("not one image to use", "dataset.annotations", str(file), remedy))
        home = folder / self.images.format(split=theirs)
        files = [home / image["file_name"] for image in images]
        if not files[0].is_file():
            raise Refused(Problem(f"no {files[0].name} in it", "dataset.images", str(home), self._how_to_get()))
        sizes = np.array([(image["width"], image["height"]) for image in images])
        return Annotated(files, sizes, [boxes[image["id"]] for image in images], names, file)


def _parsed(content: Mapping[str, Any], file: Path) -> tuple[tuple[str, ...], list[dict[str, Any]], Mapping[int, list[Box]]]:
    """(class names by rising id, images by rising id, boxes by image id) of a json's content. Raises `Refused` for boxes that cannot be."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
    images = sorted(content["images"], key=lambda image: image["id"])
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    boxes: dict[int, list[Box]] = defaultdict(list)
    for told in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
        image, category = told["image_id"], told["category_id"]
        if image not in sizes or category not in labels:
            missing = f"image {image}" if image not in sizes else f"category {category}"
            raise _refused(f"annotation {told['id']} is of {missing}, which is not there", file)
        x, y, width, height = told["bbox"]
        if min(width, height) < 0 or x >= sizes[image][0] or y >= sizes[image][1] or x + width < 0 or y + height < 0:
            raise _refused(f"annotation {told['id']}: the box {told['bbox']} lies outside of its image of {sizes[image]} pixels", file)
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, sizes[image][0]), min(y + height, sizes[image][1])
        if min(x2 - x1, y2 - y1) >= SMALLEST:
            area = told.get("area", width * height)
            boxes[image].append(Box((x1, y1, x2, y2), labels[category], area, bool(told.get("iscrowd", 0))))
    return tuple(category["name"] for category in categories), images, boxes


def _refused(what: str, file: Path) -> Refused:
    remedy = "correct or remove this annotation; bbox is [x, y, width, height] in pixels"
    return Refused(Problem(what, "dataset.annotations", str(file), remedy))
