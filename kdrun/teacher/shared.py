"""One live teacher for several students that are trained side by side on the same batches: it is asked once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, Needs, Signal


class Clock:
    """Seconds and CPU seconds of what is done for all."""

    def __init__(self) -> None:
        self._spent = 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.perf_counter(), time.process_time()
        yield
        self._spent = self._spent[0] + time.perf_counter() - began[0], self._spent[1] + time.process_time() - began[1]

    def take(self) -> tuple[float, float]:
        """What was spent since the last time."""
        spent, self._spent = self._spent, (0.0, 0.0)
        return spent


class Heard:
    """What `live` has said of the batches of one optimiser step. A batch is the same where its tensors are the same objects."""

    def __init__(self, live: LiveTeacher, taps: tuple[str, ...]) -> None:
        self.live, self.taps = live, taps
        self.asked = self.answered = 0  # of the teacher; of the students
        self.clock = Clock()
        self._step = -1
        self._said: list[tuple[Batch, bool, Signal]] = []

    def begin(self, step: int) -> None:
        if step != self._step:
            self._step, self._said = step, []

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        # Under another precision it would say something else.
        half = torch.is_autocast_enabled(batch.inputs.device.type)
        self.answered += 1
        for known, was_half, said in self._said:
            if known.inputs is batch.inputs and was_half == half and all(batch.extra.get(k) is v for k, v in known.extra.items()):
                return said
        self.asked += 1
        with self.clock.running():
            said = self.live.signal(batch, replace(needs, teacher_logits=True, teacher_taps=self.taps))
        self._said.append((batch, half, said))
        return said


class SharedTeacher:
    """A student's own ear: hears what it asked for, and is otherwise the teacher it would have alone."""

    def __init__(self, own: LiveTeacher, heard: Heard) -> None:
        self._own, self._heard = own, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        if not needs.teacher_logits and not needs.teacher_taps:
            return Signal(None, {})
        said = self._heard.signal(batch, needs)
        return Signal(said.logits, {name: tap for name, tap in said.taps.items() if name in needs.teacher_taps})
