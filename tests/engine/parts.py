"""Networks and objectives of a user's own, as tests name them by `_target_` (run.allow=[tests])."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.objective.ce import CE
from kdrun.objective.fitnet import FitNet
from kdrun.student.resnet import resnet8
from kdrun.types import Batch, Connectors, Context, Output, Progress, Signal, Term


class DropoutMLP(nn.Module):
    """A student whose forward draws from torch's own random state, and that carries a buffer."""

    def __init__(self, num_classes: int, in_features: int, p: float = 0.4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, 8)
        self.dropout = nn.Dropout(p)
        self.fc = nn.Linear(8, num_classes)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.forwards += 1
        return self.fc(self.dropout(torch.relu(self.fc1(x))))


class FrozenNorm(nn.BatchNorm2d):
    """BatchNorm that uses its running statistics whatever `train()` is called: samples stay independent of each other."""

    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


def freeze_norms(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = FrozenNorm
    return network


def frozen_resnet8(num_classes: int, in_channels: int = 3) -> nn.Module:
    return freeze_norms(resnet8(num_classes, in_channels))


class FrozenFitNet(FitNet):
    """FitNet whose regressor normalises with fixed statistics."""

    def setup(self, context: Context) -> Connectors:
        connectors = super().setup(context)
        freeze_norms(connectors)
        return connectors


class MeanCE(CE):
    """What an objective must not be: its term is the micro-batch's mean times a constant, not a sum over samples."""

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        return {"ce": Term(8 * F.cross_entropy(output.logits, batch.targets), "sample")}


@dataclass(eq=False)
class Poisoned(CE):
    """Cross-entropy and a second term that goes wrong at one step, as long as the file `trap` exists."""

    trap: str = ""
    at_step: int = 0
    what: Literal["not_a_number", "infinite", "gradient"] = "not_a_number"
    weight: float = 0.5

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": 1.0, "poison": self.weight}

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        self._armed = progress.step == self.at_step and Path(self.trap).exists()
        return batch

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = super().terms(output, signal, batch, phase, connectors)
        poison = (output.logits * 0).sum()
        if self._armed and self.what == "gradient":
            poison = poison.sqrt()  # value 0, slope infinity, and infinity times 0 on the way back
        elif self._armed:
            poison = poison + {"not_a_number": torch.nan, "infinite": torch.inf}[self.what]
        return {**terms, "poison": Term(poison, "sample")}


@dataclass(eq=False)
class EveryOther(CE):
    """Cross-entropy, and at every second step that of a linear layer over the logits: at the others the layer has no gradient."""

    def setup(self, context: Context) -> Connectors:
        return nn.ModuleDict({"head": nn.Linear(context.classes, context.classes)})

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": 1.0, "head": float(progress.step % 2)}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        judged = connectors["head"](output.logits)
        head = Term(F.cross_entropy(judged, batch.targets, reduction="sum"), "sample")
        return {**super().terms(output, signal, batch, phase, connectors), "head": head}


@dataclass(eq=False)
class TwoPhases(CE):
    """A critic learns to tell the labels from the student's logits; then the student learns from the frozen critic alone."""

    phases: ClassVar[tuple[str, ...]] = ("critic", "student")

    critic_weight: float = 1.0

    def setup(self, context: Context) -> Connectors:
        self._mean = torch.zeros(context.classes)
        return nn.ModuleDict({"critic": nn.Linear(context.classes, context.classes)})

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"critic": self.critic_weight}

    def trained_in(self, phase: str) -> tuple[str, ...]:
        return ("connectors.",) if phase == "critic" else ("student.",)

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        output.keep["logits"] = output.logits.detach()
        judged = connectors["critic"](output.logits - self._mean)
        return {"critic": Term(F.cross_entropy(judged, batch.targets, reduction="sum"), "sample")}

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        self._mean.lerp_(kept["logits"].mean(0), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._mean.copy_(state["mean"])
