"""A cache on disk: one folder, a manifest of what it is made of, and two files for every view of the data.

    manifest.json     what it was made of (teacher, data, seed, format, ...) and the configuration that made it
    view-<v>.rows     the records of all samples of the split, in its order, as a memory map; a sparse file that fills up
    view-<v>.check    a checksum for every sample, 0 where it is not there yet

The checksum of a sample is taken over its bytes, its place and its view. A row that was torn by a crash, or that lies where it does not
belong, is therefore never used: it counts as missing, and the teacher is asked again. So several processes may fill one cache, and one that
is killed while it does leaves a cache that can be used.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from kdrun.cache.format import Records
from kdrun.cache.manifest import CHECK, LOCK, ROWS, marks, view_file

OPEN_VIEWS = 2  # memory maps that are kept open
Ints = NDArray[np.int64]


class View(NamedTuple):
    rows: Records  # [items]
    check: NDArray[np.uint32]  # [samples]


class Store:
    """The rows of one split. `counts` [N]: items of every sample."""

    def __init__(self, folder: Path, record: np.dtype[np.void], counts: Ints) -> None:
        self.folder, self.record, self.counts = folder, record, counts
        self.starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
        self._views: OrderedDict[int, View] = OrderedDict()

    def read(self, view: int, places: Ints) -> Records | None:
        """The records of samples `places` [B], one sample after the other; None where one of them is missing or damaged."""
        rows, check = self._open(view)
        records = rows[self.items(places)]
        return records if (self._sums(view, places, records) == check[places]).all() else None

    def write(self, view: int, places: Ints, records: Records) -> None:
        """The records of samples [B], one sample after the other. The checksum comes last: what is torn is missing."""
        rows, check = self._open(view)
        rows[self.items(places)] = records
        check[places] = self._sums(view, places, records)

    def filled(self, view: int) -> NDArray[np.bool_]:
        """Which samples of a view are there, bool [N], by their mark alone; nothing is made."""
        found = marks(self.folder, view)
        return np.zeros(len(self.counts), bool) if found is None else found != 0

    def items(self, places: Ints) -> Ints:
        """Where the items of samples [B] lie in a view."""
        counts = self.counts[places]
        before = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
        return np.repeat(self.starts[places] - before[:-1], counts) + np.arange(before[-1])

    def _sums(self, view: int, places: Ints, records: Records) -> NDArray[np.uint32]:
        ends = self.counts[places].cumsum()
        content = memoryview(np.ascontiguousarray(records).view(np.uint8).data)
        size = self.record.itemsize
        found = []
        for place, begin, end in zip(places.tolist(), (ends - self.counts[places]).tolist(), ends.tolist(), strict=True):
            seed = zlib.crc32(struct.pack("<qq", view, place))
            found.append(zlib.crc32(content[begin * size : end * size], seed) or 1)  # 0 says that a sample is not there
        return np.array(found, np.uint32)

    def _open(self, view: int) -> View:
        if view not in self._views:
            made = View(self._map(view, ROWS, self.record, int(self.starts[-1])), self._map(view, CHECK, np.uint32, len(self.counts)))
            self._views[view] = made
            while len(self._views) > OPEN_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(view)
        return self._views[view]

    def _map(self, view: int, kind: str, dtype: Any, count: int) -> Any:
        file = view_file(self.folder, view, kind)
        size = np.dtype(dtype).itemsize * count
        with FileLock(str(self.folder / LOCK)):
            if not file.is_file() or file.stat().st_size != size:
                with open(file, "ab") as stream:
                    os.ftruncate(stream.fileno(), size)  # holes: nothing is taken before it is written
        return np.memmap(file, dtype, "r+", shape=(count,))


def fields(record: np.dtype[np.void]) -> list[list[Any]]:
    """The layout of a record as plain data: [name, type, shape] of every field."""
    assert record.names is not None
    return [[name, record[name].base.str, list(record[name].shape)] for name in record.names]


def record_of(described: Sequence[Sequence[Any]]) -> np.dtype[np.void]:
    """The layout that `fields` has described."""
    return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in described])
