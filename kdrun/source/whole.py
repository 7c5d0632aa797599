"""The source for data that is one graph: every optimiser step sees all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.types import Batch


@dataclass(frozen=True)
class Whole:
    """Full-batch training: an epoch is one step. `open` gives the source of one training stage."""

    def open(
        self,
        data: Data,
        split: str = "train",
        *,
        seed: int,
        micro_batch: int | Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> WholeGraph:
        """The graph, the same on every rank: sums and counts both add up over ranks, so their ratio stays that of one.

        Raises:
            Refused: data that is no graph, or a graph that is to be cut into micro-batches.
        """
        if not data.whole:
            remedy = f"source=loader source.batch_size={len(data.split(split))}"
            raise Refused(Problem(f"{data.name} is no graph: its rows are samples of their own", "source", data.name, remedy))
        if micro_batch is not None:
            what = f"{data.name} is one graph and cannot be cut into micro-batches"
            raise Refused(Problem(what, "hardware.micro_batch", data.name, "hardware.micro_batch=null"))
        return WholeGraph(data, split, torch.device(device))


@dataclass(eq=False)
class WholeGraph:
    """Implements `kdrun.types.Source`. Stateless: every step has the same batch, the very same tensors."""

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

    def feedback(self, ids: Tensor, scores: Tensor) -> None:
        """This source does not select."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"the source of a whole graph has no state but was given {sorted(state)}")
