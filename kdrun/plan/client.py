"""One client of a federation: its private rows, its filter, its network in training.

Everything that touches private rows or a network is here and takes and gives plain tensors: these calls, and no others, are what
an engine for clients on other machines would have to send.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import RunFailed
from kdrun.plan.exchange import Share, Upload, to_share
from kdrun.source.density import Estimator, KMeansRatio, KuLSIF, Points, in_distribution, threshold
from kdrun.source.federated import PROXY
from kdrun.student.taps import ask

AT_ONCE = 500  # rows of a prediction
Extract = Callable[[Tensor], Tensor]  # inputs [B, ...] -> what density is estimated on [B, ...]


@dataclass(frozen=True)
class Filter:
    """How a client judges which proxy samples it is competent for."""

    estimator: Literal["kmeans", "kulsif"]
    centroids: int  # of KMeans, over all classes
    quantile: float
    auxiliary: int  # of KuLSIF
    width: float | None
    ridge: float

    def fit(self, private: Points, seed: int) -> Estimator:
        """The estimator of private points [m, D]."""
        if self.estimator == "kmeans":
            return KMeansRatio.fit(private, self.centroids, seed % 2**32)
        return KuLSIF.fit(private, self.auxiliary, self.width, self.ridge, seed % 2**32)

    def judge(self, private: Points, proxy: Points, own: Tensor, seed: int) -> tuple[Tensor, float]:
        """(mask bool [P], CPU seconds) of proxy points [P, D]; `own` bool [P]: those that the client gave."""
        # Not the wall clock: what else the machine does is no cost of the filter.
        started = time.process_time()
        estimator = self.fit(private, seed)
        limit = threshold(estimator.score(private), self.quantile)
        mask = in_distribution(estimator.score(proxy), own.numpy(), limit)
        return torch.from_numpy(mask), time.process_time() - started


class Report(NamedTuple):
    """What a client tells of its training, which is nothing of its rows or weights."""

    client: int
    history: list[dict[str, Any]]  # its evaluations since it last told
    seconds: float  # of its training so far


@dataclass(eq=False)
class Client:
    """A client whose training is a stage of the run."""

    number: int
    data: Data  # its private rows as "train", the shared inputs as "proxy"
    mask: Tensor  # bool [P], which proxy samples it speaks of
    training: Any
    device: torch.device
    _told: int = field(default=0, init=False)  # evaluations

    def train(self, until: int) -> Report:
        """Train to that optimiser step; nothing where it is past it. Saved is at the run's cadence: the exchanges are kept, so a client
        that goes on from an earlier round than others hears what it heard then."""
        self.training.advance(until, save=False)
        history = self.training.history[self._told :]
        self._told += len(history)
        return Report(self.number, history, self.training.spent()[0])

    def save(self) -> None:
        """Save where it stands."""
        self.training.save(self.training.stage.step)

    def speak(self, rows: Tensor, share: Share, temperature: float) -> Upload:
        """What it says, without gradient and in evaluation mode, of those proxy rows (positions [K]) that its filter lets through.

        Raises `RunFailed` where that is not finite.
        """
        rows = rows[self.mask[rows]]
        network = self.training.exported()
        was = network.training
        network.eval()
        with torch.inference_mode():
            said = [
                ask(network, self.data.rows(PROXY, part, torch.zeros_like(part), 0, False, self.device)).float()
                for part in rows.split(AT_ONCE)
                if len(part)
            ]
        network.train(was)
        logits = torch.cat(said).cpu() if said else torch.zeros(0, self.data.classes)
        if not logits.isfinite().all():  # a GPU looks at its losses now and then only, and one client would spoil all of them
            raise RunFailed(f"client {self.number} says what is not finite at step {self.training.stage.step}; nothing of it was exchanged")
        return Upload(self.number, self.data.split(PROXY).ids[rows], to_share(logits, share, temperature))

    def receive(self, number: int, ids: Tensor, targets: Tensor) -> None:
        """Take in what all said in a round."""
        self.training.stage.source.receive(number, ids, targets)


def points(data: Data, split: str, extract: Extract, device: torch.device) -> Points:
    """What density is estimated on, float64 [N, D]: the rows of a split as they are evaluated, flattened pixels or features."""
    with torch.inference_mode():
        rows = [extract(batch.inputs).flatten(1).double().cpu() for batch in data.batches(split, AT_ONCE, device)]
    return np.ascontiguousarray(torch.cat(rows).numpy())


def client_seed(seed: int, number: int) -> int:
    """The seed of everything that a client draws."""
    return rng.key(seed, "client", number)
