"""Small data sets on disk, in every layout that a user may have."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

CLASSES = ["ant", "bee", "cat"]


def pictures(count: int, seed: int = 0, size: tuple[int, int] = (8, 8), grey: bool = False) -> np.ndarray:
    shape = (count, *size) if grey else (count, *size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(count: int) -> list[int]:
    """Sorted, because that is the order in which a folder of images is read."""
    return sorted(i % len(CLASSES) for i in range(count))


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def hub_table(images: list[bytes], targets: list[int], names: list[str] | None = None, image: str = "img", label: str = "label") -> Any:
    """A table in the schema of the hub's image sets."""
    target = datasets.ClassLabel(names=CLASSES if names is None else names) if names != [] else datasets.Value("int64")
    cells = [{"bytes": b, "path": None} for b in images]
    return datasets.Dataset.from_dict({image: cells, label: targets}, features=datasets.Features({image: datasets.Image(), label: target}))


def splits(train: int = 12, test: int = 6, **kwargs: Any) -> dict[str, tuple[np.ndarray, list[int]]]:
    return {"train": (pictures(train, 1, **kwargs), labels(train)), "test": (pictures(test, 2, **kwargs), labels(test))}


def write_parquet(
    folder: Path, data: dict[str, tuple[np.ndarray, list[int]]] | None = None, pattern: str = "{}.parquet", **kwargs: Any
) -> Path:
    for split, (images, targets) in (data or splits()).items():
        file = folder / pattern.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        hub_table([png(i) for i in images], targets, **kwargs).to_parquet(str(file))
    return folder


def write_folder(folder: Path, data: dict[str, tuple[np.ndarray, list[int]]] | None = None) -> Path:
    for split, (images, targets) in (data or splits()).items():
        for row, (image, target) in enumerate(zip(images, targets, strict=True)):
            file = folder / split / CLASSES[target] / f"{row:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(image))
    return folder


def write_disk(folder: Path) -> Path:
    tables = {split: hub_table([png(i) for i in images], targets) for split, (images, targets) in splits().items()}
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return folder


def write_npz(folder: Path, one_file: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if one_file:
        arrays: dict[str, Any] = {
            f"{name}_{split}": part for split, (x, y) in splits().items() for name, part in (("x", x), ("y", np.array(y)))
        }
        np.savez(folder / "data.npz", **arrays)
    else:
        for split, (x, y) in splits().items():
            np.savez(folder / f"{split}.npz", x=np.moveaxis(x, 3, 1), y=np.array(y))
    return folder
