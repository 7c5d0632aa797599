"""A teacher that is asked once about each view of each sample: what it said is kept on disk, and read from there afterwards.

A view is a function of (seed, epoch, sample id), so what was said of it belongs to it and to nothing else. What is missing is asked of the
live teacher and written; what the student gets is always what was written, decoded: so it makes no difference to a run whether a row was
there, and a run that is killed and resumed is bit-equal to an unbroken one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrun.cache.format import Decoded, Format, Records
from kdrun.cache.store import Ints, Store
from kdrun.cache.wanted import Redrawn
from kdrun.errors import CheckFailed
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Kept, ModelSpec, Needs, Progress, Signal

SLACK = 5.0  # times the format's tolerance: a row that differs by more was not said by this teacher of this view
COARSE = 0.05  # instead, under autocast, whose rounding depends on the batch


class CachedTeacher:
    """Speaks of the training rows of a stage. `ids` [N]: of the samples of the store, in its order; `texts`: an item is a scored token."""

    follows = False

    def __init__(self, live: LiveTeacher, store: Store, form: Format, redrawn: Redrawn, ids: Tensor, total_ids: int, texts: bool) -> None:
        self.spec: ModelSpec | None = live.spec
        self.live, self.store, self.form, self.redrawn, self.texts = live, store, form, redrawn, texts
        self._place = torch.full((total_ids,), -1)
        self._place[ids] = torch.arange(len(ids))
        self._checked = False
        self.read = self.asked = 0  # samples in this process

    @torch.no_grad()
    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """As the live teacher, but for the loss of the format; top-k formats give `kept` in place of logits.

        Raises `CheckFailed` where what is kept is not what the teacher says.
        """
        places = self._place[batch.ids.cpu()].numpy()
        views = {self.redrawn.view(v) for v in batch.view.cpu().unique().tolist()}
        if (not needs.teacher_logits and not needs.teacher_taps) or (places < 0).any() or len(views) != 1:
            return self.live.signal(batch, needs)
        view = views.pop()
        records = self.store.read(view, places)
        if records is None:
            records = self._ask(view, places, batch, needs)
        elif not self._checked:
            self._check(self.form.decode(records, "cpu"), batch, needs)
        else:
            self.read += len(places)
        return self._signal(self.form.decode(records, batch.inputs.device), batch)

    def _ask(self, view: int, places: Ints, batch: Batch, needs: Needs) -> Records:
        """The whole micro-batch, also where a part of it is there: what a row is does not depend on which others are missing."""
        records = self.encoded(batch, needs)
        self.store.write(view, places, records)
        self.asked += len(places)
        return records

    def encoded(self, batch: Batch, needs: Needs) -> Records:
        """The records of what the live teacher says of a batch, one sample after the other."""
        said = self.live.signal(batch, needs)
        logits = said.logits
        if logits is not None and self.texts:
            logits = logits[batch.targets >= 0]
        return self.form.encode(logits, said.taps)

    def _check(self, kept: Decoded, batch: Batch, needs: Needs) -> None:
        """Once in a process: what is kept of a batch against what the teacher says of it now."""
        now = self.form.decode(self.encoded(batch, needs), "cpu")
        off = difference(kept, now)
        coarse = torch.is_autocast_enabled(batch.inputs.device.type)
        if off > (COARSE if coarse else SLACK * self.form.tolerance):
            raise CheckFailed(
                f"the cache {self.store.folder} does not hold what this teacher says of these views: "
                f"off by {100 * off:.2g} % of the range of a batch.\n"
                f"  remedy  kdrun cache verify {self.store.folder.name}; kdrun cache rm {self.store.folder.name}; or cache=off"
            )
        self._checked = True
        self.asked += len(batch.ids)

    def _signal(self, found: Decoded, batch: Batch) -> Signal:
        if not self.texts:
            return Signal(found.logits, found.taps, found.kept)
        scored = batch.targets >= 0
        kept = None if found.kept is None else Kept(*(_laid(part, scored) for part in found.kept))
        return Signal(None if found.logits is None else _laid(found.logits, scored), found.taps, kept)

    def report(self) -> dict[str, Any]:
        """Where the rows are, and how many samples of this process were read and asked."""
        return {"folder": str(self.store.folder), "format": str(self.form), "read": self.read, "asked": self.asked}

    def after_step(self, student: Any, progress: Progress) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _laid(items: Tensor, scored: Tensor) -> Tensor:
    """Items [M, ...] at the scored positions [B, T], zeros elsewhere."""
    laid = items.new_zeros(*scored.shape, *items.shape[1:])
    laid[scored] = items
    return laid


def difference(one: Decoded, other: Decoded) -> float:
    """The largest difference between two readings of the same items, as a share of the range of the second; 1 where they cannot be
    compared. Of the kept log-probabilities those are compared whose ids both have."""
    pairs = [(one.taps[name], other.taps[name]) for name in other.taps]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits))
    if one.kept is not None and other.kept is not None:
        same = one.kept.ids == other.kept.ids
        if float(same.float().mean()) < 0.5:  # nearly equal ones change places, no more
            return 1.0
        pairs.append((one.kept.log_probs[same], other.kept.log_probs[same]))
    found = [float((a - b).abs().max() / (b.max() - b.min()).clamp(min=1e-6)) for a, b in pairs if b.numel()]
    return max(found) if found and np.isfinite(found).all() else 1.0
