"""CRD: Contrastive Representation Distillation (Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699).

    L = CE + beta * (l(vs, bank_t) + l(vt, bank_s)),   l = -log s+/(s+ + K/N) - sum_neg log (K/N)/(s- + K/N),   s = exp(v.m / T) / Z

vs and vt are the pooled features through a linear layer and L2 normalisation, both layers trained. The embedding of one
side is scored against the memory bank of the OTHER side: its own sample's row, and K rows drawn without replacement from
other classes. Z of a side is N times the mean of exp(v.m / T) over the first batch and is fixed from then on. After every
step the banks move half-way to the new embeddings and are normalised again.

Unit: nats per sample. Constants: D 128, K 16384, T 0.07, momentum 0.5, beta 0.8, CE 1 are the authors' CIFAR-100 setting
(HobbitLong/RepDistiller); kd_weight 1 (at T 4) there is the row "CRD+KD".

coupling is "batch" for the sake of Z alone, which the first step's loss already needs: split into micro-batches, each
would have its own. The distinct samples of a step are expected to have distinct ids.

Cost. State: two banks of 4 N D bytes (CIFAR-100: 2 x 25.6 MB; ImageNet: 2 x 0.66 GB). A step scores all B x N pairs per side
and picks (B N numbers, twice with the gradient), because gathering B K D bank entries is more whenever N < K D. `prepare`
draws 63 bits per (sample, bank row) and keeps the K smallest, in blocks of 2^24 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun import rng
from kdrun.errors import Problem, Refused
from kdrun.losses.contrast import bank_scores, noise_contrastive
from kdrun.losses.divergence import cross_entropy, kl_divergence
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_nonnegative, require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Term

_BLOCK = 1 << 24  # (sample, bank row) pairs drawn at a time: 128 MiB of int64


class Embedding(nn.Module):
    """Linear to `width`, then L2 norm 1.  [B, ...] -> [B, width], float32 or wider."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(shape), width)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(widen(self.linear(x.flatten(1))), dim=1)


@dataclass(eq=False)
class CRD(Objective):
    coupling: ClassVar[Literal["none", "batch"]] = "batch"

    ce_weight: float = 1.0
    beta: float = 0.8
    kd_weight: float = 0.0
    kd_temperature: float = 4.0
    width: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    student_tap: str = "pooled"
    teacher_tap: str = "pooled"

    def __post_init__(self) -> None:
        require_nonnegative(self, "ce_weight", "beta", "kd_weight")
        require_positive(self, "kd_temperature", "width", "negatives", "temperature")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: legal range [0, 1)")

    def needs(self) -> Needs:
        taps = bool(self.beta)
        return Needs(
            teacher_logits=self.kd_weight > 0,
            teacher_taps=(self.teacher_tap,) * taps,
            student_taps=(self.student_tap,) * taps,
        )

    def setup(self, context: Context) -> Connectors:
        """Both embeddings, and the state: banks, constants Z, the bank's row of every id.

        Raises Refused where some class leaves fewer than `negatives` samples of other classes.
        """
        if not self.beta:
            return nn.ModuleDict()
        assert context.teacher is not None
        self._check_negatives(context.labels)
        self._labels = context.labels  # [ids]
        self._bank_ids = (context.labels >= 0).nonzero().squeeze(1)  # [N]
        self._row_of = torch.full_like(context.labels, -1)  # [ids]
        self._row_of[self._bank_ids] = torch.arange(len(self._bank_ids), device=context.labels.device)
        self._negatives_key = rng.key(context.seed, "crd_negatives")
        self._bank_student = self._initial_bank(rng.key(context.seed, "crd_bank", "student"))
        self._bank_teacher = self._initial_bank(rng.key(context.seed, "crd_bank", "teacher"))
        # log Z of the student's and of the teacher's scores; NaN until the first step has set them.
        self._log_z = torch.full((2,), torch.nan, device=context.labels.device)
        return nn.ModuleDict(
            {
                "student": Embedding(context.student.taps[self.student_tap], self.width),
                "teacher": Embedding(context.teacher.taps[self.teacher_tap], self.width),
            }
        )

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "contrast": self.beta, "kd": self.kd_weight}

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Adds extra["crd_rows"] [B, 1 + K] int64: the bank row of the sample itself, then those of its negatives."""
        if not self.beta:
            return batch
        ids, views = batch.ids.to(self._labels.device), batch.view.to(self._labels.device)
        block = max(1, _BLOCK // len(self._bank_ids))
        negatives = [self._draw_negatives(*part) for part in zip(ids.split(block), views.split(block), strict=True)]
        rows = torch.cat([self._row_of[ids][:, None], torch.cat(negatives)], dim=1)
        return batch._replace(extra={**batch.extra, "crd_rows": rows.to(batch.ids.device)})

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}
        if self.kd_weight:
            assert signal.logits is not None
            kl = kl_divergence(output.logits, signal.logits.detach(), self.kd_temperature)
            terms["kd"] = Term(self.kd_temperature**2 * kl.sum(), "sample")
        if self.beta:
            terms["contrast"] = Term(self._contrast(output, signal, batch.extra["crd_rows"], connectors).sum(), "sample")
        return terms

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        if not self.beta:
            return
        first = self._log_partition(kept["crd_log_mean"])
        self._log_z.copy_(torch.where(self._log_z.isnan(), first, self._log_z))
        rows = self._row_of[ids]
        for bank, name in ((self._bank_student, "crd_student"), (self._bank_teacher, "crd_teacher")):
            moved = self.momentum * bank[rows] + (1 - self.momentum) * kept[name].to(bank.dtype)
            bank.index_copy_(0, rows, F.normalize(moved, dim=1))

    def to(self, device: Any) -> None:
        if self.beta:
            for name in ("_labels", "_bank_ids", "_row_of", "_bank_student", "_bank_teacher", "_log_z"):
                setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Any]:
        """bank_student and bank_teacher float32 [N, D], log_z float32 [2]; references, as those of nn.Module."""
        if not self.beta:
            return {}
        return {"bank_student": self._bank_student, "bank_teacher": self._bank_teacher, "log_z": self._log_z}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is not of this objective on this data set."""
        mine = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in mine.items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != given:
            raise ValueError(f"the state of CRD here is {shapes}, but was given {given}")
        for name, value in mine.items():
            value.copy_(state[name])

    def _contrast(self, output: Output, signal: Signal, rows: Tensor, connectors: Connectors) -> Tensor:
        """The loss of both sides, [B]; keeps the embeddings and the means that Z is made of."""
        student = connectors["student"](output.taps[self.student_tap])
        teacher = connectors["teacher"](signal.taps[self.teacher_tap].detach())
        scores = [
            bank_scores(embedded, bank, rows, self.temperature)
            for embedded, bank in ((student, self._bank_teacher), (teacher, self._bank_student))
        ]
        log_mean = torch.stack([s.detach().logsumexp(1) - math.log(rows.shape[1]) for s in scores], dim=1)
        output.keep.update(crd_student=student.detach(), crd_teacher=teacher.detach(), crd_log_mean=log_mean)
        # One graph for the first and all later steps, and no look at the device: the branch is in the data.
        log_z = torch.where(self._log_z.isnan(), self._log_partition(log_mean), self._log_z)
        population = len(self._bank_ids)
        return noise_contrastive(scores[0] - log_z[0], population) + noise_contrastive(scores[1] - log_z[1], population)

    def _log_partition(self, log_mean: Tensor) -> Tensor:
        """log Z = log(N * mean over the step of exp(score)) of both sides, [2], from the means of the samples [B, 2]."""
        return math.log(len(self._bank_ids)) + log_mean.logsumexp(0) - math.log(log_mean.shape[0])

    def _draw_negatives(self, ids: Tensor, views: Tensor) -> Tensor:
        """K bank rows of other classes per sample, without replacement, [B, K]: those with the smallest random keys."""
        keys = rng.bits(self._negatives_key, ids[:, None], views[:, None], self._bank_ids[None, :])
        own_class = self._labels[self._bank_ids][None, :] == self._labels[ids][:, None]
        return keys.masked_fill_(own_class, torch.iinfo(torch.int64).max).topk(self.negatives, largest=False).indices

    def _initial_bank(self, key: int) -> Tensor:
        """Uniform in +-1/sqrt(D / 3), float32 [N, D], keyed by id: a subset of the data has the same rows."""
        columns = torch.arange(self.width, device=self._bank_ids.device)
        return (2 * rng.uniform(key, self._bank_ids[:, None], columns[None, :]) - 1) / math.sqrt(self.width / 3)

    def _check_negatives(self, labels: Tensor) -> None:
        sizes = labels[labels >= 0].bincount()
        available = int(sizes.sum() - sizes.max())
        if self.negatives > available:
            raise Refused(
                Problem(
                    what=f"{self.negatives} negatives are to be drawn without replacement from samples of other classes, of which class "
                    f"{int(sizes.argmax())} leaves {available}",
                    key="objective.negatives",
                    remedy=f"objective.negatives={available} or fewer",
                )
            )
