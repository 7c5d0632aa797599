"""How much a sample listens to its teacher: the loss that sample-wise weights share, the weighting rules, and their log.

    l_i = alpha_i tau^2 KL(p_tau(zt_i) || p_tau(zs_i)) + (1 - alpha_i) CE(zs_i, y_i)

This is the inner loss of TGeo-KD (Hu et al., ICLR 2024, arXiv 2312.15112); the rules here are its rivals, given the same loss, so that
alpha alone differs. Their formulas are those of the authors' code (Chengming0501/TGeo-KD) with its slips mended: no label loss on
probabilities, tau^2 in every rule, WLS without gradient, RW clamped, ANL truly annealed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.divergence import cross_entropy, kl_divergence
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Context, Output, Progress, Signal, Term

GROUPS = ("corrupted", "noisy", "clean")  # the teacher speaks of another sample; the label was redrawn; neither


def inner_losses(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tau^2 KL, CE) of each sample.  Logits [B, C], targets [B] -> two of [B], nats."""
    return temperature**2 * kl_divergence(student, teacher, temperature), cross_entropy(student, targets)


def annealed(progress: Progress) -> float:
    """ANL: from 1 at the first step to 0 at the last, linearly."""
    return 1 - progress.step / max(progress.total_steps - 1, 1)


def ada(teacher: Tensor, targets: Tensor) -> Tensor:
    """ADA: max(0, T_y - mean of the other classes' T), T = softmax(teacher).  [B, C], [B] -> [B]."""
    probabilities = widen(teacher).softmax(-1)
    right = probabilities.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return (right - (1 - right) / (teacher.shape[1] - 1)).clamp(min=0)


def wls(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """WLS: 1 - exp(-CE_student / (CE_teacher + 1e-7)).  [B, C], [B, C], [B] -> [B], without gradient.

    Zhou et al., "Rethinking Soft Labels for Knowledge Distillation", ICLR 2021, arXiv 2102.00650.
    """
    mine, theirs = cross_entropy(student.detach(), targets), cross_entropy(teacher.detach(), targets)
    return -torch.expm1(-mine / (theirs + 1e-7))


def oracle(groups: Tensor) -> Tensor:
    """The weight that a known world asks for: 0 where the teacher is corrupted, 1 where the label is noisy, 1/2 else.  [B] -> [B]."""
    return torch.tensor([0.0, 1.0, 0.5], device=groups.device)[groups]


def sample_groups(signal: Signal, batch: Batch) -> Tensor:
    """Which of GROUPS each sample is in, int64 [B]: the first that fits. What the world does not tell is taken for clean."""
    nothing = torch.zeros_like(batch.ids, dtype=torch.bool)
    corrupted, noisy = signal.taps.get("corrupted", nothing), batch.extra.get("noisy", nothing)
    return torch.where(corrupted, 0, torch.where(noisy, 1, 2))


class FreeWeights:
    """RW: one free alpha for each sample, moved by its own Adam along the gradient of the TRAINING loss and clamped to [0, 1].

    State by sample id, float32 [ids] each: alpha (at first 1/2), Adam's two moments and its count of steps.
    """

    NAMES = ("alpha", "first", "second", "steps")
    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Kingma and Ba, ICLR 2015, Algorithm 1

    def __init__(self, ids: int, lr: float) -> None:
        self.lr = lr
        self.state = {name: torch.full((ids,), 0.5 if name == "alpha" else 0.0) for name in self.NAMES}

    def move(self, ids: Tensor, gradient: Tensor) -> None:
        """One step of the samples `ids` [B], which are distinct; `gradient` [B] is d l_i / d alpha_i."""
        alpha, first, second, steps = (self.state[name][ids] for name in self.NAMES)
        steps = steps + 1
        first, second = first.lerp(gradient, 1 - self.BETA1), second.lerp(gradient**2, 1 - self.BETA2)
        ahead = first / (1 - self.BETA1**steps) / ((second / (1 - self.BETA2**steps)).sqrt() + self.EPS)
        moved = (alpha - self.lr * ahead).clamp(0, 1)
        for name, rows in zip(self.NAMES, (moved, first, second, steps), strict=True):
            self.state[name].index_copy_(0, ids, rows)


class AlphaLog:
    """The newest weight of every training sample and the group it belongs to, by id; -1 for samples not seen yet."""

    def __init__(self, ids: int) -> None:
        self.state = {"log_alpha_of": torch.full((ids,), -1.0), "log_group_of": torch.full((ids,), -1, dtype=torch.int64)}

    def record(self, ids: Tensor, alpha: Tensor, groups: Tensor) -> None:
        self.state["log_alpha_of"].index_copy_(0, ids, alpha.float())
        self.state["log_group_of"].index_copy_(0, ids, groups)

    def means(self) -> dict[str, float]:
        """alpha_mean, the mean of every group that occurs, and alpha_gap = alpha_noisy - alpha_corrupted; {} before the first step."""
        alpha, group = self.state["log_alpha_of"], self.state["log_group_of"]
        members = {"alpha_mean": group >= 0} | {f"alpha_{name}": group == i for i, name in enumerate(GROUPS)}
        found = {name: float(alpha[these].double().mean()) for name, these in members.items() if bool(these.any())}
        if {"alpha_noisy", "alpha_corrupted"} <= found.keys():
            found["alpha_gap"] = found["alpha_noisy"] - found["alpha_corrupted"]
        return found


@dataclass(eq=False)
class SampleWeighted(Objective):
    """Base of the objectives whose loss is the mean of l_i; a subclass says what alpha is. alpha is a constant of the student's loss."""

    temperature: float = 4.0

    def __post_init__(self) -> None:
        require_positive(self, "temperature")

    def setup(self, context: Context) -> Connectors:
        self._log = AlphaLog(len(context.labels))
        return torch.nn.ModuleDict()

    def alpha(self, student: Tensor, teacher: Tensor, signal: Signal, batch: Batch, connectors: Connectors) -> Tensor:
        """alpha [B] in [0, 1], without gradient, from detached logits [B, C] of both."""
        raise NotImplementedError

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"kd": 1.0, "ce": 1.0}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        assert signal.logits is not None
        teacher = signal.logits.detach()
        kd, ce = inner_losses(output.logits, teacher, batch.targets, self.temperature)
        with torch.no_grad():
            alpha = self.alpha(output.logits.detach(), teacher, signal, batch, connectors).to(kd.dtype)
        output.keep.update(alpha=alpha, alpha_group=sample_groups(signal, batch), alpha_slope=(kd - ce).detach())
        return {"kd": Term((alpha * kd).sum(), "sample"), "ce": Term(((1 - alpha) * ce).sum(), "label")}

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        self._log.record(ids, kept["alpha"], kept["alpha_group"])

    def report(self) -> dict[str, float]:
        """Means of the samples' newest weights, which are those of the last epoch: see `AlphaLog.means`."""
        return self._log.means()

    def stored(self) -> tuple[dict[str, Tensor], ...]:
        """The parts of the state, by name each."""
        return (self._log.state,)

    def to(self, device: Any) -> None:
        for part in self.stored():
            part.update({name: value.to(device) for name, value in part.items()})

    def state_dict(self) -> dict[str, Any]:
        """References, as those of nn.Module."""
        return {name: value for part in self.stored() for name, value in part.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is not of this objective on this data set."""
        mine = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if mine != given:
            raise ValueError(f"the state of {type(self).__name__} here is {mine}, but was given {given}")
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def one_hot(targets: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[B] -> [B, C]; a target of -1 gives zeros."""
    return F.one_hot(targets.clamp(min=0), classes).to(dtype) * (targets >= 0).to(dtype)[:, None]
