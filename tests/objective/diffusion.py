"""Generators, teachers and fake scores whose distributions are known in closed form, or small networks, under SFD's objective."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.losses.score import linear_schedule
from kdrun.objective.sfd import FAKE, SFD, STUDENT
from kdrun.student.denoiser import MLPDenoiser
from kdrun.student.generator import OneStepGenerator
from kdrun.student.taps import Tapped
from kdrun.types import Batch, Context, ModelSpec, Progress, Signal, Start, Term

CLASSES, FORGET, OVERRIDE = 4, 0, 1
SCHEDULE = linear_schedule()
STEP = Progress(step=0, total_steps=10, steps_per_epoch=10)


class GaussianScore(nn.Module):
    """The exact noise prediction of class-conditional Gaussians N(mean_c, spread_c^2) on the line: b (x - a m) / (a^2 s^2 + b^2)."""

    takes = ("labels", "t")
    schedule = SCHEDULE

    def __init__(self, mean: list[float], spread: list[float]) -> None:
        super().__init__()
        self.mean, self.spread = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (mean, spread))

    def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        a, b = SCHEDULE.scales(t, x)
        mean, spread = self.mean[labels][:, None], self.spread[labels][:, None]
        return b * (x - a * mean) / (a**2 * spread**2 + b**2)


class GaussianGenerator(nn.Module):
    """x = mean_c + spread_c z. Its parameters are held like a generator's: in a "denoiser" of the same making as the teacher."""

    takes = ("labels",)

    def __init__(self, like: GaussianScore) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(like)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.denoiser.mean[labels][:, None] + self.denoiser.spread[labels][:, None] * z


class Made:
    """An objective that has been set up and started, with its networks."""

    def __init__(self, student: nn.Module, teacher: nn.Module, shape: tuple[int, ...], **values: Any) -> None:
        self.objective = SFD(**{"forget_weight": 1.0, "fake_forget_weight": 1.0, **values})
        spec = ModelSpec(shape[0], shape)
        self.connectors = self.objective.setup(Context(spec, spec, CLASSES, torch.zeros(1), 5, 10, 10))
        self.teacher, self.student, self.shape = teacher.requires_grad_(False).eval(), Tapped(student, {}), shape
        self.objective.start(Start(student, self.teacher, lambda: iter(())), self.connectors)

    @property
    def fake(self) -> nn.Module:
        return self.connectors["fake_score"]

    def batch(self, rows: int, first: int = 0, progress: Progress = STEP) -> Batch:
        ids = torch.arange(first, first + rows)
        plain = Batch(torch.zeros(rows, *self.shape, dtype=torch.float64), 1 + ids % (CLASSES - 1), ids, ids, {})
        prepared = self.objective.prepare(plain, progress)
        return prepared._replace(extra={k: v.double() if v.is_floating_point() else v for k, v in prepared.extra.items()})

    def terms(self, phase: str, batch: Batch) -> dict[str, Term]:
        """As the loop has it: what the phase does not train takes no gradient."""
        self.student.requires_grad_(phase == STUDENT)
        self.fake.requires_grad_(phase == FAKE)
        return self.objective.compute(self.student, batch, Signal(None, {}), phase, self.connectors, None)[0]

    def loss(self, phase: str, batch: Batch, progress: Progress = STEP) -> Tensor:
        weights = self.objective.weights(progress)
        return torch.stack([weights[k] * term.sum for k, term in self.terms(phase, batch).items()]).sum() / len(batch.ids)

    def gradient(self, batch: Batch) -> Tensor:
        """Of the student phase with respect to the generator, as one vector."""
        loss = self.loss(STUDENT, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.student.parameters()))])


MEAN, SPREAD = [-1.0, 0.5, 1.5, -0.5], [0.3, 0.5, 0.2, 0.4]


def gaussians(**values: Any) -> Made:
    teacher = GaussianScore(MEAN, SPREAD)
    return Made(GaussianGenerator(teacher), teacher, (1,), **values)


def networks(**values: Any) -> Made:
    torch.manual_seed(0)
    teacher = MLPDenoiser(CLASSES, 2, width=16).double()
    return Made(OneStepGenerator(copy.deepcopy(teacher)), teacher, (2,), **values)


def moved(made: Made, by: float = 0.1) -> Made:
    """The fake score and the generator have left the teacher, as after some steps."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*made.fake.parameters(), *made.student.parameters()):
            p += by * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return made
