"""A small data set in the layout of COCO: images of several sizes with one bright rectangle for every box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]  # with gaps, as COCO's
SIZES = [(40, 20), (20, 40), (32, 32), (24, 18), (40, 20), (16, 16)]  # width, height
BOXES: list[list[tuple[list[float], int]]] = [  # for each image [x, y, width, height] and category
    [([4, 2, 10, 8], 1), ([20, 10, 12, 8], 90)],
    [([2, 20, 8, 12], 3)],
    [],
    [([0, 0, 24, 18], 1)],
    [([30, 5, 8, 8], 3), ([2, 2, 6, 6], 3), ([12, 4, 10, 12], 1)],
    [([1, 1, 14, 14], 90)],
]


def image(row: int, grey: bool = False) -> Image.Image:
    width, height = SIZES[row]
    pixels = np.full((height, width, 3), 20, np.uint8)
    for (x, y, w, h), _ in BOXES[row]:
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = 230
    return Image.fromarray(pixels).convert("L" if grey else "RGB")


def content(categories: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the json says; image ids are neither dense nor in order."""
    images = [{"id": 100 - 7 * i, "file_name": f"{i:04}.png", "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    annotations = [
        {"id": 10 * i + j, "image_id": 100 - 7 * i, "category_id": category, "bbox": box, "area": box[2] * box[3] * 0.8, "iscrowd": 0}
        for i, boxes in enumerate(BOXES)
        for j, (box, category) in enumerate(boxes)
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES if categories is None else categories}


def write_coco(root: Path, told: dict[str, Any] | None = None, classes: int = len(CATEGORIES)) -> Path:
    """Both splits hold the same images. `classes`: so many categories, those beyond the three without objects."""
    further = [{"id": 100 + i, "name": f"further{i}"} for i in range(classes - len(CATEGORIES))]
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for row in range(len(SIZES)):
            image(row, grey=row == 3).save(root / f"{split}2017" / f"{row:04}.png")
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(told or content([*CATEGORIES, *further])))
    return root
