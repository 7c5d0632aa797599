"""How much is to be computed in one training stage: FLOPs of its optimiser steps and of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdrun.engine.build import Built, steps_in_epoch
from kdrun.evaluation import cost
from kdrun.plan.single import StageSpec
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Needs


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward pass of one sample, and how many samples there are. `teacher` is 0 where it is not asked."""

    student: int
    teacher: int
    batch: int
    steps: int
    evaluations: int
    rows: int  # of the splits that are evaluated
    teacher_evaluated: bool = False  # asked once about these rows

    @property
    def sample(self) -> int:
        """Of one training sample: a backward pass takes two forward passes' worth."""
        return 3 * self.student + self.teacher

    @property
    def training(self) -> int:
        return self.sample * self.batch * self.steps

    @property
    def evaluation(self) -> int:
        return self.rows * (self.evaluations * self.student + self.teacher * self.teacher_evaluated)

    @property
    def total(self) -> int:
        return self.training + self.evaluation


def work_of(tree: Mapping[str, Any], built: Built, student: int | None = None, teacher: int | None = None) -> Work:
    """Of the stage that was built. `student`, `teacher`: FLOPs of a forward pass, where they are known already."""
    if student is None:
        student = cost.flops(built.network, built.data.input_shape)
    asked = built.teacher if isinstance(built.teacher, LiveTeacher) and is_asked(built.objective.needs()) else None
    if asked is not None and asked.spec is not None and teacher is None:
        teacher = cost.flops(asked.network, asked.spec.input_shape)
    every = max(1, round(built.evaluation.every_epochs * built.steps_per_epoch))
    return Work(
        student=student,
        teacher=int(teacher or 0) if asked is not None else 0,
        batch=batch_of(tree, built),
        steps=built.total_steps,
        evaluations=-(-built.total_steps // every),
        rows=_evaluated(built),
        teacher_evaluated=bool(getattr(built.evaluation, "uses_teacher", False)),
    )


def is_asked(needs: Needs) -> bool:
    return needs.teacher_logits or bool(needs.teacher_taps) or needs.teacher_network


def teacher_work(spec: StageSpec, built: Built, teacher: int) -> Work:
    """Of the training of a teacher whose forward pass of one sample takes so many FLOPs."""
    per_epoch = steps_in_epoch(spec.tree, built.data)
    steps = spec.tree["optim"].get("steps") or max(1, round(spec.tree["optim"]["epochs"] * per_epoch))
    every = max(1, round(built.evaluation.every_epochs * per_epoch))
    return Work(teacher, 0, batch_of(spec.tree, built), int(steps), -(-int(steps) // every), _evaluated(built))


def batch_of(tree: Mapping[str, Any], built: Built) -> int:
    return int(tree["source"].get("batch_size") or len(built.data.split("train")))


def micro_of(tree: Mapping[str, Any], built: Built) -> int:
    """Rows of the largest micro-batch."""
    batch = batch_of(tree, built)
    micro = tree["hardware"]["micro_batch"] or batch
    return max(micro) if isinstance(micro, list) else min(int(micro), batch)


def _evaluated(built: Built) -> int:
    return sum(len(built.data.splits[name]) for name in ("validation", "test") if name in built.data.splits)
