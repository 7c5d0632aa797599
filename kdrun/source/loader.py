"""The plain source: every epoch a fresh permutation of a split, cut into optimiser steps, ranks and micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.types import Batch


@dataclass(frozen=True)
class Loader:
    """How a split is walked through. `open` gives the source of one training stage."""

    batch_size: int = 64
    drop_last: bool = False
    shuffle: bool = True
    augment: bool = True
    views: int | None = None
    held_out: int | None = None

    def __post_init__(self) -> None:
        if self.held_out is not None and self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be at least 1, or null for none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.views is not None and self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1, or null for a new view in every epoch")

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
    ) -> EpochLoader:
        """The batches of one rank.

        Args:
            micro_batch: samples per forward pass at most, or the sizes that the rank's full batch is cut into; None: uncut.

        Raises:
            Refused: a step that gives a rank no sample, no step at all, sizes that do not add up.
        """
        return EpochLoader(self, data, split, seed, micro_batch, rank, world, torch.device(device))


@dataclass(eq=False)
class EpochLoader:
    """Implements `kdrun.types.Source`. Stateless: a step's batches are a function of (seed, step), so a resume needs nothing."""

    spec: Loader
    data: Data
    split: str
    seed: int
    micro_batch: int | Sequence[int] | None
    rank: int
    world: int
    device: torch.device
    steps_per_epoch: int = field(init=False)
    # Memory of the work in progress, never of a decision: forgetting it changes no batch.
    _order: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)
    _ahead: tuple[int, Iterator[Batch]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        rows, batch = len(self.data.split(self.split)), self.spec.batch_size
        self.steps_per_epoch = rows // batch if self.spec.drop_last else -(-rows // batch)
        if self.steps_per_epoch == 0:
            remedy = f"source.batch_size={rows} at most, or source.drop_last=false"
            raise Refused(Problem(f"{rows} rows make no batch of {batch}", "source.drop_last", self.data.name, remedy))
        if batch < self.world:
            what = f"a batch of {batch} leaves some of {self.world} ranks without a sample"
            raise Refused(Problem(what, "source.batch_size", self.data.name, f"source.batch_size={self.world} at least"))
        tail = rows % batch
        if not self.spec.drop_last and 0 < tail < self.world:
            what = f"the last batch of an epoch has {tail} samples, fewer than the {self.world} ranks"
            raise Refused(Problem(what, "source.drop_last", self.data.name, "source.drop_last=true"))
        check_micro_batch(self.micro_batch, share(batch, self.rank, self.world), self.rank)
        if self.data.whole:
            what = f"{self.data.name} is one graph and cannot be cut into batches"
            raise Refused(Problem(what, "source", self.data.name, "source=whole"))
        if self.spec.held_out is not None and self.spec.held_out > len(self.data.split("validation")):
            rows = len(self.data.split("validation"))
            what = f"the validation split has {rows} rows"
            raise Refused(Problem(what, "source.held_out", self.data.name, f"source.held_out={rows} at most"))

    def group(self, step: int) -> list[Batch]:
        """The micro-batches of optimiser step `step` (from 0) on this rank."""
        batches = self._batches(step)
        return batches if self.spec.held_out is None else [self._beside(batch, step) for batch in batches]

    def _beside(self, batch: Batch, step: int) -> Batch:
        """The batch with this rank's share of the step's validation rows in extra, evaluated views."""
        rows = len(self.data.split("validation"))
        drawn = rng.permutation(rng.key(self.seed, "held out"), rows, step)[: self.spec.held_out]
        mine = drawn.tensor_split(self.world)[self.rank]
        held = self.data.rows("validation", mine, torch.zeros_like(mine), self.seed, False, self.device)
        return batch._replace(extra={**batch.extra, "held_out_inputs": held.inputs, "held_out_targets": held.targets})

    def _batches(self, step: int) -> list[Batch]:
        pieces = self._pieces(step)
        if not self.data.split(self.split).storage.prefetches:
            return [self.data.rows(self.split, index, view, self.seed, self.spec.augment, self.device) for index, view in pieces]
        if self._ahead is None or self._ahead[0] != step:
            plan = (piece for s in itertools.count(step) for piece in self._pieces(s))
            self._ahead = step, self.data.stream(self.split, plan, self.seed, self.spec.augment, self.device)
        batches = self._ahead[1]
        self._ahead = step + 1, batches
        return [next(batches) for _ in pieces]

    def _pieces(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """(positions, views) of the micro-batches of a step on this rank."""
        epoch, at = divmod(step, self.steps_per_epoch)
        whole = self._epoch_order(epoch)[at * self.spec.batch_size : (at + 1) * self.spec.batch_size]
        mine = whole.tensor_split(self.world)[self.rank]
        view = epoch if self.spec.views is None else epoch % self.spec.views
        largest = share(len(whole), 0, self.world)
        return [(index, torch.full_like(index, view)) for index in mine.split(cut(len(mine), largest, self.micro_batch))]

    def _epoch_order(self, epoch: int) -> Tensor:
        """The order of the rows in an epoch, int64 [N]; the last one is kept, since many steps ask for it."""
        if self._order is None or self._order[0] != epoch:
            rows = len(self.data.split(self.split))
            order = rng.permutation(rng.key(self.seed, "order"), rows, epoch) if self.spec.shuffle else torch.arange(rows)
            self._order = epoch, order
        return self._order[1]

    def feedback(self, ids: Tensor, scores: Tensor) -> None:
        """This source does not select."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"a plain loader has no state but was given {sorted(state)}")


def check_micro_batch(micro_batch: int | Sequence[int] | None, full: int, rank: int) -> None:
    """Raise `Refused` for sizes that cannot cut a rank's full batch of `full` samples."""
    sizes = [micro_batch] if isinstance(micro_batch, int) else list(micro_batch or [full])
    if min(sizes) < 1:
        remedy = "hardware.micro_batch=null for the whole batch"
        raise Refused(Problem(f"micro-batches of {sizes} samples", "hardware.micro_batch", "", remedy))
    if not isinstance(micro_batch, int) and sum(sizes) != full:
        what = f"sizes {sizes} add up to {sum(sizes)}; rank {rank} has {full} samples of each batch"
        raise Refused(Problem(what, "hardware.micro_batch", "", "make them add up, or give one number"))


def share(count: int, rank: int, world: int) -> int:
    """How many of `count` samples a rank gets: `torch.tensor_split`, so shares differ by one at most, the first ones larger."""
    return count // world + (rank < count % world)


def cut(mine: int, largest: int, micro_batch: int | Sequence[int] | None) -> list[int]:
    """Sizes of the micro-batches of a rank's `mine` samples, where the best-served rank has `largest`.

    One number is an upper bound, and all ranks make the same count of pieces: layers that gather statistics over ranks
    (SyncBatchNorm) would wait for ever on a rank that has one piece less. A list of sizes made for a full batch is scaled
    to a smaller one by rounding its borders. Pieces that come out empty are left out.
    """
    if micro_batch is None:
        return [mine]
    if isinstance(micro_batch, int):
        pieces = -(-largest // micro_batch)
        sizes = [share(mine, piece, pieces) for piece in range(pieces)]
    else:
        borders = [round(border * mine / sum(micro_batch)) for border in itertools.accumulate(micro_batch, initial=0)]
        sizes = [b - a for a, b in itertools.pairwise(borders)]
    return [size for size in sizes if size]
