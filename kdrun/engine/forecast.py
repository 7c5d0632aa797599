"""What a run expects to cost, and beside it what it did cost: so that every record judges the estimator.

Memory is counted before the first step, on tensors without content (`kdrun.engine.footprint`); seconds are those of a few of the run's
own steps after its warm-up, a twentieth of all at most. Neither costs a step: a probe of its own would either take longer than a small
run or be too small to say anything of a large one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kdrun.engine.build import Built
from kdrun.engine.caching import predicted_bytes
from kdrun.engine.device import peak_memory_bytes, settle
from kdrun.engine.footprint import footprint
from kdrun.engine.loop import Stage
from kdrun.engine.workload import micro_of, work_of
from kdrun.teacher.cached import CachedTeacher
from kdrun.teacher.live import LiveTeacher
from kdrun.teacher.once import OnceTeacher
from kdrun.types import Writes

ROWS = 4  # whose shapes stand for those of a micro-batch
MOST_STEPS = 20  # that are timed, after as many that are not
SHARE = 20  # of the run's steps: no more than one in so many is timed
COMES = ("gradients", "optimiser state", "activations")  # with the first step; weights are there already


class Forecast:
    """Of one training stage in this process. `actual` is for after its end."""

    def __init__(self, tree: Mapping[str, Any], built: Built, stage: Stage) -> None:
        self.device, self.work = stage.device, work_of(tree, built)
        self.steps, self.first = stage.end, stage.step
        self.timed = min(MOST_STEPS, (stage.end - stage.step) // SHARE)
        memory = _memory(tree, built, stage)
        now, peak = memory_now(stage.device), peak_memory_bytes(stage.device)
        self.predicted: dict[str, Any] = {
            "peak_memory_bytes": None if memory is None else max(peak, now + sum(memory[part] for part in COMES)),
            # What the peak is counted from, and the peak until then: of the process on a CPU, of torch's allocator on a GPU.
            "before_first_step_bytes": now,
            "peak_before_bytes": peak,
            "memory_bytes": memory,
            "flops": self.work.sample * self.work.batch * self.steps + self.work.evaluation,
            "seconds_per_step": None,
            "seconds": None,
            "cache_bytes": predicted_bytes(tree, built),
        }
        self._mark: float | None = None
        self._spent, self._counted = 0.0, 0

    @contextmanager
    def between_steps(self, step: int) -> Iterator[None]:
        """Around what happens after optimiser step `step`: evaluations and checkpoints are no part of a step's time."""
        if self.timed:
            done = step - self.first - self.timed  # steps after the warm-up
            if done in (0, self.timed) or step == self.steps:
                settle(self.device)
            if self._mark is not None and done > 0:
                self._spent, self._counted = self._spent + time.perf_counter() - self._mark, self._counted + 1
            if done == self.timed:
                self._foretell()
        yield
        self._mark = time.perf_counter()

    def _foretell(self) -> None:
        step = self._spent / self._counted
        evaluated = self.work.evaluation / max(1, self.work.sample * self.work.batch) * step  # by its FLOPs
        self.predicted |= {"seconds_per_step": step, "seconds": step * self.steps + evaluated}

    def record(self, stage: Stage, seconds: float) -> dict[str, Any]:
        """`predicted` and `actual` for the run's summary. `seconds`: of the stage, evaluations and checkpoints included."""
        cache = None
        if isinstance(stage.teacher, CachedTeacher):
            cache = sum(file.stat().st_blocks * 512 for file in Path(stage.teacher.store.folder).glob("view-*"))
        actual = {
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "seconds_per_step": self._spent / self._counted if self._counted > self.timed else None,
            "seconds": seconds,
            "cache_bytes": cache,
        }
        return {"predicted": self.predicted, "actual": actual}


def forecast(tree: Mapping[str, Any], built: Built, stage: Stage) -> Forecast | None:
    """Of a stage at its beginning in this process; None over several ranks, of a source that writes, and of a run that is cut short or
    was finished before."""
    if stage.ranks.world > 1 or isinstance(stage.source, Writes) or stage.last_step is not None or stage.step >= stage.end:
        return None
    return Forecast(tree, built, stage)


def _memory(tree: Mapping[str, Any], built: Built, stage: Stage) -> dict[str, int] | None:
    if isinstance(built.teacher, OnceTeacher):  # it keeps what it says, and would keep shapes without content
        return None
    rows = len(built.data.split("train")) if built.data.whole else min(ROWS, len(built.data.split("train")))
    index = torch.arange(rows)
    try:
        batch = built.data.rows("train", index, torch.zeros_like(index), seed=0, augment=False, device=stage.device)
        batch = built.objective.prepare(batch, stage.progress)
    except Exception:  # rows of a source of its own kind: an estimate is no reason to fail
        return None
    stage.learner.train()
    teacher = built.teacher
    if not isinstance(teacher, LiveTeacher):
        return footprint(tree, built, batch, micro_of(tree, built), stage.device)
    spoken, teacher.forward = teacher.forward, teacher.module  # compiled code has no use for shapes without content
    try:
        return footprint(tree, built, batch, micro_of(tree, built), stage.device)
    finally:
        teacher.forward = spoken


def memory_now(device: torch.device) -> int:
    """Bytes in use: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no such file but on Linux
        return peak_memory_bytes(device)
