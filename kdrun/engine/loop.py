"""THE training loop. It knows sources, teachers, learners and objectives by their interfaces and no method by name.

For each optimiser step: the micro-batches of the step; for each phase the teacher's signals, the number of valid items
of every unit over all micro-batches and ranks, then weight * sum / count backward for each micro-batch; a check that
all is finite before anything is updated; clipping, update, schedule. Objectives move their state in after_step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.engine.distributed import Ranks, synced
from kdrun.engine.learner import Learner
from kdrun.engine.shard import whole
from kdrun.errors import RunFailed
from kdrun.objective.base import Objective
from kdrun.types import COUPLED_UNITS, Batch, Progress, Source, Teacher, Term


class Schedule(Protocol):
    def step_update(self, num_updates: int, metric: float | None = None) -> None: ...


class NotFinite(RunFailed):
    """A loss or gradient that is not finite; raised before the update (exit code 1)."""

    def __init__(self, message: str, bundle: dict[str, Any]) -> None:
        super().__init__(message)
        self.bundle = bundle


class Hooks(Protocol):
    """What surrounds the loop: records, evaluation, checkpoints. Called between steps, never inside one."""

    def logged(self, step: int, record: dict[str, Any]) -> None: ...
    def step_done(self, step: int) -> None: ...
    def stop_requested(self) -> bool: ...


class Unwatched:
    """Hooks that do nothing: steps that are only timed or tried."""

    def logged(self, step: int, record: dict[str, Any]) -> None: ...
    def step_done(self, step: int) -> None: ...
    def stop_requested(self) -> bool:
        return False


@dataclass
class Stage:
    """One training stage: all that the loop touches."""

    name: str
    seed: int
    learner: Learner
    forward: Callable[..., Any]  # the learner, possibly compiled and wrapped over ranks
    teacher: Teacher
    objective: Objective
    source: Source
    optimizers: Mapping[str, torch.optim.Optimizer]  # by phase
    schedules: Mapping[str, Schedule]  # by phase
    classes: int
    total_steps: int
    log_every: int
    device: torch.device
    ranks: Ranks
    autocast: torch.dtype | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    ema: nn.Module | None = None
    last_step: int | None = None  # stop early here (a tainted run); schedules still span total_steps
    step: int = 0  # optimiser steps done
    first_bad_step: Tensor | None = field(default=None, repr=False)
    look: Callable[..., None] | None = None  # sees the terms of a logged step before it is made, and changes nothing

    @property
    def end(self) -> int:
        return self.total_steps if self.last_step is None else min(self.last_step, self.total_steps)

    @property
    def logs(self) -> bool:
        """Whether the step that comes is a logging step."""
        return (self.step + 1) % self.log_every == 0 or self.step == 0

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.total_steps, self.source.steps_per_epoch)


@dataclass
class PhaseResult:
    """What one phase of one step measured; everything stays on the device."""

    loss: Tensor
    terms: dict[str, Tensor]  # unweighted, per item
    counts: dict[str, Tensor]  # items of each unit in the step
    grad_norm: Tensor
    kept: dict[str, Tensor]


def train(stage: Stage, hooks: Hooks) -> bool:
    """Run the stage from `stage.step` to its end. False if a stop was requested on the way."""
    while stage.step < stage.end:
        # Over ranks the question costs a collective, so it is asked at the logging cadence only.
        due = stage.ranks.world == 1 or stage.step % stage.log_every == 0
        if due and stage.ranks.any(hooks.stop_requested()):
            return False
        train_step(stage, hooks)
        hooks.step_done(stage.step)
    return True


def train_step(stage: Stage, hooks: Hooks) -> None:
    """One optimiser step: one group of micro-batches through every phase."""
    progress = stage.progress
    stage.learner.train()
    group = [stage.objective.prepare(batch, progress) for batch in stage.source.group(stage.step)]
    kept: dict[str, Tensor] = {}
    for phase in stage.objective.phases:
        stage.schedules[phase].step_update(stage.step)
        if not stage.objective.active(phase, progress):
            continue
        result = run_phase(stage, group, phase, progress)
        kept |= result.kept
        if stage.logs:
            hooks.logged(stage.step + 1, to_record(stage, phase, result))
    if stage.ema is not None:
        stage.ema.update_parameters(stage.learner.student)  # type: ignore[operator]
    move_state(stage, group, kept, progress)
    stage.step += 1


def run_phase(stage: Stage, group: Sequence[Batch], phase: str, progress: Progress) -> PhaseResult:
    """Forward, backward and update of one phase."""
    optimizer = stage.optimizers[phase]
    parameters = select_trained(stage, phase)
    weights = stage.objective.weights(progress)
    autocast = torch.autocast(stage.device.type, stage.autocast) if stage.autocast else nullcontext()
    needs = stage.objective.needs()
    with autocast:
        signals = [stage.teacher.signal(batch, needs) for batch in group]
    counts = count_items(stage, group)
    if stage.look is not None and stage.logs:
        stage.look(stage, phase, group, signals, weights, counts)
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    kept: list[dict[str, Tensor]] = []
    for i, (batch, signal) in enumerate(zip(group, signals, strict=True)):
        # Library randomness (dropout, stochastic depth) is keyed by the step too, so a resume repeats it.
        torch.manual_seed(rng.key(stage.seed, "forward", stage.name, stage.step, phase, i, stage.ranks.rank))
        with synced(stage.forward, last=i == len(group) - 1):
            with autocast:
                terms, keep = stage.forward(batch, signal, phase)
            loss = add_up(terms, weights, counts)
            # DistributedDataParallel averages over ranks; the counts are global, so the sum is wanted.
            (loss * stage.ranks.world).backward()
        for name, term in terms.items():
            value = term.sum.detach() / counts[term.unit]
            totals[name] = totals[name] + value if name in totals else value
        kept.append(keep)
    loss = sum((weights[n] * v for n, v in totals.items() if weights[n] != 0), start=torch.zeros((), device=stage.device))
    grad_norm = whole(nn.utils.clip_grad_norm_(parameters, stage.clip_norm if stage.clip_norm is not None else math.inf))
    stop_if_not_finite(stage, phase, group, loss, totals, grad_norm)
    if stage.clip_value is not None:
        nn.utils.clip_grad_value_(parameters, stage.clip_value)
    optimizer.step()
    names = kept[0].keys() if kept else ()
    return PhaseResult(loss, totals, counts, grad_norm, {n: torch.cat([k[n] for k in kept]) for n in names})


def add_up(terms: Mapping[str, Term], weights: Mapping[str, float], counts: Mapping[str, Tensor]) -> Tensor:
    """sum of weight * term.sum / count[unit], over the terms whose weight is not 0."""
    parts = [weights[name] * term.sum / counts[term.unit] for name, term in terms.items() if weights[name] != 0]
    # A step in which every weight is 0 (a window that has not opened) still needs a graph for backward.
    return torch.stack(parts).sum() if parts else torch.stack([t.sum * 0 for t in terms.values()]).sum()


def count_items(stage: Stage, group: Sequence[Batch]) -> dict[str, Tensor]:
    """The number of items of each unit over all micro-batches and ranks, as float64 on the device."""
    counted = [stage.objective.count(batch) for batch in group]
    added = [sum(torch.as_tensor(c[unit], dtype=torch.float64, device=stage.device) for c in counted) for unit in counted[0]]
    totals = dict(zip(counted[0], stage.ranks.sum(torch.stack(added)), strict=True))  # type: ignore[arg-type]
    totals |= {unit: number(totals["sample"], stage.classes) for unit, number in COUPLED_UNITS.items()}
    # A batch-coupled objective evaluates the whole batch on every rank, so its items are counted once per rank.
    repeats = stage.ranks.world if stage.objective.coupling == "batch" else 1
    # Without an item (no edge, no label) the sum is 0, and so is the term.
    return {unit: (totals[unit] * repeats).clamp(min=1).float() for unit in stage.objective.units()}


def select_trained(stage: Stage, phase: str) -> list[nn.Parameter]:
    """Freeze what this phase does not train: gradients still flow through it, none stay on it."""
    parameters = [p for g in stage.optimizers[phase].param_groups for p in g["params"]]
    if len(stage.objective.phases) > 1:
        trained = {id(p) for p in parameters}
        for p in stage.learner.parameters():
            p.requires_grad_(id(p) in trained)
    return parameters


def stop_if_not_finite(
    stage: Stage, phase: str, group: Sequence[Batch], loss: Tensor, totals: Mapping[str, Tensor], grad_norm: Tensor
) -> None:
    """Raise `NotFinite` before the update. On a GPU the check waits for the next logging step or checkpoint (one host
    sync there instead of one per step), so that nothing after the first bad step is ever saved."""
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    if stage.device.type == "cuda":
        now = torch.where(finite, -1, stage.step + 1)
        previous = stage.first_bad_step
        stage.first_bad_step = now if previous is None else torch.where(previous > 0, previous, now)
        if (stage.step + 1) % stage.log_every:
            return
        if int(stage.first_bad_step) != stage.step + 1:  # of an earlier step, whose terms are gone
            assert_healthy(stage)
            return
    if bool(finite):
        return
    values = {name: float(value) for name, value in totals.items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    ids = [int(i) for batch in group for i in batch.ids]
    what = f"term{'s' if len(bad) > 1 else ''} {', '.join(bad)}" if bad else "the gradient (every term is finite)"
    terms, norm = {name: _told(value) for name, value in values.items()}, _told(float(grad_norm))
    bundle = {"stage": stage.name, "step": stage.step + 1, "phase": phase, "terms": terms, "grad_norm": norm, "ids": ids}
    shown = ", ".join(map(str, ids[:6])) + (", ..." if len(ids) > 6 else "")
    where = f"step {stage.step + 1} of {stage.name}, phase {phase}"
    raise NotFinite(f"not finite at {where}: {what}; batch of {len(ids)} samples, ids {shown}. The update was not made.", bundle)


def _told(value: float) -> float | str:
    """As a text where it is not finite: JSON has no number for it."""
    return value if math.isfinite(value) else str(value)


def assert_healthy(stage: Stage) -> None:
    """The deferred finite check (one host sync). Called before anything is saved or reported."""
    if stage.first_bad_step is not None and int(stage.first_bad_step) > 0:
        step = int(stage.first_bad_step)
        message = f"not finite since step {step} of {stage.name}; nothing was saved after it."
        message += " hardware.device=cpu or run.log_every=1 names the term."
        raise NotFinite(message, {"stage": stage.name, "step": step})


def move_state(stage: Stage, group: Sequence[Batch], kept: Mapping[str, Tensor], progress: Progress) -> None:
    """Everything that has state moves once per step, with the rows of all ranks."""
    ids = stage.ranks.gather(torch.cat([b.ids for b in group]))
    gathered = stage.objective.coupling == "batch"  # its rows are those of the whole batch already
    rows = {name: value if gathered else stage.ranks.gather(value) for name, value in kept.items()}
    with torch.no_grad():
        stage.objective.after_step(ids, rows, progress)
        stage.teacher.after_step(stage.learner.student.module, progress)  # type: ignore[arg-type]
    if "score" in rows:
        stage.source.feedback(ids, rows["score"])


def to_record(stage: Stage, phase: str, result: PhaseResult) -> dict[str, Any]:
    """The one place where a training step reaches the host. A coupled objective's terms are the whole batch's on every
    rank, counted once per rank, so the sum over ranks is right for both kinds."""
    values = stage.ranks.sum(torch.stack([result.loss, *result.terms.values()]).double()).tolist()
    record: dict[str, Any] = {"loss": values[0], "grad_norm": float(result.grad_norm), "lr": stage.optimizers[phase].param_groups[0]["lr"]}
    record["terms"] = dict(zip(result.terms, values[1:], strict=True))
    if "token" in result.counts:
        record["tokens"] = int(result.counts["token"])
    if len(stage.objective.phases) > 1:
        record["phase"] = phase
    return record
