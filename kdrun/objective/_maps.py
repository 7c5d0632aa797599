"""What objectives on pairs of feature maps share: taps, alignment of the student's map, pooling, one scale for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_nonnegative, require_positive
from kdrun.objective.base import Objective
from kdrun.types import Connectors, Context, Needs, Output, Signal, Start


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

    `_state` holds every tensor of the objective's state by name; it is made in `setup`.
    """

    ce_weight: float = 1.0
    student_taps: list[str] = field(default_factory=lambda: ["map"])
    teacher_taps: list[str] = field(default_factory=lambda: ["map"])
    pool: int = 1
    standardise: bool = False

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight")
        require_positive(self, "pool")
        if not self.student_taps or len(self.student_taps) != len(self.teacher_taps):
            raise ValueError(f"student_taps={self.student_taps}: one tap for each of teacher_taps={self.teacher_taps}, at least one")

    def distils(self) -> bool:
        """Whether anything is asked of the teacher."""
        raise NotImplementedError

    def needs(self) -> Needs:
        return Needs(teacher_taps=tuple(self.teacher_taps), student_taps=tuple(self.student_taps)) if self.distils() else Needs()

    def setup(self, context: Context) -> Connectors:
        """The alignment of every pair of maps. Raises Refused for taps that are no maps [C, H, W], or smaller than the pooling."""
        self._state = {"scale": torch.ones(len(self.teacher_taps))}
        if not self.distils():
            return nn.ModuleDict()
        assert context.teacher is not None
        students, teachers = ([spec.taps[t] for t in taps] for spec, taps in self._sides(context))
        problems = [
            Problem(
                f"the {who}'s {tap} has shape {list(shape)}, where a map [C, H, W] of at least {self.pool}x{self.pool} is compared",
                f"objective.{who}_taps",
                remedy="name taps that are maps (a segmentation network has 'map'), or a smaller objective.pool",
            )
            for who, taps, shapes in (("student", self.student_taps, students), ("teacher", self.teacher_taps, teachers))
            for tap, shape in zip(taps, shapes, strict=True)
            if len(shape) != 3 or (who == "teacher" and min(shape[1:]) < self.pool)
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
        return [(c, h // self.pool, w // self.pool) for c, h, w in shapes]

    def start(self, start: Start, connectors: Connectors) -> None:
        """Measure the scale: one walk over the training rows."""
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

    def maps(self, output: Output, signal: Signal, connectors: Connectors) -> list[tuple[Tensor, Tensor]]:
        """(F_T without gradient, F_S aligned) for each pair of taps, [B, C, H, W] both."""
        pairs = []
        for i, (student_tap, teacher_tap) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            teacher = signal.taps[teacher_tap].detach()
            student = connectors["align"][i](output.taps[student_tap], teacher)  # type: ignore[index]
            pairs.append((self._prepared(teacher, i), self._prepared(student, i)))
        return pairs

    def _prepared(self, maps: Tensor, which: int) -> Tensor:
        wide = widen(maps)
        pooled = F.avg_pool2d(wide, self.pool) if self.pool > 1 else wide
        return pooled / self._state["scale"][which] if self.standardise else pooled

    def to(self, device: Any) -> None:
        self._state = {name: value.to(device) for name, value in self._state.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = {name: state[name].to(mine) for name, mine in self._state.items()}
