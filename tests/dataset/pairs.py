"""Small data sets of images and masks on disk, in the layouts of CamVid and Cityscapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.dataset.builders import pictures, png

SIZE = (12, 16)
FOLDERS = {"train": 6, "val": 3, "test": 4}
CITIES = {"train": ["aachen", "ulm"], "val": ["bonn"]}


def mask(image: np.ndarray, ids: list[int]) -> np.ndarray:
    """Class by the red channel: a pixel's label can be read off its image, whatever is done to both."""
    return np.array(ids, np.uint8)[image[..., 0].astype(int) * len(ids) // 256]


def blocks(count: int, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Pictures of 2x2 blocks of one colour each, so that a shift by a pixel shows."""
    return pictures(count, seed, (size[0] // 2, size[1] // 2)).repeat(2, 1).repeat(2, 2)


def write_folders(root: Path) -> Path:
    """The layout of SegNet's CamVid: train/NAME.png beside trainannot/NAME.png; ids 0..10, 11 is void."""
    for seed, (split, count) in enumerate(FOLDERS.items()):
        for name in (split, f"{split}annot"):
            (root / name).mkdir(parents=True)
        for i, image in enumerate(blocks(count, seed)):
            Image.fromarray(image).save(root / split / f"{i:03}.png")
            Image.fromarray(mask(image, list(range(12)))).save(root / f"{split}annot" / f"{i:03}.png")
    return root


def write_packed(root: Path) -> Path:
    """One npz per split: encoded images end to end, offsets, masks."""
    root.mkdir(parents=True)
    for seed, (split, count) in enumerate(FOLDERS.items()):
        images = blocks(count, seed)
        cells = [png(image) for image in images]
        offsets = np.cumsum([0, *map(len, cells)])
        masks = np.stack([mask(image, list(range(12))) for image in images])
        np.savez(root / f"{split}.npz", images=np.frombuffer(b"".join(cells), np.uint8), offsets=offsets, mask=masks)
    return root


def write_cities(root: Path) -> Path:
    """The layout of Cityscapes: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY with ids of its own."""
    ids = [0, 7, 8, 11, 33, 255]
    for split, cities in CITIES.items():
        for seed, city in enumerate(cities):
            for i, image in enumerate(blocks(2, seed)):
                for folder, name, content in (
                    ("leftImg8bit", "leftImg8bit", image),
                    ("gtFine", "gtFine_labelIds", mask(image, ids)),
                    ("gtFine", "gtFine_instanceIds", mask(image, ids)),
                ):
                    file = root / folder / split / city / f"{city}_{i:06}_{name}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(content).save(file)
    return root
