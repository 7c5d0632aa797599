"""What the objectives of language models share: scored tokens, the reduction over them, and losses that never hold [tokens, vocabulary].

A subclass gives its loss of rows of logits. Above `CHUNKED_FROM` ids the heads of student and teacher are applied a chunk of tokens at a
time (`kdrun.losses.chunked`), equal in value and gradient; below it, and where a model does more than a matrix product after its hidden
states, the logits are made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kdrun.errors import Problem
from kdrun.losses.chunked import RowLoss, Summed, Targets, chunked_sum, head, split_watched, stored, together
from kdrun.losses.token import REDUCTIONS, Weights, sequence_weights
from kdrun.objective.base import Gather, Objective
from kdrun.student.language import has_plain_head, head_of, hidden_states
from kdrun.student.taps import reads_tokens, taken_by
from kdrun.teacher.context import TARGETS, beside_student, in_context
from kdrun.types import Batch, Connectors, Context, Needs, Signal, Start, Term

CHUNKED_FROM = 8192  # tokens of a vocabulary; below, the logits of a batch are small
Projection = Literal["auto", "whole", "chunked"]
TEACHER, TOKENS = "teacher", "tokens"
# Rows [B] that after_step is given: the term "kd" summed over each sample's tokens, what that term watches summed likewise, their number.
SUM, WATCHED, COUNT = "row_sum", "row_watched", "row_count"
Look = Callable[[RowLoss, tuple[str, ...]], Tensor]  # a row loss and what it is given -> its values [B, T], 0 where nothing is scored


class Sums(NamedTuple):
    """One term of a micro-batch."""

    total: Tensor  # weighted, with gradient
    rows: Tensor  # [B, T] unweighted, detached
    watched: Tensor | None  # [B, T] what is told beside the losses


@dataclass(eq=False)
class LanguageObjective(Objective):
    """Base. Unit: the scored token, or the sample, as `reduction` says (see `kdrun.losses.token.sequence_weights`)."""

    reduction: str = "token_mean"
    max_length: int | None = None  # of reduction "dr"
    projection: Projection = "auto"

    rewarded: ClassVar[bool] = False  # whether completions must have been judged: a data set with a reward
    translates: ClassVar[bool] = False  # whether a teacher may have a tokenizer of its own: nothing is compared id by id

    _chunked = _privileged = _sharded = _cached = False  # no fields: found out when the run is built

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

    def losses_of(self, batch: Batch) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        """`row_losses` of this batch, where not all batches have the same terms."""
        return self.row_losses()

    def beforehand(self, batch: Batch, look: Look) -> Batch:
        """The batch with rows that the losses are given and that depend on whole sequences: `look` takes values without gradient."""
        return batch

    def token_weights(self, batch: Batch) -> Mapping[str, Weights]:
        """By term: the weights of the tokens, and the unit that its sum is divided by the number of."""
        return dict.fromkeys(self.losses_of(batch), sequence_weights(batch.targets >= 0, self.reduction, self.max_length))

    def laid(self, theirs: Tensor, batch: Batch) -> Tensor:
        """What a teacher's network says [B, T', ...], at the student's positions [B, T, ...]."""
        return beside_student(theirs, batch) if self._privileged else theirs

    # -- the rest -----------------------------------------------------------------------------------------------------

    def needs(self) -> Needs:
        # In chunks the teacher's head is applied here, unless what it says is read from a cache.
        return Needs(teacher_logits=self.listens() and (self._cached or not self._chunked))

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
        self._cached = bool((tree.get("cache") or {}).get("format"))
        # A sharded network gathers its weights when it is called as a whole, which the chunks go around.
        self._sharded = tree["hardware"].get("wrap") == "fsdp2"
        found = []
        if self._sharded and self.projection == "chunked":
            remedy = "objective.projection=whole, or hardware.wrap=ddp"
            found.append(Problem("the logits of a student that is sharded by FSDP2 are made at once", "objective.projection", "", remedy))
        speaker = student if tree["teacher"].get("kind") in ("ema", "current") else teacher  # which follow the student
        if self.projection == "chunked" and reads_tokens(student) and not self._plain(student, speaker):
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
        weights = self.token_weights(batch)
        sums = (self._chunk_sums if self._chunked else self._whole_sums)(student, batch, signal, weights)
        terms = {name: Term(term.total, weights[name].unit) for name, term in sums.items()}
        _, rows, watched = sums["kd"] if "kd" in sums else next(iter(sums.values()))
        beside = {} if watched is None else {WATCHED: watched.sum(1)}
        return terms, {SUM: rows.sum(1), COUNT: (batch.targets >= 0).sum(1), **beside}

    def _whole_sums(self, student: Any, batch: Batch, signal: Signal, weights: Mapping[str, Weights]) -> dict[str, Sums]:
        scored, whole = batch.targets >= 0, student(batch.inputs, batch.extra)[0]
        logits = whole[scored]

        def laid_out(values: Tensor) -> Tensor:
            return torch.zeros(scored.shape, dtype=values.dtype, device=values.device).masked_scatter(scored, values.detach())

        def said(loss: RowLoss, kinds: tuple[str, ...], logits: Tensor) -> Any:
            return loss(logits, *(part[scored] for kind in kinds for part in _parts(self._given(kind, whole, batch, signal))))

        with torch.no_grad():
            batch = self.beforehand(batch, lambda loss, kinds: laid_out(said(loss, kinds, logits.detach())))
        found = {}
        for name, (loss, kinds) in self.losses_of(batch).items():
            losses, beside = split_watched(said(loss, kinds, logits))
            watched = None if beside is None else laid_out(beside)
            found[name] = Sums((losses * weights[name].weights[scored]).sum(), laid_out(losses), watched)
        return found

    def _given(self, kind: str, logits: Tensor, batch: Batch, signal: Signal) -> Any:
        """What a loss of rows is given beside the student's logits [B, T, V]: [B, T, ...], or of a teacher what was kept of that."""
        if kind != TEACHER:
            return self._rows(batch, kind)
        if signal.kept is not None:
            return signal.kept
        assert signal.logits is not None
        return signal.logits.detach()

    def _rows(self, batch: Batch, kind: str) -> Tensor:
        return batch.targets if kind == TOKENS else batch.extra[kind]

    def _chunk_sums(self, student: Any, batch: Batch, signal: Signal, weights: Mapping[str, Weights]) -> dict[str, Sums]:
        own, shape = student.module, batch.targets.shape
        hidden = hidden_states(own, batch.inputs, **taken_by(own, batch.extra)).flatten(0, 1)
        wanted = {kind for _, kinds in self.losses_of(batch).values() for kind in kinds}
        teacher = self._teacher_rows(batch, signal) if TEACHER in wanted else None

        def summed(loss: RowLoss, kinds: tuple[str, ...], hidden: Tensor, weights: Tensor) -> Summed:
            parts = [teacher if kind == TEACHER and teacher else stored(self._rows(batch, kind).flatten()) for kind in kinds]
            return chunked_sum(hidden, *head_of(own), together(*parts), loss, weights.flatten())

        with torch.no_grad():
            every = (batch.targets >= 0).float()
            batch = self.beforehand(batch, lambda loss, kinds: summed(loss, kinds, hidden.detach(), every).rows.view(shape))
        found = {}
        for name, (loss, kinds) in self.losses_of(batch).items():
            total, rows, watched = summed(loss, kinds, hidden, weights[name].weights)
            found[name] = Sums(total, rows.view(shape), None if watched is None else watched.view(shape))
        return found

    def _teacher_rows(self, batch: Batch, signal: Signal) -> Targets:
        """What the teacher says of so many tokens: read from a cache, or made when it is asked for."""
        if signal.kept is None and signal.logits is None:
            return self._teacher_head(batch)
        return stored(*(part.flatten(0, 1) for part in _parts(signal.logits if signal.kept is None else signal.kept)))

    @torch.no_grad()
    def _teacher_head(self, batch: Batch) -> Targets:
        """The teacher's logits, to be made a few tokens at a time."""
        network = self._network[0]
        place = next(network.parameters()).device  # which need not be the student's
        here = batch.to(place)
        read = in_context(here) if self._privileged or TARGETS in here.extra else here
        theirs = hidden_states(network, read.inputs, **taken_by(network, read.extra))
        said = head(self.laid(theirs, here).flatten(0, 1), *head_of(network))
        return lambda tokens: tuple(part.to(tokens.device) for part in said(tokens.to(place)))


def _parts(given: Any) -> tuple[Tensor, ...]:
    """Logits as one part, what was kept of them as its three."""
    return given if isinstance(given, tuple) else (given,)
