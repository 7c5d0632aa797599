"""What every source shares: `open`, the cut of a step's samples into ranks and micro-batches, and having no state."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused


@dataclass(frozen=True)
class Place:
    """Where a stage's batches are made, and by which seed: one rank of several, its micro-batches, its device."""

    seed: int
    micro_batch: int | Sequence[int] | None  # samples per forward pass at most, or the sizes that a full batch is cut into; None: uncut
    rank: int
    world: int
    device: torch.device

    def check(self, batch_size: int, where: str, key: str = "source.batch_size") -> None:
        """Raise `Refused` for a batch that leaves a rank without a sample, and for sizes that do not cut this rank's share of it."""
        if batch_size < self.world:
            what = f"a batch of {batch_size} leaves some of {self.world} ranks without a sample"
            raise Refused(Problem(what, key, where, f"{key}={self.world} at least"))
        full = _share(batch_size, self.rank, self.world)
        sizes = [self.micro_batch] if isinstance(self.micro_batch, int) else list(self.micro_batch or [full])
        if min(sizes) < 1:
            remedy = "hardware.micro_batch=null for the whole batch"
            raise Refused(Problem(f"micro-batches of {sizes} samples", "hardware.micro_batch", "", remedy))
        if not isinstance(self.micro_batch, int) and sum(sizes) != full:
            what = f"sizes {sizes} add up to {sum(sizes)}; rank {self.rank} has {full} samples of each batch"
            raise Refused(Problem(what, "hardware.micro_batch", "", "make them add up, or give one number"))

    def mine(self, step: Tensor) -> tuple[Tensor, ...]:
        """This rank's micro-batches of a step's samples [N]: `torch.tensor_split` over ranks, so shares differ by one at most."""
        own = step.tensor_split(self.world)[self.rank]
        return own.split(self.cut(len(own), _share(len(step), 0, self.world)))

    def cut(self, mine: int, largest: int) -> list[int]:
        """Sizes of the micro-batches of this rank's `mine` rows, where the best-served rank has `largest`."""
        return _cut(mine, largest, self.micro_batch)


class Spec:
    """Base of what conf/source/*.yaml names: the settings of a source, which `open` turns into the source of one training stage."""

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
    ) -> Any:
        """The batches of one rank (`kdrun.types.Source`). Raises `Refused` where the data do not fit the steps or the ranks."""
        return self.stream(data, split, Place(seed, micro_batch, rank, world, torch.device(device)))

    def stream(self, data: Data, split: str, place: Place) -> Any:
        raise NotImplementedError


class Stateless:
    """Part of `kdrun.types.Source`, for streams whose batches are a function of (seed, step): a resume needs nothing."""

    def feedback(self, ids: Tensor, scores: Tensor) -> None:
        """Such a source does not select."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state but was given {sorted(state)}")


def _share(count: int, rank: int, world: int) -> int:
    """How many of `count` samples a rank gets."""
    return count // world + (rank < count % world)


def _cut(mine: int, largest: int, micro_batch: int | Sequence[int] | None) -> list[int]:
    """Sizes of the micro-batches of a rank's `mine` samples, where the best-served rank has `largest`.

    One number is an upper bound, and all ranks make the same count of pieces: layers that gather statistics over ranks
    (SyncBatchNorm) would wait for ever on a rank that has one piece less. A list of sizes made for a full batch is scaled
    to a smaller one by rounding its borders. Pieces that come out empty are left out.
    """
    if micro_batch is None:
        return [mine]
    if isinstance(micro_batch, int):
        pieces = -(-largest // micro_batch)
        sizes = [_share(mine, piece, pieces) for piece in range(pieces)]
    else:
        borders = [round(border * mine / sum(micro_batch)) for border in itertools.accumulate(micro_batch, initial=0)]
        sizes = [b - a for a, b in itertools.pairwise(borders)]
    return [size for size in sizes if size]
