"""What objectives on pairs of feature maps share: the task's own loss, taps, alignment of the student's map, pooling, one scale for
both, and a start from parts of the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_legal, require_nonnegative
from kdrun.objective._tasks import EXTRA, TERMS, Task, refuse_others, with_truth
from kdrun.objective.base import Objective
from kdrun.student.weights import copy_parts
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Start


class Align(nn.Module):
    """The student's map in the teacher's shape: a 1x1 convolution where the channels differ, bilinear where the sizes do."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        same = student_channels == teacher_channels
        self.project = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, kernel_size=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Cs, Hs, Ws], [B, Ct, Ht, Wt] -> [B, Ct, Ht, Wt]."""
        maps = self.project(student)
        if maps.shape[2:] == teacher.shape[2:]:
            return maps
        return F.interpolate(maps, size=teacher.shape[2:], mode="bilinear", align_corners=False)


@dataclass(eq=False)
class MapObjective(Objective):
    """Base of objectives on (teacher map, aligned student map): both average-pooled, and with `standardise` both divided by
    the standard deviation of the teacher's map over the training images, one number for each map.

    `task`: the loss beside the distillation, on labels or of a detector. `pool`: one number for all maps or one for each.
    `inherit`: parts of the student (module paths, e.g. a detector's neck and head) that start with the teacher's weights, as far
    as names and shapes are the same.

    `_state` holds every tensor of the objective's state by name; it is made in `setup`.
    """

    ce_weight: float = 1.0
    student_taps: list[str] = field(default_factory=lambda: ["map"])
    teacher_taps: list[str] = field(default_factory=lambda: ["map"])
    pool: int | list[int] = 1
    standardise: bool = False
    task: Task = "ce"
    inherit: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight")
        require_legal(self, "task")
        if not self.pools or not all(1 <= pool < math.inf for pool in self.pools):
            raise ValueError(f"pool={self.pool}: legal range [1, inf)")
        if not self.student_taps or len(self.student_taps) != len(self.teacher_taps):
            raise ValueError(f"student_taps={self.student_taps}: one tap for each of teacher_taps={self.teacher_taps}, at least one")
        if len(self.pools) != len(self.teacher_taps):
            raise ValueError(f"pool={self.pool}: one number, or one for each of the {len(self.teacher_taps)} maps")

    @property
    def compilable(self) -> bool:  # type: ignore[override]
        return self.task == "ce"  # see kdrun.objective.detection

    @property
    def pools(self) -> list[int]:
        """By which each pair of maps is average-pooled."""
        return self.pool if isinstance(self.pool, list) else [self.pool] * len(self.teacher_taps)

    def distils(self) -> bool:
        """Whether anything is asked of the teacher."""
        raise NotImplementedError

    def needs(self) -> Needs:
        extra = EXTRA[self.task]
        if not self.distils():
            return Needs(extra=extra)
        return Needs(
            teacher_taps=tuple(self.teacher_taps),
            student_taps=tuple(self.student_taps),
            teacher_network=bool(self.inherit),
            extra=extra,
        )

    def setup(self, context: Context) -> Connectors:
        """The alignment of every pair of maps. Raises Refused for taps that are no maps [C, H, W], or smaller than the pooling."""
        self._state = {"scale": torch.ones(len(self.teacher_taps))}
        self._seed = context.seed
        if not self.distils():
            return nn.ModuleDict()
        assert context.teacher is not None
        students, teachers = ([spec.taps[t] for t in taps] for spec, taps in self._sides(context))
        problems = [
            Problem(
                f"the {who}'s {tap} has shape {list(shape)}, where a map [C, H, W] of at least {pool}x{pool} is compared",
                f"objective.{who}_taps",
                remedy="name taps that are maps (a segmentation network has 'map'), or a smaller objective.pool",
            )
            for who, taps, shapes in (("student", self.student_taps, students), ("teacher", self.teacher_taps, teachers))
            for tap, shape, pool in zip(taps, shapes, self.pools, strict=True)
            if len(shape) != 3 or (who == "teacher" and min(shape[1:]) < pool)
        ]
        if problems:
            raise Refused(problems)
        return nn.ModuleDict({"align": nn.ModuleList(Align(s[0], t[0]) for s, t in zip(students, teachers, strict=True))})

    def _sides(self, context: Context) -> list[tuple[Any, list[str]]]:
        return [(context.student, self.student_taps), (context.teacher, self.teacher_taps)]

    def pooled_shapes(self, context: Context) -> list[tuple[int, int, int]]:
        """(C, H, W) of every pair of maps as they are compared."""
        assert context.teacher is not None
        shapes = [context.teacher.taps[tap] for tap in self.teacher_taps]
        return [(c, h // pool, w // pool) for (c, h, w), pool in zip(shapes, self.pools, strict=True)]

    def start(self, start: Start, connectors: Connectors) -> None:
        """Inherit; measure the scale: one walk over the training rows. Raises Refused for a student that cannot do the task, and for
        parts of which nothing fits."""
        refuse_others(self.task, start)
        if self.inherit and self.distils():
            assert start.teacher is not None
            copy_parts(start.student, start.teacher, self.inherit, "objective.inherit")
        if not (self.standardise and self.distils()):
            return
        scale = self._state["scale"]
        sums = torch.zeros(3, len(scale), dtype=torch.float64, device=scale.device)  # count, sum, sum of squares
        for _, signal in start.rows():
            maps = [signal.taps[tap].double() for tap in self.teacher_taps]
            sums += torch.stack([torch.stack([torch.ones_like(m).sum(), m.sum(), m.square().sum()]) for m in maps], 1)
        variance = sums[2] / sums[0] - (sums[1] / sums[0]).square()
        # A teacher that says one number everywhere has no scale to divide by.
        self._state["scale"] = torch.where(variance > 0, variance, 1.0).sqrt().to(scale)

    def task_weights(self) -> dict[str, float]:
        """The weight of each of the task's terms."""
        return dict.fromkeys(TERMS[self.task], self.ce_weight)

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        return with_truth(self.task, batch, self._seed, progress)

    def maps(self, output: Output, signal: Signal, connectors: Connectors) -> list[tuple[Tensor, Tensor]]:
        """(F_T without gradient, F_S aligned) for each pair of taps, [B, C, H, W] both."""
        pairs = []
        for i, (student_tap, teacher_tap) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            teacher = signal.taps[teacher_tap].detach()
            student = connectors["align"][i](output.taps[student_tap], teacher)  # type: ignore[index]
            pairs.append((self._prepared(teacher, i), self._prepared(student, i)))
        return pairs

    def _prepared(self, maps: Tensor, which: int) -> Tensor:
        wide, pool = widen(maps), self.pools[which]
        pooled = F.avg_pool2d(wide, pool) if pool > 1 else wide
        return pooled / self._state["scale"][which] if self.standardise else pooled

    def to(self, device: Any) -> None:
        self._state = {name: value.to(device) for name, value in self._state.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = {name: state[name].to(mine) for name, mine in self._state.items()}
