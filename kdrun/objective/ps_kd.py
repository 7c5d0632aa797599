"""PS-KD: Self-Knowledge Distillation with Progressive Refinement of Targets (Kim, Ji, Yoon, Hwang, ICCV 2021, arXiv 2006.12000).

    L = -sum_c r_c log softmax(z)_c,   r = (1 - alpha_t) onehot(y) + alpha_t P,   alpha_t = alpha_T t / E

P is the student's own prediction for the sample one epoch earlier, t = 1..E the epoch. No temperature, no external teacher. It is written
as two terms, (1 - alpha_t) CE + alpha_t H(P, p), which is the same number. In the first epoch there is no past and L is cross-entropy.

`memory`: "table" (the authors' code) keeps the prediction that a sample got in training mode, on its augmented view, before the update;
"model" asks a teacher that follows the student (teacher=snapshot: its weights at the end of the last epoch; teacher=ema) about the present
view. `schedule` "constant" is alpha_T from the second epoch on: no progression.

Unit: nats per sample. Constants: alpha_T 0.8 on CIFAR-100 (the authors' code, lgcnsai/PS-KD-Pytorch).

Cost of the table: 4 N C bytes (CIFAR-100 20 MB, ImageNet 5.1 GB; half with table_dtype=fp16), one gather and one scatter a step. A row that
a dropped last batch leaves out keeps what it had, at first its label. The distinct samples of a step are expected to have distinct ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.losses.divergence import cross_entropy, soft_cross_entropy
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_legal, require_share
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Context, Needs, Output, Progress, Signal, Term

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(eq=False)
class PSKD(Objective):
    alpha_T: float = 0.8
    schedule: Literal["linear", "constant"] = "linear"
    memory: Literal["table", "model"] = "table"
    table_dtype: Literal["fp32", "fp16"] = "fp32"
    table_on: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        require_share(self, "alpha_T")
        require_legal(self, "schedule", "memory", "table_dtype", "table_on")

    def needs(self) -> Needs:
        listens = self.alpha_T > 0 and self.memory == "model"
        return Needs(teacher_logits=listens, silence=listens)

    @property
    def _has_table(self) -> bool:
        return self.alpha_T > 0 and self.memory == "table"

    def setup(self, context: Context) -> Connectors:
        """The table, one row for each training sample, at first its label."""
        if self._has_table:
            ids = (context.labels >= 0).nonzero().squeeze(1)  # [N]
            self._row_of = torch.full_like(context.labels, -1)  # [ids]
            self._row_of[ids] = torch.arange(len(ids), device=ids.device)
            onehot = nn.functional.one_hot(context.labels[ids], context.classes)
            self._table = onehot.to(DTYPES[self.table_dtype])  # [N, C]
        return nn.ModuleDict()

    def alpha(self, progress: Progress) -> float:
        """alpha_t of the epoch."""
        epochs = math.ceil(progress.total_steps / progress.steps_per_epoch)
        return self.alpha_T * (progress.epoch / epochs if self.schedule == "linear" else 1.0)

    def weights(self, progress: Progress) -> dict[str, float]:
        alpha = 0.0 if progress.epoch == 1 else self.alpha(progress)
        return {"ce": 1 - alpha, "past": alpha}

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Adds extra["past"] [B, C], float32: what the table has of each sample."""
        if not self._has_table or progress.epoch == 1:
            return batch
        past = self._table[self._row_of[batch.ids.to(self._row_of.device)]].float()
        return batch._replace(extra={**batch.extra, "past": past.to(batch.ids.device)})

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}
        past = batch.extra.get("past")
        if self.memory == "model" and self.alpha_T > 0 and signal.logits is not None:
            past = widen(signal.logits.detach()).softmax(-1)
        if past is not None:
            terms["past"] = Term(soft_cross_entropy(output.logits, past).sum(), "sample")
        if self._has_table:
            output.keep["past"] = widen(output.logits.detach()).softmax(-1)
        return terms

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        if self._has_table:
            rows = self._row_of[ids.to(self._row_of.device)]
            self._table.index_copy_(0, rows, kept["past"].to(self._table))

    def to(self, device: Any) -> None:
        if self._has_table and self.table_on == "device":
            self._row_of, self._table = self._row_of.to(device), self._table.to(device)

    def state_dict(self) -> dict[str, Any]:
        """table [N, C], rows in the order of the training ids; a reference, as those of nn.Module."""
        return {"table": self._table} if self._has_table else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is not of this objective on this data set."""
        mine = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if mine != given:
            raise ValueError(f"the state of PSKD here is {mine}, but was given {given}")
        for name, value in self.state_dict().items():
            value.copy_(state[name])
