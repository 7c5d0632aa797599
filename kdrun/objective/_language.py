"""What the objectives of language models share: scored tokens, the reduction over them, and losses that never hold [tokens, vocabulary].

A subclass gives its loss of rows of logits. Above `CHUNKED_FROM` ids the heads of student and teacher are applied a chunk of tokens at a
time (`kdrun.losses.chunked`), equal in value and gradient; below it, and where a model does more than a matrix product after its hidden
states, the logits are made at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdrun.losses.chunked import RowLoss, chunked_sum, head, stored
from kdrun.losses.token import REDUCTIONS, Weights, sequence_weights
from kdrun.objective.base import Gather, Objective
from kdrun.student.language import has_plain_head, head_of, hidden_states
from kdrun.student.taps import taken_by
from kdrun.types import Batch, Connectors, Context, Needs, Signal, Start, Term

CHUNKED_FROM = 8192  # tokens of a vocabulary; below, the logits of a batch are small
Projection = Literal["auto", "whole", "chunked"]
SUM, COUNT = "row_sum", "row_count"  # rows [B] that after_step is given: the term "kd" summed over each sample's tokens, and their number


@dataclass(eq=False)
class LanguageObjective(Objective):
    """Base. Unit: the scored token, or the sample, as `reduction` says (see `kdrun.losses.token.sequence_weights`)."""

    reduction: str = "token_mean"
    max_length: int | None = None  # of reduction "dr"
    projection: Projection = "auto"

    def __post_init__(self) -> None:
        if self.projection not in get_args(Projection):
            raise ValueError(f"projection={self.projection!r}: legal values {', '.join(get_args(Projection))}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r}: legal values {', '.join(REDUCTIONS)}")
        if (self.reduction == "dr") != (self.max_length is not None):
            raise ValueError(f"max_length={self.max_length}: reduction dr needs a length, and no other has one")
        self._chunked, self._network = False, ()

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def listens(self) -> bool:
        """Whether any term looks at the teacher."""
        return True

    def row_losses(self) -> Mapping[str, tuple[RowLoss, bool]]:
        """By term: the loss of rows of student logits [N, V] -> [N], and what it is compared with: the teacher's logits [N, V] (True)
        or the tokens that came [N] (False)."""
        raise NotImplementedError

    # -- the rest -----------------------------------------------------------------------------------------------------

    def needs(self) -> Needs:
        return Needs(teacher_logits=self.listens() and not self._chunked)

    def setup(self, context: Context) -> Connectors:
        self._chunked = self.projection == "chunked" or (self.projection == "auto" and context.classes >= CHUNKED_FROM)
        return nn.ModuleDict()

    def start(self, start: Start, connectors: Connectors) -> None:
        """Only two plain heads can be applied in parts."""
        teacher = [] if start.teacher is None else [start.teacher]
        plain = all(has_plain_head(network) for network in (start.student, *teacher))
        self._chunked = self._chunked and plain and bool(teacher or not self.listens())
        self._network = tuple(teacher)  # in a tuple: not a part of this objective

    def units(self) -> tuple[str, ...]:
        return ("token", "sample")

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        return {**super().count(batch), "token": (batch.targets >= 0).sum()}

    def compute(
        self, student: Any, batch: Batch, signal: Signal, phase: str, connectors: Connectors, gather: Gather | None
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        weights = sequence_weights(batch.targets >= 0, self.reduction, self.max_length)
        sums = self._chunk_sums(student, batch, weights) if self._chunked else self._whole_sums(student, batch, signal, weights)
        terms = {name: Term(total, weights.unit) for name, (total, _) in sums.items()}
        rows = sums["kd"][1] if "kd" in sums else next(iter(sums.values()))[1]
        return terms, {SUM: rows.sum(1), COUNT: (batch.targets >= 0).sum(1)}

    def _whole_sums(self, student: Any, batch: Batch, signal: Signal, weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
        """By term (weighted sum, detached unweighted losses [B, T])."""
        scored = batch.targets >= 0
        logits = student(batch.inputs, batch.extra)[0][scored]
        found = {}
        for name, (loss, of_teacher) in self.row_losses().items():
            other = self._said(signal)[scored] if of_teacher else batch.targets[scored]
            losses = loss(logits, other)
            kept = torch.zeros(scored.shape, dtype=losses.dtype, device=losses.device).masked_scatter(scored, losses.detach())
            found[name] = (losses * weights.weights[scored]).sum(), kept
        return found

    def _said(self, signal: Signal) -> Tensor:
        assert signal.logits is not None
        return signal.logits.detach()

    def _chunk_sums(self, student: Any, batch: Batch, weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
        own = student.module
        hidden = hidden_states(own, batch.inputs, **taken_by(own, batch.extra)).flatten(0, 1)
        losses, told = self.row_losses(), stored(batch.targets.flatten())
        if any(of_teacher for _, of_teacher in losses.values()):
            with torch.no_grad():
                network = self._network[0]
                theirs = hidden_states(network, batch.inputs, **taken_by(network, batch.extra)).flatten(0, 1)
            said = head(theirs, *head_of(network))
        found = {}
        for name, (loss, of_teacher) in losses.items():
            total = chunked_sum(hidden, *head_of(own), said if of_teacher else told, loss, weights.weights.flatten())
            found[name] = total.sum, total.rows.view(batch.targets.shape)
        return found


