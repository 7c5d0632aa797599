"""TGeo-KD: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation (Hu et al., ICLR 2024, arXiv 2312.15112).

    L = mean_i [ alpha_i tau^2 KL(p_tau(zt_i) || p_tau(zs_i)) + (1 - alpha_i) CE(zs_i, y_i) ],   alpha_i = sigmoid(MLP_w(phi_i))

phi_i are C numbers each of the student S, the teacher T, the label G and Tb, the teacher's mean over the training samples of that
label, and the squares of the edges between them. w is learned bilevel, on validation rows that never move the student:

    min_w mean_v CE(zs_v(theta'(w)), y_v),   theta'(w) = theta - inner_lr * d L / d theta

one unrolled step of plain SGD, whose gradient with respect to w is exact: it goes through the student's gradient on the batch. S is
a constant in phi. Every step has two phases: "controller" makes that virtual step on copies (weights and BatchNorm statistics stay as
they are) and moves w; "student" computes alpha anew and moves the student on L. How the authors solve the outer problem is not
published; one step is ours, and the usual choice. Their released script gives the controller no gradient at all.

Unit: nats per sample (inner loss), nats per validation row (outer loss). Constants: option3, hidden [32, 16], LeakyReLU 0.01 are the
authors' code (Chengming0501/TGeo-KD); tau 4, inner_lr and outer_every are ours (tau 1.5 in its tabular script). No weight decay on the
controller: coupled into Adam, it is larger than these small gradients and alpha collapses to a constant.

coupling is "batch": theta' is a step on the whole batch. A network whose forward takes more than its input cannot be the student.
Cost: about three ordinary steps, with outer_every = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdrun.losses.divergence import cross_entropy
from kdrun.losses.precision import widen, without_autocast
from kdrun.objective._checks import require_legal, require_positive
from kdrun.objective._weighting import SampleWeighted, inner_losses, one_hot
from kdrun.objective.base import Gather, gathered
from kdrun.types import Batch, Connectors, Context, Needs, Progress, Signal, Start, Term

PROBABILITIES = ("S", "T", "G", "Tb")
DISTANCES = ("Tb-S", "G-S", "T-S")
ANGLES = ("Tb-S*G-S", "T-S*G-S")
# The sets of the authors' code by their names there, and the steps of the paper's ablation (Table 5): which blocks of C numbers phi has.
FEATURES: dict[str, tuple[str, ...]] = {
    "option1": PROBABILITIES,
    "option2": DISTANCES,
    "option3": (*PROBABILITIES, *DISTANCES, "T-G", "Tb-G"),
    "option4": (*PROBABILITIES, *ANGLES),
    "option5": (*DISTANCES, *ANGLES),
    "option6": (*PROBABILITIES, *DISTANCES, *ANGLES),
    "option7": ANGLES,
    "sg_tg": ("S", "T", "G", "G-S", "T-G"),  # neither S-T nor Tb
    "intra": ("S", "T", "G", "G-S", "T-G", "T-S"),  # the triangle of one sample, without Tb
}
Features = Literal["option1", "option2", "option3", "option4", "option5", "option6", "option7", "sg_tg", "intra"]


def geometry(blocks: tuple[str, ...], student: Tensor, teacher: Tensor, targets: Tensor, class_mean: Tensor) -> Tensor:
    """phi: the blocks side by side.  Logits [B, C] of both, targets [B], class_mean [C, C] by label -> [B, len(blocks) C].

    "S" is a point, "T-S" the elementwise square of an edge, "T-S*G-S" the product of two edges.
    """
    points = {"S": widen(student).softmax(-1), "T": widen(teacher).softmax(-1)}
    points["G"] = one_hot(targets, student.shape[1], points["S"].dtype)
    points["Tb"] = class_mean.to(points["S"].dtype)[targets.clamp(min=0)]

    def edge(name: str) -> Tensor:
        one, other = name.split("-")
        return points[one] - points[other]

    def block(name: str) -> Tensor:
        if "*" in name:
            first, second = name.split("*")
            return edge(first) * edge(second)
        return edge(name).square() if "-" in name else points[name]

    return torch.cat([block(name) for name in blocks], dim=1)


class Controller(nn.Sequential):
    """phi [B, width] -> alpha [B] in (0, 1), float32 or wider also under autocast."""

    def __init__(self, width: int, hidden: list[int]) -> None:
        super().__init__()
        for units in hidden:
            self.append(nn.Linear(width, units))
            self.append(nn.LeakyReLU(0.01))
            width = units
        self.append(nn.Linear(width, 1))

    def forward(self, phi: Tensor) -> Tensor:
        with without_autocast(phi):
            return super().forward(phi).squeeze(1).sigmoid()


def outer_losses(
    network: nn.Module,
    alpha: Callable[[Tensor], Tensor],
    batch: Batch,
    teacher: Tensor,
    held_out: tuple[Tensor, Tensor],
    temperature: float,
    inner_lr: float,
) -> Tensor:
    """CE of each validation row after the virtual step of the student, [V], with gradient to whatever `alpha` depends on.

    `alpha` gives [B] from the student's detached logits [B, C]; `batch` and `teacher` [B, C] are what the step is made on, `held_out` the
    validation inputs [V, ...] and targets [V]. The network's own weights, gradients and buffers are not touched.
    """
    theta = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}

    def ask(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        # Fresh copies of the statistics: a BatchNorm in training mode writes into those that it is given.
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        logits: Tensor = functional_call(network, {**weights, **buffers}, (inputs,))
        return logits

    logits = ask(theta, batch.inputs)
    kd, ce = inner_losses(logits, teacher.detach(), batch.targets, temperature)
    weight = alpha(logits.detach())
    labels = (batch.targets >= 0).sum().clamp(min=1)
    inner = (weight * kd).sum() / len(kd) + ((1 - weight) * ce).sum() / labels
    slopes = torch.autograd.grad(inner, list(theta.values()), create_graph=True, allow_unused=True)
    moved = {name: p if g is None else p - inner_lr * g for (name, p), g in zip(theta.items(), slopes, strict=True)}
    return cross_entropy(ask(moved, held_out[0]), held_out[1])


@dataclass(eq=False)
class TGeoKD(SampleWeighted):
    coupling: ClassVar[Literal["none", "batch"]] = "batch"
    phases: ClassVar[tuple[str, ...]] = ("controller", "student")
    compilable: ClassVar[bool] = False

    features: Features = "option3"
    hidden: list[int] = field(default_factory=lambda: [32, 16])
    inner_lr: float = 0.05
    outer_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_legal(self, "features")
        require_positive(self, "inner_lr", "outer_every")
        if any(units < 1 for units in self.hidden):
            raise ValueError(f"hidden={self.hidden}: legal range [1, inf) for every layer")

    def needs(self) -> Needs:
        return Needs(teacher_logits=True, held_out=True)

    def setup(self, context: Context) -> Connectors:
        """The controller, and Tb [C, C], uniform until `start` has heard the teacher."""
        super().setup(context)
        self._class_mean = {"class_mean": torch.full((context.classes, context.classes), 1 / context.classes)}
        width = len(FEATURES[self.features]) * context.classes
        return nn.ModuleDict({"controller": Controller(width, self.hidden)})

    def start(self, start: Start, connectors: Connectors) -> None:
        """Tb: the mean of T over the training samples of each given label; uniform for a label that none has."""
        classes = len(self._class_mean["class_mean"])
        total, count = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
        for batch, signal in start.rows():
            assert signal.logits is not None
            labels = one_hot(batch.targets, classes, torch.float64).cpu()
            total += labels.T @ signal.logits.double().softmax(-1).cpu()
            count += labels.sum(0)
        mean = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), 1 / classes)
        self._class_mean["class_mean"].copy_(mean)

    def units(self) -> tuple[str, ...]:
        return (*super().units(), "held_out")

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        return {**super().count(batch), "held_out": len(batch.extra["held_out_targets"])}

    def active(self, phase: str, progress: Progress) -> bool:
        return phase == "student" or progress.step % self.outer_every == 0

    def trained_in(self, phase: str) -> tuple[str, ...]:
        return ("connectors.controller.",) if phase == "controller" else ("student.",)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"outer": 1.0, **super().weights(progress)}

    def alpha(self, student: Tensor, teacher: Tensor, signal: Signal, batch: Batch, connectors: Connectors) -> Tensor:
        blocks = FEATURES[self.features]
        alpha: Tensor = connectors["controller"](geometry(blocks, student, teacher, batch.targets, self._class_mean["class_mean"]))
        return alpha

    def compute(
        self, student: Any, batch: Batch, signal: Signal, phase: str, connectors: Connectors, gather: Gather | None
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """In "controller" the validation loss after the virtual step, in "student" the inner loss."""
        if phase == "student":
            return super().compute(student, batch, signal, phase, connectors, gather)
        if gather is not None:
            inputs = gather(batch.inputs)
            signal, batch = gathered(signal, batch, gather)
            batch = batch._replace(inputs=inputs)
        assert signal.logits is not None
        teacher = signal.logits.detach()
        losses = outer_losses(
            student.module,
            lambda logits: self.alpha(logits, teacher, signal, batch, connectors),
            batch,
            teacher,
            (batch.extra["held_out_inputs"], batch.extra["held_out_targets"]),
            self.temperature,
            self.inner_lr,
        )
        return {"outer": Term(losses.sum(), "held_out")}, {}

    def stored(self) -> tuple[dict[str, Tensor], ...]:
        return (*super().stored(), self._class_mean)
