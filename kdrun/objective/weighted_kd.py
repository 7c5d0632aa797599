"""Distillation with a weight for every sample by a fixed rule: the rivals of TGeo-KD (Hu et al., ICLR 2024, arXiv 2312.15112).

    L = mean_i [ alpha_i tau^2 KL(p_tau(zt_i) || p_tau(zs_i)) + (1 - alpha_i) CE(zs_i, y_i) ]

`rule`: constant (`alpha` for all), annealed (ANL: 1 to 0 over the run), ada (ADA: how sure the teacher is of the label), wls (WLS: how much
worse than the teacher the student is), rw (RW: one free weight for each sample, learned on the training loss), oracle (0 where the teacher
is corrupted, 1 where the label is noisy, 1/2 else: a world that knows). Formulas: `kdrun.objective._weighting`.

Unit: nats per sample. Constants: rw_lr 0.01 is the authors' code (Chengming0501/TGeo-KD); tau 4 is ours for images and vectors, as the
paper's is not known (1.5 in that code's tabular script).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdrun.losses.divergence import cross_entropy
from kdrun.objective._checks import require_legal, require_positive, require_share
from kdrun.objective._weighting import FreeWeights, SampleWeighted, ada, annealed, oracle, sample_groups, wls
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Term

Rule = Literal["constant", "annealed", "ada", "wls", "rw", "oracle"]


@dataclass(eq=False)
class WeightedKD(SampleWeighted):
    rule: Rule = "constant"
    alpha_constant: float = 0.5
    rw_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require_legal(self, "rule")
        require_share(self, "alpha_constant")
        require_positive(self, "rw_lr")

    @property
    def _labels_alone(self) -> bool:
        return self.rule == "constant" and self.alpha_constant == 0

    def needs(self) -> Needs:
        return Needs(teacher_logits=not self._labels_alone, extra=("noisy",) if self.rule == "oracle" else ())

    def setup(self, context: Context) -> Connectors:
        self._free = FreeWeights(len(context.labels), self.rw_lr)
        return super().setup(context)

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Adds extra["alpha"] [B] where the rule knows it before the networks have spoken."""
        if self.rule == "annealed":
            alpha = torch.full_like(batch.ids, annealed(progress), dtype=torch.float32)
        elif self.rule == "rw":
            alpha = self._free.state["alpha"][batch.ids]
        else:
            return batch
        return batch._replace(extra={**batch.extra, "alpha": alpha})

    def alpha(self, student: Tensor, teacher: Tensor, signal: Signal, batch: Batch, connectors: Connectors) -> Tensor:
        if self.rule == "constant":
            return torch.full_like(batch.ids, self.alpha_constant, dtype=torch.float64)
        if self.rule == "ada":
            return ada(teacher, batch.targets)
        if self.rule == "wls":
            return wls(student, teacher, batch.targets)
        if self.rule == "oracle":
            return oracle(sample_groups(signal, batch))
        return batch.extra["alpha"]

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        if self._labels_alone:
            return {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}
        return super().terms(output, signal, batch, phase, connectors)

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        if self._labels_alone:
            return
        super().after_step(ids, kept, progress)
        if self.rule == "rw":
            self._free.move(ids, kept["alpha_slope"].float())

    def stored(self) -> tuple[dict[str, Tensor], ...]:
        if self._labels_alone:
            return ()
        return (*super().stored(), self._free.state) if self.rule == "rw" else super().stored()
