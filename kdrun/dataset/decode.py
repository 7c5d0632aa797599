"""Images out of a table: decoded, checked, and as one uint8 tensor where they all fit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdrun.config.paths import kept
from kdrun.dataset.files import Table
from kdrun.errors import Problem, Refused

IMAGE_COLUMNS = ("image", "img", "images", "x")
# What Pillow raises for a damaged file, by format.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError)
BATCH = 1000  # rows read from the table at once
CACHE_VERSION = 1  # part of a decoded file's name: raise it when decoding changes


@dataclass(frozen=True)
class Decoder:
    """How an encoded image becomes pixels, and what it must be."""

    channels: int  # 1 (grey) or 3 (RGB)
    convert: bool = False  # turn images of another mode into this one; else they are refused
    resize: tuple[int, int] | None = None  # (H, W), bilinear with antialiasing
    size: tuple[int, int] | None = None  # (H, W) that the image must have, after resize; None: any

    @property
    def mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def __call__(self, cell: Any, row: int, where: str) -> Image.Image:
        """Decode one cell: {"bytes", "path"}, or an array [H, W] or [H, W, C].

        Raises:
            Refused: damaged, of another mode, of another size.
        """
        try:
            image = _open(cell)
            image.load()
        except DAMAGED as error:
            raise _damaged(row, where, error) from error
        if image.mode != self.mode:
            if not self.convert:
                remedy = f"dataset.convert=true turns all into {self.mode}, or give dataset.input_shape the channels of the files"
                what = f"row {row}: mode {image.mode}, not {self.mode} ({self.channels} channels)"
                raise Refused(Problem(what, "dataset.input_shape", where, remedy))
            image = image.convert(self.mode)
        if self.resize is not None:
            image = image.resize(self.resize[::-1], Image.Resampling.BILINEAR)
        if self.size is not None and (image.height, image.width) != self.size:
            what = f"row {row}: {image.height}x{image.width} pixels, not {self.size[0]}x{self.size[1]}"
            remedy = f"dataset.resize={self.size[0]} brings all to one size; for photographs dataset.resident=false dataset.crop=resized"
            raise Refused(Problem(what, "dataset.input_shape", where, remedy))
        return image


@dataclass(frozen=True, eq=False)
class ImageColumn:
    """The images of a split, decoded when asked for. Picklable, so that workers can hold it."""

    cells: Any  # datasets.Dataset with undecoded images, or an array [N, H, W] or [N, H, W, C]
    column: str
    where: str
    sources: tuple[Path, ...]

    @staticmethod
    def of(table: Table, column: str) -> ImageColumn:
        import datasets

        if isinstance(table.rows, dict) or not _encoded(table.rows.features[column]):
            return ImageColumn(_pixel_array(table, column), column, table.where, table.sources)
        rows = table.rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return ImageColumn(rows, column, table.where, table.sources)

    def __len__(self) -> int:
        return len(self.cells)

    def cell(self, row: int) -> Any:
        return self.cells[row] if isinstance(self.cells, np.ndarray) else self.cells[row][self.column]

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.cells, np.ndarray):
            yield from self.cells
            return
        for rows in self.cells.with_format("arrow").iter(BATCH):
            yield from rows[self.column].to_pylist()

    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image: one channel for grey images, three for all others."""
        try:
            image = _open(self.cell(0))
        except DAMAGED as error:
            raise _damaged(0, self.where, error) from error
        return (1 if image.mode in ("L", "1") else 3, image.height, image.width)

    def pixels(self, decoder: Decoder) -> Tensor:
        """All images, uint8 [N, C, H, W]; kept decoded on disk, because decoding costs seconds at every start of a run."""
        file = None if isinstance(self.cells, np.ndarray) or not self.sources else _cache_file(self, decoder)
        if file is not None and file.is_file():
            return torch.from_numpy(np.load(file))
        assert decoder.size is not None
        out = np.empty((len(self), *decoder.size, decoder.channels), np.uint8)
        for row, cell in enumerate(self):
            out[row] = np.asarray(decoder(cell, row, self.where)).reshape(out.shape[1:])
        pixels = np.ascontiguousarray(out.transpose(0, 3, 1, 2))
        if file is not None:
            _write(file, pixels)
        return torch.from_numpy(pixels)


def _open(cell: Any) -> Image.Image:
    if isinstance(cell, np.ndarray):
        return Image.fromarray(cell)
    if cell["bytes"] is not None:
        return Image.open(io.BytesIO(cell["bytes"]))
    return Image.open(cell["path"])


def _damaged(row: int, where: str, error: Exception) -> Refused:
    return Refused(Problem(f"row {row}: the image cannot be read ({error})", "dataset.path", where, "replace or remove this row"))


def _encoded(feature: Any) -> bool:
    """Whether a column holds image files: an image feature, bytes, paths or {bytes, path}; otherwise it holds numbers."""
    import datasets

    files = ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, (datasets.Image, dict)) or (isinstance(feature, datasets.Value) and feature.dtype in files)


def _pixel_array(table: Table, column: str) -> np.ndarray:
    """A column of pixel values as uint8 [N, H, W] or [N, H, W, C]; channels may come first."""
    array = table.array(column)
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = np.moveaxis(array, 1, 3)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.dtype.kind in "iu" and array.ndim in (3, 4) and array.min() >= 0 and array.max() <= 255:
        return np.ascontiguousarray(array.astype(np.uint8))
    what = f"column '{column}' holds no images (shape {list(array.shape)}, {array.dtype})"
    remedy = "images are whole numbers from 0 to 255, [N, H, W] or [N, H, W, C]; choose the column with dataset.columns.image=COLUMN"
    raise Refused(Problem(what, "dataset.columns.image", table.where, remedy))


def _cache_file(column: ImageColumn, decoder: Decoder) -> Path:
    """Named by everything that the decoded pixels depend on: the files' size and time of change, the column, the decoder."""
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in column.sources]
    name = hashlib.sha256(repr((CACHE_VERSION, stamps, column.column, len(column), decoder)).encode()).hexdigest()
    return kept() / "pixels" / f"{name[:32]}.npy"


def _write(file: Path, pixels: np.ndarray) -> None:
    """Write whole or not at all; a cache that cannot be written is no reason to stop."""
    part = file.with_name(f"{file.stem}.{os.getpid()}.part.npy")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.save(part, pixels)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
