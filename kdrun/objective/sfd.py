"""SFD: Score Forgetting Distillation (Chen, Zhang, Zhou, ICLR 2025, arXiv 2409.11219).

    L = kept_weight * l(G(z, c); c, c) + forget_weight * l(G(z, c_f); c_o, c_f)
    l(x; p, s) = (1 / omega) <f_phi - f_psi, (f_phi - x) - alpha (f_phi - f_psi)>,   f_phi = x0(phi, x_t, t, p),  f_psi = x0(psi, x_t, t, s)
    L_psi = fake_kept_weight * |psi(x_t, t, c) - e|^2 + fake_forget_weight * |psi(x_t, t, c_f) - e|^2,   x = G(z, .) without gradient

A one-step generator G is distilled from a frozen noise predictor phi by the SiD loss (Zhou et al., ICML 2024, arXiv 2404.04057),
without data: for a label c that is kept towards phi's score of c, for the label c_f that is to be forgotten towards phi's
score of the override label c_o. psi, the "fake score", is trained in turn on the generator's own samples. Gradient reaches G
through x, x_t and both frozen networks. With both forget weights 0 this is SiD on the labels that the source draws.

Labels come with the batch, whose inputs are not looked at; latents, times and noise are drawn by the sample's id.

`override` null draws c_o for every sample from the kept labels. `variant` diff_instruct detaches both predictions.
`forget_from_step`: up to that step c_f is distilled as itself with the weight of one label among all, which is SiD on all
labels; the authors' two stages in one, whose optimisers and moving average go on where they restart theirs.

Unit: squared data units over the mean error omega (student), squared noise units (fake_score), per sample; sums over its
elements. Constants: alpha 1.2, t in {38, ..., 711}, weights 1 and 0.01, c_f 0, c_o 1 are the authors' for CIFAR-10 and STL-10.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.errors import Problem, Refused
from kdrun.losses.score import diff_instruct_loss, generator_loss, noise_error
from kdrun.objective._checks import require_nonnegative
from kdrun.objective.base import Gather, Objective
from kdrun.student.denoiser import NO_SCHEDULE, schedule_of
from kdrun.types import Batch, Connectors, Context, Needs, Progress, Signal, Start, Term

Variant = Literal["sid", "diff_instruct"]
FAKE, STUDENT = "fake_score", "student"
# The terms of a phase: of the kept labels, of the forgotten one.
TERMS = {FAKE: ("fake_kept", "fake_forget"), STUDENT: ("kept", "forget")}


@dataclass(eq=False)
class SFD(Objective):
    phases: ClassVar[tuple[str, ...]] = (FAKE, STUDENT)

    alpha: float = 1.2
    t_min: int = 38
    t_max: int = 712
    forget: int = 0
    override: int | None = 1
    kept_weight: float = 1.0
    forget_weight: float = 0.01
    fake_kept_weight: float = 1.0
    fake_forget_weight: float = 0.01
    variant: Variant = "sid"
    guidance: float = 1.0
    forget_from_step: int = 0

    def __post_init__(self) -> None:
        require_nonnegative(self, "guidance", "alpha", "t_min", "t_max", "forget", "forget_from_step")
        require_nonnegative(self, *(f"{name}_weight" for names in TERMS.values() for name in names))
        if self.override is not None:
            require_nonnegative(self, "override")
        if not self.t_min < self.t_max:
            raise ValueError(f"t_max={self.t_max}: legal range ({self.t_min}, the network's steps]")
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant={self.variant!r}: legal values {', '.join(get_args(Variant))}")

    def needs(self) -> Needs:
        return Needs(teacher_network=True)

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        """The student must be a generator around a network like the teacher, and the batches' labels must leave out the forgotten one:
        it has terms of its own."""
        found: list[Problem] = []
        shapes = [
            None if n is None else {k: v.shape for k, v in n.state_dict().items()} for n in (getattr(student, "denoiser", None), teacher)
        ]
        if shapes[0] is None or shapes[0] != shapes[1]:
            remedy = "a pair such as teacher=denoiser_mlp student=generator_mlp, with the same sizes"
            found.append(Problem("the student is no generator around a network like the teacher", "student", "", remedy))
        elif teacher is not None:
            found += self._time_problems(student.denoiser, teacher)  # type: ignore[arg-type]
        if self.guidance != 1 and getattr(teacher, "null_label", None) is None:
            remedy = "teacher.null_label=true student.null_label=true, or objective.guidance=1"
            found.append(
                Problem("guidance needs a label that stands for none, and the networks have none", "objective.guidance", "", remedy)
            )
        forgets = self.forget_weight or self.fake_forget_weight
        if forgets and self.forget not in (tree["source"].get("exclude") or ()):
            what = f"label {self.forget} is to be forgotten, and the batches draw it among those to keep"
            found.append(Problem(what, "source.exclude", "", f'source=labels "source.exclude=[{self.forget}]"'))
        return found

    def _time_problems(self, student: nn.Module, teacher: nn.Module) -> list[Problem]:
        """The two networks must mean the same noise by the same time, and the times drawn must be there."""
        own, theirs = schedule_of(student), schedule_of(teacher)
        if own is None or theirs is None:
            return [NO_SCHEDULE]
        if len(own) != len(theirs) or not torch.equal(own.abar, theirs.abar):
            return [Problem("teacher and student have different noise schedules", "student.beta_schedule", "", "the teacher's")]
        if self.t_max > len(own):
            what = f"t_max={self.t_max}, and the noise schedule has {len(own)} steps"
            return [Problem(what, "objective.t_max", "", f"legal range ({self.t_min}, {len(own)}]")]
        return []

    def setup(self, context: Context) -> Connectors:
        """Raises `Refused` for a label that the data set does not have, and for one class, which leaves none to keep."""
        labels = {"forget": self.forget} | ({} if self.override is None else {"override": self.override})
        last = context.classes - 1
        legal = f"a class index from 0 to {last}"
        wrong = [Problem(f"there is no label {v}", f"objective.{k}", "", legal) for k, v in labels.items() if v > last]
        if wrong or not last:
            raise Refused(wrong or Problem("one class leaves none to keep", "objective.forget", "", "a data set of at least two classes"))
        self._seed, self._others, self._device = context.seed, last, "cpu"
        return super().setup(context)

    def start(self, start: Start, connectors: Connectors) -> None:
        """The teacher's weights into the generator and into the new connector "fake_score"."""
        assert start.teacher is not None
        start.student.denoiser.load_state_dict(start.teacher.state_dict())  # type: ignore[union-attr]
        connectors["fake_score"] = copy.deepcopy(start.teacher).requires_grad_(True)
        self._teacher = start.teacher
        schedule = schedule_of(start.teacher)
        assert schedule is not None
        self._schedule = schedule.to(self._device)

    def to(self, device: Any) -> None:
        self._device = device

    def units(self) -> tuple[str, ...]:
        return ("sample",)

    def trained_in(self, phase: str) -> tuple[str, ...]:
        return ("connectors.fake_score.",) if phase == FAKE else ("student.",)

    def weights(self, progress: Progress) -> dict[str, float]:
        found = {name: float(getattr(self, f"{name}_weight")) for names in TERMS.values() for name in names}
        if progress.step < self.forget_from_step:
            found |= {forget: found[kept] / self._others for kept, forget in TERMS.values()}
        return found

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Adds for each phase extra["<phase>_z"], ["_noise"] [B, K, ...] and ["_t"], ["_labels"], ["_teacher_labels"] int64 [B, K].

        K is 2, a kept and the forgotten label, or 1 where the forgotten one has no weight in this phase.
        """
        weights, extra = self.weights(progress), dict(batch.extra)
        step = torch.full_like(batch.ids, progress.step)
        forgotten = torch.full_like(batch.targets, self.forget)
        override = forgotten if progress.step < self.forget_from_step else self._override(batch, progress)
        for phase, (_, forget) in TERMS.items():
            parts = 2 if weights[forget] else 1
            shape = (parts, *batch.inputs.shape[1:])
            for name in ("z", "noise"):
                extra[f"{phase}_{name}"] = rng.normal(rng.key(self._seed, "sfd", phase, name), shape, batch.ids, step)
            counters = batch.ids[:, None], progress.step, torch.arange(parts, device=batch.ids.device)
            drawn = rng.integers(rng.key(self._seed, "sfd", phase, "t"), self.t_max - self.t_min, *counters)
            extra[f"{phase}_t"] = self.t_min + drawn
            extra[f"{phase}_labels"] = torch.stack([batch.targets, forgotten][:parts], dim=1)
            extra[f"{phase}_teacher_labels"] = torch.stack([batch.targets, override][:parts], dim=1)
        return batch._replace(extra=extra)

    def _override(self, batch: Batch, progress: Progress) -> Tensor:
        """c_o of every sample, int64 [B]."""
        if self.override is not None:
            return torch.full_like(batch.targets, self.override)
        drawn = rng.integers(rng.key(self._seed, "sfd", "override"), self._others, batch.ids, progress.step)
        return drawn + (drawn >= self.forget)

    def compute(
        self, student: Any, batch: Batch, signal: Signal, phase: str, connectors: Connectors, gather: Gather | None
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        fake, trains_fake = connectors["fake_score"], phase == FAKE
        # Dropout acts in the network that is updated and in no other; the teacher is in evaluation mode for good.
        student.train(not trains_fake)
        fake.train(trains_fake)
        given = {k: batch.extra[f"{phase}_{k}"].flatten(0, 1) for k in ("z", "noise", "t", "labels", "teacher_labels")}
        labels, t, noise = given["labels"], given["t"], given["noise"]
        with torch.no_grad() if trains_fake else nullcontext():
            x = student(given["z"], {"labels": labels})[0]
        x_t = self._schedule.diffuse(x, t, noise)
        if trains_fake:
            loss = noise_error(self._guided(fake, x_t, labels, t), noise)
        else:
            teacher_x0 = self._schedule.to_x0(x_t, t, self._guided(self._teacher, x_t, given["teacher_labels"], t))
            fake_x0 = self._schedule.to_x0(x_t, t, self._guided(fake, x_t, labels, t))
            sid = self.variant == "sid"
            loss = generator_loss(teacher_x0, fake_x0, x, self.alpha) if sid else diff_instruct_loss(teacher_x0, fake_x0, x)
        sums = loss.view(len(batch.ids), -1).sum(0)
        return {name: Term(value, "sample") for name, value in zip(TERMS[phase], sums, strict=False)}, {}

    def _guided(self, network: Any, x_t: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        """eps_u + kappa (eps_c - eps_u) of a noise predictor, eps_u under the label that stands for none; with kappa 1 eps_c itself."""
        said: Tensor = network(x_t, labels=labels, t=t)
        if self.guidance == 1:
            return said
        free = network(x_t, labels=torch.full_like(labels, network.null_label), t=t)
        return free + self.guidance * (said - free)
