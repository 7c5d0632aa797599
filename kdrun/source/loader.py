"""The plain source: every epoch a fresh permutation of a split, cut into optimiser steps, ranks and micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.source.base import Place, Spec, Stateless
from kdrun.types import Batch


@dataclass(frozen=True)
class Loader(Spec):
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

    def stream(self, data: Data, split: str, place: Place) -> EpochLoader:
        """Raises `Refused` for a step that gives a rank no sample, no step at all, sizes that do not add up."""
        return EpochLoader(self, data, split, place)


@dataclass(eq=False)
class EpochLoader(Stateless):
    """Implements `kdrun.types.Source`: a step's batches are a function of (seed, step)."""

    spec: Loader
    data: Data
    split: str
    place: Place
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
        self.place.check(batch, self.data.name)
        tail, world = rows % batch, self.place.world
        if not self.spec.drop_last and 0 < tail < world:
            what = f"the last batch of an epoch has {tail} samples, fewer than the {world} ranks"
            raise Refused(Problem(what, "source.drop_last", self.data.name, "source.drop_last=true"))
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
        drawn = rng.permutation(rng.key(self.place.seed, "held out"), rows, step)[: self.spec.held_out]
        mine = drawn.tensor_split(self.place.world)[self.place.rank]
        held = self.data.rows("validation", mine, torch.zeros_like(mine), self.place.seed, False, self.place.device)
        return batch._replace(extra={**batch.extra, "held_out_inputs": held.inputs, "held_out_targets": held.targets})

    def _batches(self, step: int) -> list[Batch]:
        pieces, seed, device = self.pieces(step), self.place.seed, self.place.device
        if not self.data.split(self.split).storage.prefetches:
            return [self.data.rows(self.split, index, view, seed, self.spec.augment, device) for index, view in pieces]
        if self._ahead is None or self._ahead[0] != step:
            plan = (piece for s in itertools.count(step) for piece in self.pieces(s))
            self._ahead = step, self.data.stream(self.split, plan, seed, self.spec.augment, device)
        batches = self._ahead[1]
        self._ahead = step + 1, batches
        return [next(batches) for _ in pieces]

    def pieces(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """(positions, views) of the micro-batches of a step on this rank."""
        epoch, at = divmod(step, self.steps_per_epoch)
        whole = self._epoch_order(epoch)[at * self.spec.batch_size : (at + 1) * self.spec.batch_size]
        view = epoch if self.spec.views is None else epoch % self.spec.views
        return [(index, torch.full_like(index, view)) for index in self.place.mine(whole)]

    def size(self, step: int) -> int:
        """Samples of a step, over all ranks."""
        rows, at = len(self.data.split(self.split)), step % self.steps_per_epoch
        return min(self.spec.batch_size, rows - at * self.spec.batch_size)

    def largest_share(self, step: int) -> int:
        """Samples of the best-served rank in a step."""
        return -(-self.size(step) // self.place.world)

    def _epoch_order(self, epoch: int) -> Tensor:
        """The order of the rows in an epoch, int64 [N]; the last one is kept, since many steps ask for it."""
        if self._order is None or self._order[0] != epoch:
            rows = len(self.data.split(self.split))
            order = rng.permutation(rng.key(self.place.seed, "order"), rows, epoch) if self.spec.shuffle else torch.arange(rows)
            self._order = epoch, order
        return self._order[1]
