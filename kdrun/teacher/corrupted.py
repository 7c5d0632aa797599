"""Teachers that are wrong on a known share of the training samples: there they say what they would say of a random other sample.

A world in which every sample has a known right answer to the question whom to trust. Which samples, and whose opinion each of them gets,
is drawn by sample id, so it is the same in every epoch, order and run. Definition ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Data
from kdrun.errors import Problem, Refused
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.truth import TruthTeacher
from kdrun.types import Batch, Needs, Signal


class Corruption:
    """Which training samples are hit, and by whom. Raises `Refused` for a share outside [0, 1] or fewer than two training samples."""

    def __init__(self, data: Data, share: float, seed: int = 0) -> None:
        ids = data.split("train").ids  # [N]
        if not 0 <= share <= 1 or len(ids) < 2:
            what = f"{share} is no share of {len(ids)} training samples that have another one"
            raise Refused(Problem(what, "teacher.corrupt", data.name, "from 0 to 1, e.g. teacher.corrupt=0.25"))
        own = torch.arange(len(ids))
        other = rng.integers(rng.key(seed, "corrupt", "other"), len(ids) - 1, ids)
        hit = rng.uniform(rng.key(seed, "corrupt"), ids) < share
        self._data = data
        self._other = torch.full((data.total_ids,), -1)  # by sample id: whose row of the training split speaks, -1: its own
        self._other[ids] = torch.where(hit, other + (other >= own), -1)

    def swap(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with other samples' inputs and rows, as evaluated, where it is hit; and where that is, bool [B] on its device."""
        other = self._other[batch.ids.cpu()]
        (where,) = torch.nonzero(other >= 0, as_tuple=True)
        device = batch.inputs.device
        if len(where):
            position = other[where]
            theirs = self._data.rows("train", position, torch.zeros_like(position), 0, augment=False, device=device)
            at = where.to(device)
            own = {name: batch.extra[name].index_copy(0, at, theirs.extra[name]) for name in self._data.split("train").extra}
            batch = batch._replace(inputs=batch.inputs.index_copy(0, at, theirs.inputs), extra={**batch.extra, **own})
        return batch, (other >= 0).to(device)


class CorruptedLive(LiveTeacher):
    """A live teacher under a corruption. Its signal carries the tap "corrupted", bool [B]: for reports, not for methods to learn from."""

    def __init__(self, corruption: Corruption, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._corruption = corruption

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        return _said(super().signal, self._corruption, batch, needs)


class CorruptedTruth(TruthTeacher):
    """The world's posterior under a corruption; taps as `CorruptedLive`."""

    def __init__(self, corruption: Corruption, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._corruption = corruption

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        return _said(super().signal, self._corruption, batch, needs)


def _said(speak: Any, corruption: Corruption, batch: Batch, needs: Needs) -> Signal:
    swapped, corrupted = corruption.swap(batch)
    said: Signal = speak(swapped, needs)
    return said._replace(taps={**said.taps, "corrupted": corrupted})
