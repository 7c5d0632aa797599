"""The source for data that is one graph: every optimiser step sees all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.source.base import Place, Spec, Stateless
from kdrun.types import Batch


@dataclass(frozen=True)
class Whole(Spec):
    """Full-batch training: an epoch is one step. `open` gives the source of one training stage."""

    def stream(self, data: Data, split: str, place: Place) -> WholeGraph:
        """The graph, the same on every rank: sums and counts both add up over ranks, so their ratio stays that of one.

        Raises:
            Refused: data that is no graph, or a graph that is to be cut into micro-batches.
        """
        if not data.whole:
            remedy = f"source=loader source.batch_size={len(data.split(split))}"
            raise Refused(Problem(f"{data.name} is no graph: its rows are samples of their own", "source", data.name, remedy))
        if place.micro_batch is not None:
            what = f"{data.name} is one graph and cannot be cut into micro-batches"
            raise Refused(Problem(what, "hardware.micro_batch", data.name, "hardware.micro_batch=null"))
        return WholeGraph(data, split, place.device)


@dataclass(eq=False)
class WholeGraph(Stateless):
    """Implements `kdrun.types.Source`: every step has the same batch, the very same tensors."""

    data: Data
    split: str
    device: torch.device
    steps_per_epoch: int = field(default=1, init=False)
    _batch: Batch | None = field(default=None, init=False, repr=False)

    def group(self, step: int) -> list[Batch]:
        """The one batch."""
        if self._batch is None:
            self._batch = next(self.data.batches(self.split, len(self.data.split(self.split)), self.device))
        return [self._batch]
