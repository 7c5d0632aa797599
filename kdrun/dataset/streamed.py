"""Images that do not fit into memory: read, decoded and cropped by workers that load ahead in an order given to them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdrun import rng
from kdrun.dataset.base import Request, Transform
from kdrun.dataset.decode import Decoder, ImageColumn
from kdrun.errors import Problem, Refused

DIGEST_ROWS = 64  # rows whose bytes enter the fingerprint, evenly spaced


@dataclass(eq=False)
class Streamed:
    """A split whose rows stay in their files."""

    images: ImageColumn
    rows: Tensor  # int64 [N] rows of the files, in the order of the split
    decoder: Decoder
    transform: Transform
    workers: int = 4  # processes; 0: in this one, without loading ahead
    prefetches: bool = field(default=True, init=False)

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        items = _Items(self)
        return self._finish(_collate([items[item] for item in self._items(request)]), request, device)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        """Requests may be endless: workers take them as they go."""
        ahead: deque[Request] = deque()

        def batches() -> Iterator[list[tuple[int, int | None]]]:
            for request in requests:
                ahead.append(request)
                yield self._items(request)

        loader = DataLoader(
            _Items(self),
            batch_sampler=batches(),
            num_workers=min(self.workers, os.cpu_count() or 1),  # more would only wait for each other; no row depends on it
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global stream
        )
        for images in loader:
            request = ahead.popleft()  # the loader keeps the order
            yield request, self._finish(images, request, device)

    def digest(self, into: Any) -> None:
        into.update(f"{self.transform!r} {self.decoder!r}".encode())
        into.update(self.rows.contiguous().numpy().data)
        for position in np.linspace(0, len(self.rows) - 1, min(DIGEST_ROWS, len(self.rows))).astype(int):
            into.update(_bytes_of(self.images.cell(int(self.rows[position]))))

    def _items(self, request: Request) -> list[tuple[int, int | None]]:
        """(row, key of its draws) for every row of a request; no key: as evaluated."""
        rows = self.rows[request.positions].tolist()
        if not request.augment:
            return [(row, None) for row in rows]
        return list(zip(rows, rng.bits(rng.key(request.seed, "augment"), request.view, request.ids).tolist(), strict=True))

    def _finish(self, images: Tensor | Problem, request: Request, device: torch.device) -> Tensor:
        if isinstance(images, Problem):
            raise Refused(images)
        return self.transform.batch(images.to(device, non_blocking=True), request)


class _Items(Dataset):
    """What runs in a worker: (row, key) to uint8 [C, H, W]. A fault is handed back as a value: an exception would lose its fields."""

    def __init__(self, storage: Streamed) -> None:
        self.images, self.decoder, self.transform = storage.images, storage.decoder, storage.transform

    def __getitem__(self, item: tuple[int, int | None]) -> Tensor | Problem:
        row, key = item
        try:
            image = self.decoder(self.images.cell(row), row, self.images.where)
        except Refused as refused:
            return refused.problems[0]
        return _to_tensor(self.transform.sample(image, key))


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).contiguous()


def _collate(items: list[Tensor | Problem]) -> Tensor | Problem:
    fault = next((item for item in items if isinstance(item, Problem)), None)
    return fault if fault is not None else torch.stack([item for item in items if isinstance(item, Tensor)])


def _bytes_of(cell: Any) -> bytes:
    if isinstance(cell, np.ndarray):
        return cell.tobytes()
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    with open(cell["path"], "rb") as file:
        return file.read()
