"""What the objectives of language models share: scored tokens, the reduction over them, and losses that never hold [tokens, vocabulary].

A subclass gives its loss of rows of logits. Above `CHUNKED_FROM` ids the heads of student and teacher are applied a chunk of tokens at a
time (`kdrun.losses.chunked`), equal in value and gradient; below it, and where a model does more than a matrix product after its hidden
states, the logits are made at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kdrun.errors import Problem
from kdrun.losses.chunked import RowLoss, Targets, chunked_sum, head, stored, together
from kdrun.losses.token import REDUCTIONS, Weights, sequence_weights
from kdrun.objective.base import Gather, Objective
from kdrun.student.language import has_plain_head, head_of, hidden_states
from kdrun.student.taps import reads_tokens, taken_by
from kdrun.teacher.context import beside_student, in_context
from kdrun.types import Batch, Connectors, Context, Needs, Signal, Start, Term

CHUNKED_FROM = 8192  # tokens of a vocabulary; below, the logits of a batch are small
Projection = Literal["auto", "whole", "chunked"]
TEACHER, TOKENS = "teacher", "tokens"
SUM, COUNT = "row_sum", "row_count"  # rows [B] that after_step is given: the term "kd" summed over each sample's tokens, and their number


@dataclass(eq=False)
class LanguageObjective(Objective):
    """Base. Unit: the scored token, or the sample, as `reduction` says (see `kdrun.losses.token.sequence_weights`)."""

    reduction: str = "token_mean"
    max_length: int | None = None  # of reduction "dr"
    projection: Projection = "auto"

    rewarded: ClassVar[bool] = False  # whether completions must have been judged: a data set with a reward

    _chunked = _privileged = _sharded = False  # no fields: found out when the run is built

    def __post_init__(self) -> None:
        if self.projection not in get_args(Projection):
            raise ValueError(f"projection={self.projection!r}: legal values {', '.join(get_args(Projection))}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction={self.reduction!r}: legal values {', '.join(REDUCTIONS)}")
        if (self.reduction == "dr") != (self.max_length is not None):
            raise ValueError(f"max_length={self.max_length}: reduction dr needs a length, and no other has one")

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def listens(self) -> bool:
        """Whether any term looks at the teacher."""
        return True

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        """By term: the loss of rows of student logits [N, V] -> [N], and what it is given beside them: "teacher" (its logits [N, V]),
        "tokens" (those that came [N]), or rows of batch.extra [B, T] by name."""
        raise NotImplementedError

    # -- the rest -----------------------------------------------------------------------------------------------------

    def needs(self) -> Needs:
        return Needs(teacher_logits=self.listens() and not self._chunked)

    def setup(self, context: Context) -> Connectors:
        self._network: tuple[nn.Module, ...] = ()
        self._chunked = self.projection == "chunked" or (
            self.projection == "auto" and context.classes >= CHUNKED_FROM and not self._sharded
        )
        return nn.ModuleDict()

    def start(self, start: Start, connectors: Connectors) -> None:
        self._chunked = self._chunked and self._plain(start.student, start.teacher)
        self._network = () if start.teacher is None else (start.teacher,)  # in a tuple: not a part of this objective

    def _plain(self, student: nn.Module, teacher: nn.Module | None) -> bool:
        """Whether the heads can be applied in parts: both there, and no more than a matrix."""
        if teacher is None:
            return not self.listens() and has_plain_head(student)
        return has_plain_head(student) and has_plain_head(teacher)

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        self._privileged = tree["teacher"].get("prompt") == "privileged"
        # A sharded network gathers its weights when it is called as a whole, which the chunks go around.
        self._sharded = tree["hardware"].get("wrap") == "fsdp2"
        found = []
        if self._sharded and self.projection == "chunked":
            remedy = "objective.projection=whole, or hardware.wrap=ddp"
            found.append(Problem("the logits of a student that is sharded by FSDP2 are made at once", "objective.projection", "", remedy))
        if self.projection == "chunked" and reads_tokens(student) and not self._plain(student, teacher):
            what = "logits can be made a chunk at a time where student and teacher are networks whose last step is one matrix"
            found.append(Problem(what, "objective.projection", "", "objective.projection=whole"))
        if not reads_tokens(student):
            found.append(Problem("the student is no language model", "student", "", "student=causal_lm, or objective=kd for classes"))
        return found

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
        for name, (loss, kinds) in self.row_losses().items():
            losses = loss(logits, *(self._said(signal)[scored] if kind == TEACHER else self._rows(batch, kind)[scored] for kind in kinds))
            kept = torch.zeros(scored.shape, dtype=losses.dtype, device=losses.device).masked_scatter(scored, losses.detach())
            found[name] = (losses * weights.weights[scored]).sum(), kept
        return found

    def _said(self, signal: Signal) -> Tensor:
        assert signal.logits is not None
        return signal.logits.detach()

    def _rows(self, batch: Batch, kind: str) -> Tensor:
        return batch.targets if kind == TOKENS else batch.extra[kind]

    def _chunk_sums(self, student: Any, batch: Batch, weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
        own = student.module
        hidden = hidden_states(own, batch.inputs, **taken_by(own, batch.extra)).flatten(0, 1)
        losses, parts = self.row_losses(), {}
        for kind in {kind for _, kinds in losses.values() for kind in kinds}:
            parts[kind] = self._teacher_head(batch) if kind == TEACHER else stored(self._rows(batch, kind).flatten())
        found = {}
        for name, (loss, kinds) in losses.items():
            total = chunked_sum(hidden, *head_of(own), together(*(parts[kind] for kind in kinds)), loss, weights.weights.flatten())
            found[name] = total.sum, total.rows.view(batch.targets.shape)
        return found

    @torch.no_grad()
    def _teacher_head(self, batch: Batch) -> Targets:
        """The teacher's logits, to be made a few tokens at a time."""
        network, read = self._network[0], in_context(batch) if self._privileged else batch
        theirs = hidden_states(network, read.inputs, **taken_by(network, read.extra))
        return head((beside_student(theirs, batch) if self._privileged else theirs).flatten(0, 1), *head_of(network))
