"""Denoising diffusion: how a noise predictor is trained from data (Ho, Jain, Abbeel, DDPM, NeurIPS 2020, arXiv 2006.11239).

    L = |eps(x_t, t, c) - e|^2 summed over a sample's elements,   x_t = a_t x0 + b_t e,   t ~ U{0, ..., T-1},   e ~ N(0, I)

With probability `label_dropout` the label c is replaced by the network's null label (classifier-free guidance, arXiv
2207.12598). The student is a noise predictor (`kdrun.student.denoiser`); time, noise and dropout are drawn by the sample's id.

Unit: squared noise units per sample. Times are those of the network's schedule, T of them. Constants: label dropout 0.1 is that of the
class-conditional DDPM teachers of SFD (arXiv 2409.11219).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdrun import rng
from kdrun.errors import Problem, Refused
from kdrun.losses.score import noise_error
from kdrun.objective._checks import require_nonnegative
from kdrun.objective.base import Objective
from kdrun.student.denoiser import NO_SCHEDULE, schedule_of
from kdrun.types import Batch, Connectors, Context, Output, Progress, Signal, Start, Term


@dataclass(eq=False)
class Denoise(Objective):
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        require_nonnegative(self, "label_dropout")
        if self.label_dropout >= 1:
            raise ValueError(f"label_dropout={self.label_dropout}: legal range [0, 1)")

    def setup(self, context: Context) -> Connectors:
        self._seed, self._null, self._device = context.seed, context.classes, "cpu"
        return super().setup(context)

    def start(self, start: Start, connectors: Connectors) -> None:
        """Raises `Refused` for a network without a noise schedule, and for labels to be dropped that it can put nothing in the place of."""
        schedule = schedule_of(start.student)
        if schedule is None:
            raise Refused(NO_SCHEDULE)
        self._schedule = schedule.to(self._device)
        if self.label_dropout and getattr(start.student, "null_label", None) is None:
            remedy = "student.null_label=true, or objective.label_dropout=0"
            raise Refused(Problem("the network has no label that stands for none", "objective.label_dropout", "", remedy))

    def to(self, device: Any) -> None:
        self._device = device

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"denoise": 1.0}

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """The rows noised; adds extra["t"], ["labels"] int64 [B] and ["noise"] [B, ...]."""
        ids, step = batch.ids, progress.step
        t = rng.integers(rng.key(self._seed, "denoise", "t"), len(self._schedule), ids, step)
        drawn = rng.normal(rng.key(self._seed, "denoise", "noise"), batch.inputs.shape[1:], ids, torch.full_like(ids, step))
        noise = drawn.to(batch.inputs.dtype)
        dropped = rng.uniform(rng.key(self._seed, "denoise", "label"), ids, step) < self.label_dropout
        labels = torch.where(dropped, self._null, batch.targets)
        extra = {**batch.extra, "t": t, "labels": labels, "noise": noise}
        return batch._replace(inputs=self._schedule.diffuse(batch.inputs, t, noise), extra=extra)

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        return {"denoise": Term(noise_error(output.logits, batch.extra["noise"]).sum(), "sample")}
