"""Universal Logit Distillation: teacher and student with different tokenizers (Boizard et al., TMLR 2025, arXiv 2402.12030).

    L = ce_weight CE + uld_weight sum_i |p_(i) - q_(i)|

of every scored token of the student that has a partner in the teacher's tokens of the same text (dataset.teacher_tokenizer): the
probabilities in descending order, the shorter vocabulary padded with zeros. `align`:
    tokens   the i-th token of an answer and the i-th of the teacher's, up to the fewer
    bytes    stretches of the text between the cuts that both tokenizers make; the distribution of a stretch is that of its first position
             times the probability of the tokens that then came
`hybrid`: ids that mean the same string in both vocabularies are compared by the generalised JSD of `beta`, the rest by ULD. Both as in
GOLD of TRL's public code.

Unit: nats per token for CE; ULD has none and lies in [0, 2], its mean over an answer's pairs and then over answers (`uld_reduction`
seq_mean, a public port of the authors' code). Constants: ce_weight 1 and uld_weight 1 are that port's defaults; the authors' code
(llm-recipes) has uld_weight 1.5. Temperature 1 and no factor T^2: the port. beta 0.5 is GKD's public code (TRL).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdrun.dataset.tokens import MATCHED, STRETCHES
from kdrun.dataset.tokens import TEACHER as THEIRS
from kdrun.errors import Problem
from kdrun.losses.chunked import RowLoss
from kdrun.losses.divergence import cross_entropy
from kdrun.losses.precision import widen
from kdrun.losses.token import Weights, sequence_weights
from kdrun.losses.uld import answers_in_turn, firsts, hybrid_uld, partners, tails, uld
from kdrun.objective._checks import require_legal, require_nonnegative, require_positive
from kdrun.objective._language import TEACHER, TOKENS, LanguageObjective
from kdrun.teacher.context import TARGETS
from kdrun.types import Batch, Connectors, Context, Progress, Signal, Start

TAIL, TEACHER_TAIL = "tail", "teacher_tail"  # what a stretch's later tokens add to its distribution, in nats
PAIRS = "token_pair"  # unit of reduction token_mean
Align = Literal["tokens", "bytes"]
Reduction = Literal["token_mean", "seq_mean", "seq_sum"]


@dataclass(eq=False)
class ULD(LanguageObjective):
    translates: ClassVar[bool] = True

    ce_weight: float = 1.0
    uld_weight: float = 1.0
    uld_reduction: Reduction = "seq_mean"
    align: Align = "tokens"
    hybrid: bool = False
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(self, "ce_weight", "uld_weight")
        require_positive(self, "temperature")
        require_legal(self, "align", "uld_reduction")
        if not self.ce_weight and not self.uld_weight:
            raise ValueError("ce_weight=0 and uld_weight=0: one of them above 0, or nothing is learned")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta}: legal range (0, 1)")

    def listens(self) -> bool:
        return self.uld_weight > 0

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        found, two = super().problems(tree, student, teacher), tree["dataset"].get("teacher_tokenizer") is not None
        for key, used in (("align", self.align == "bytes"), ("hybrid", self.hybrid)):
            if used and self.listens() and not two:
                what, remedy = "two tokenizers are compared, and there is one", f"dataset.teacher_tokenizer=<name or folder>, or no {key}"
                found.append(Problem(what, f"objective.{key}", "", remedy))
        if self.align == "bytes" and self.projection == "chunked":
            what = "a stretch of several tokens needs the logits of all of them at once"
            found.append(Problem(what, "objective.projection", "", "objective.projection=whole, or objective.align=tokens"))
        return found

    def setup(self, context: Context) -> Connectors:
        connectors = super().setup(context)
        self._chunked = self._chunked and self.align == "tokens"
        return connectors

    def start(self, start: Start, connectors: Connectors) -> None:
        super().start(start, connectors)
        if self.hybrid and self.listens():
            batch, _ = next(iter(start.rows()))
            self._matched = batch.extra[MATCHED].to(next(start.student.parameters()).device)

    def units(self) -> tuple[str, ...]:
        return (*super().units(), PAIRS)

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        return {**super().count(batch), PAIRS: (self._places(batch) >= 0).sum()}

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": self.ce_weight, "uld": self.uld_weight}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        losses: dict[str, tuple[RowLoss, tuple[str, ...]]] = {"ce": (cross_entropy, (TOKENS,))} if self.ce_weight else {}
        given = (TEACHER, TAIL, TEACHER_TAIL) if self.align == "bytes" else (TEACHER,)
        return losses | ({"uld": (self._compared, given)} if self.uld_weight else {})

    def _compared(self, student: Tensor, teacher: Tensor, tail: Tensor | None = None, teacher_tail: Tensor | None = None) -> Tensor:
        """Rows of logits [N, V] and [N, V'] -> [N]."""
        if self.hybrid:
            return hybrid_uld(student, teacher, self._matched, self.beta, self.temperature, tail, teacher_tail)
        return uld(student, teacher, self.temperature, tail, teacher_tail)

    def token_weights(self, batch: Batch) -> Mapping[str, Weights]:
        found = {"ce": sequence_weights(batch.targets >= 0, self.reduction, self.max_length)} if self.ce_weight else {}
        if self.uld_weight:
            pairs = sequence_weights(self._places(batch) >= 0, self.uld_reduction)
            found["uld"] = pairs if pairs.unit == "sample" else pairs._replace(unit=PAIRS)
        return found

    def laid(self, theirs: Tensor, batch: Batch) -> Tensor:
        place = self._places(batch).clamp(min=0)
        return theirs.gather(1, place.view(*place.shape, *[1] * (theirs.dim() - 2)).expand(-1, -1, *theirs.shape[2:]))

    def _places(self, batch: Batch) -> Tensor:
        """[B, T] the position of the teacher's that speaks of what the student's speaks of, -1 where there is none."""
        if self.align == "bytes":
            own, theirs = batch.extra[STRETCHES], batch.extra[f"{THEIRS}_{STRETCHES}"]
            return partners(torch.where(firsts(own), own, -1), torch.where(firsts(theirs), theirs, -1))
        return partners(answers_in_turn(batch.targets >= 0), answers_in_turn(self._their_targets(batch) >= 0))

    def _their_targets(self, batch: Batch) -> Tensor:
        return batch.extra.get(TARGETS, batch.targets)

    def _given(self, kind: str, logits: Tensor, batch: Batch, signal: Signal) -> Tensor:
        if kind == TAIL:
            return self._tails(logits, batch.targets, batch.extra[STRETCHES])
        if kind == TEACHER_TAIL:
            said = super()._given(TEACHER, logits, batch, signal)
            return self.laid(self._tails(said, self._their_targets(batch), batch.extra[f"{THEIRS}_{STRETCHES}"]), batch)
        given = super()._given(kind, logits, batch, signal)
        return self.laid(given, batch) if kind == TEACHER else given

    def _tails(self, logits: Tensor, targets: Tensor, stretches: Tensor) -> Tensor:
        """Logits [B, T, V] -> [B, T] for the first position of every stretch: what its later tokens were worth."""
        log_probs = torch.log_softmax(widen(logits) / self.temperature, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return tails(log_probs, stretches)
