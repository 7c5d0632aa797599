"""The source of one client of a federation: in every round some batches of its own rows, then some of the shared proxy rows.

A round is an epoch. The proxy rows come with what the other clients said of them (`receive`), by sample id. A client is never shared
over ranks: a rank has it whole, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import RunFailed
from kdrun.objective.edgefd import COVERED, TARGETS
from kdrun.source.base import Place, Spec, Stateless
from kdrun.source.loader import EpochLoader, Loader
from kdrun.types import Batch

PROXY = "proxy"  # the split of a client's data that all clients share


@dataclass(frozen=True)
class Federated(Spec):
    """How a client walks through its rows. `open` gives the source of one client's training."""

    batch_size: int = 64
    proxy_batch_size: int = 64
    local_steps: int = 8
    distill_steps: int = 16
    augment: bool = True
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("proxy_batch_size", 1), ("local_steps", 1), ("distill_steps", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.steps_per_epoch not in (None, self.round_steps):
            raise ValueError(f"steps_per_epoch={self.steps_per_epoch}: a round has {self.round_steps} steps; null, or that number")

    @property
    def round_steps(self) -> int:
        """Optimiser steps of one round."""
        return self.local_steps + self.distill_steps

    def stream(self, data: Data, split: str, place: Place) -> ClientStream:
        """`data` has the client's private rows as `split`, and the shared ones as the split "proxy". Whichever rank asks gets all of them.

        Raises:
            Refused: sizes of micro-batches that do not add up.
        """
        whole = replace(place, rank=0, world=1)
        return ClientStream(self, Loader(self.batch_size, augment=self.augment).stream(data, split, whole))


@dataclass(eq=False)
class ClientStream(Stateless):
    """Implements `kdrun.types.Source`. Its only state is the exchange of the round, which the plan keeps and hands in again."""

    spec: Federated
    private: EpochLoader
    steps_per_epoch: int = field(init=False)
    _round: int = field(default=0, init=False)  # whose exchange is at hand, from 1
    _rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), init=False)  # [K] covered rows of the proxy split
    _targets: Tensor = field(default_factory=lambda: torch.zeros(0, 0), init=False)  # [K, C]

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.spec.round_steps

    def receive(self, number: int, ids: Tensor, targets: Tensor) -> None:
        """What the clients said in round `number` (from 1): probabilities [K, C] for the covered proxy samples with these ids [K].

        Raises ValueError for an id that is not among the shared ones.
        """
        known = self.private.data.split(PROXY).ids
        rows = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        if not torch.equal(known[rows], ids):
            raise ValueError("the exchange speaks of samples that are not in the proxy set")
        self._round, self._rows, self._targets = number, rows, targets

    def group(self, step: int) -> list[Batch]:
        """The micro-batches of optimiser step `step` (from 0); one without rows where there is nothing to learn from."""
        number, at = divmod(step, self.steps_per_epoch)
        if at < self.spec.local_steps:
            return self.private.group(number * self.spec.local_steps + at)
        if not self._round:  # no plan is behind it, as where a few steps are only timed: a client has nothing but its own rows
            return self.private.group(step)
        return self._shared(number + 1, step)

    def _shared(self, number: int, step: int) -> list[Batch]:
        """So many random covered proxy rows as they are evaluated: what was said was said of them so."""
        private = self.private
        if self._round != number:
            raise RunFailed(f"step {step} distils in round {number}, and the exchange at hand is that of round {self._round}")
        drawn = rng.permutation(rng.key(private.place.seed, "proxy batch"), len(self._rows), step)[: self.spec.proxy_batch_size]
        if not len(drawn):
            return [self._nothing()]
        return [self._spoken(part) for part in private.place.mine(drawn)]

    def _spoken(self, chosen: Tensor) -> Batch:
        rows, device = self._rows[chosen], self.private.place.device
        batch = self.private.data.rows(PROXY, rows, torch.zeros_like(rows), self.private.place.seed, False, device)
        everyone = torch.ones(len(rows), dtype=torch.bool, device=device)
        return batch._replace(extra={**batch.extra, TARGETS: self._targets[chosen].to(device), COVERED: everyone})

    def _nothing(self) -> Batch:
        data, device = self.private.data, self.private.place.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        extra = {TARGETS: torch.zeros(0, data.classes, device=device), COVERED: none.bool()}
        return Batch(torch.zeros(0, *data.input_shape, device=device), none, none, none, extra)
