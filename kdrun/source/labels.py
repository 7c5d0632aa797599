"""Labels without data: an endless stream of class labels with standard normal latents, for methods that generate their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.source.base import Place, Spec, Stateless
from kdrun.types import Batch


@dataclass(frozen=True)
class Labels(Spec):
    """Labels drawn uniformly from the data set's classes, those in `exclude` left out. `open` gives the source of one training stage."""

    batch_size: int = 128
    exclude: tuple[int, ...] = ()
    steps_per_epoch: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps_per_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def stream(self, data: Data, split: str, place: Place) -> LabelStream:
        """`data` says how many classes there are and what an input looks like, and no row of it is read.

        Raises:
            Refused: a step that gives a rank no sample, sizes that do not add up, classes that there are not, none left.
        """
        place.check(self.batch_size, data.name)
        for label in self.exclude:
            if not 0 <= label < data.classes:
                classes = [str(c) for c in range(data.classes)]
                raise Refused(Problem(f"there is no label {label}", "source.exclude", data.name, did_you_mean(str(label), classes)))
        kept = [label for label in range(data.classes) if label not in self.exclude]
        if not kept:
            raise Refused(Problem("no label is left", "source.exclude", data.name, "leave out fewer classes"))
        return LabelStream(self, torch.tensor(kept, device=place.device), data.input_shape, place)


@dataclass(eq=False)
class LabelStream(Stateless):
    """Implements `kdrun.types.Source`: sample i of step s has the id s * batch_size + i, and all else follows from that."""

    spec: Labels
    kept: Tensor  # int64, on the device of the batches
    input_shape: tuple[int, ...]
    place: Place
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.spec.steps_per_epoch

    def group(self, step: int) -> list[Batch]:
        """The micro-batches of optimiser step `step` (from 0) on this rank: inputs float32 [B, ...] ~ N(0, I), targets [B]."""
        size = self.spec.batch_size
        ids = torch.arange(step * size, (step + 1) * size, device=self.kept.device)
        return [self._batch(part, step) for part in self.place.mine(ids)]

    def _batch(self, ids: Tensor, step: int) -> Batch:
        labels = self.kept[rng.integers(rng.key(self.place.seed, "label"), len(self.kept), ids)]
        latents = rng.normal(rng.key(self.place.seed, "latent"), self.input_shape, ids)
        return Batch(latents, labels, ids, torch.full_like(ids, step // self.steps_per_epoch), {})
