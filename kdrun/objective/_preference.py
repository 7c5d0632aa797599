"""What the objectives on pairs of completions share: the summed log-probabilities of a chosen and a rejected one, and the sample as unit.

Above `CHUNKED_FROM` ids the heads are applied a chunk of tokens at a time, twice: once for the sums, once with the weight that the loss
then gives to every token, so that the gradient is that of the whole and [tokens, vocabulary] never exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kdrun.dataset.tokens import REJECTED, beside
from kdrun.errors import Problem
from kdrun.losses.chunked import Summed, chunked_sum, stored
from kdrun.losses.token import IGNORED, token_cross_entropy
from kdrun.objective._language import CHUNKED_FROM, Projection
from kdrun.objective.base import Gather, Objective
from kdrun.student.language import has_plain_head, head_of, hidden_states
from kdrun.student.taps import ask, reads_tokens, taken_by
from kdrun.types import Batch, Connectors, Context, Signal, Start, Term

MARGIN, CORRECT = "margin", "correct"  # rows [B] that after_step is given


class Pair(NamedTuple):
    """Something of the chosen and the rejected completions."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]


@dataclass(eq=False)
class PreferenceObjective(Objective):
    """Base. `report` tells of the last step's pairs: the mean reward margin, and the share of them in which the chosen has more reward."""

    projection: Projection = "auto"

    compares: ClassVar[bool] = True  # two completions of every prompt must be there

    _chunked = _reference_chunked = _sharded = False  # no fields: found out when the run is built

    def __post_init__(self) -> None:
        if self.projection not in get_args(Projection):
            raise ValueError(f"projection={self.projection!r}: legal values {', '.join(get_args(Projection))}")

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def margin(self, said: Pair, reference: Pair | None, lengths: Pair) -> Tensor:
        """The reward of the chosen above that of the rejected, from summed log-probabilities and scored tokens -> [B]."""
        raise NotImplementedError

    def loss(self, said: Pair, reference: Pair | None, lengths: Pair) -> Tensor:
        """[B], unreduced."""
        raise NotImplementedError

    # -- the rest -----------------------------------------------------------------------------------------------------

    def problems(self, tree: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None) -> list[Problem]:
        if not reads_tokens(student):
            return [Problem("the student is no language model", "student", "", "student=causal_lm, or objective=kd for classes")]
        self._sharded = tree["hardware"].get("wrap") == "fsdp2"  # its weights are gathered when it is called as a whole
        if self.projection == "chunked" and (self._sharded or not has_plain_head(student)):
            what = "logits can be made a chunk at a time where the student's last step is one matrix that is not sharded"
            return [Problem(what, "objective.projection", "", "objective.projection=whole")]
        return []

    def setup(self, context: Context) -> Connectors:
        self._seen: dict[str, Tensor] = {}
        self._network: tuple[nn.Module, ...] = ()
        large = context.classes >= CHUNKED_FROM and not self._sharded
        self._chunked = self.projection == "chunked" or (self.projection == "auto" and large)
        return nn.ModuleDict()

    def start(self, start: Start, connectors: Connectors) -> None:
        self._chunked = self._chunked and has_plain_head(start.student)
        self._reference_chunked = self._chunked and start.teacher is not None and has_plain_head(start.teacher)
        self._network = () if start.teacher is None else (start.teacher,)  # in a tuple: not a part of this objective

    def units(self) -> tuple[str, ...]:
        return ("sample", "token")

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        scored = sum((row.targets >= 0).sum() for row in _both(batch))
        return {"sample": len(batch.ids), "token": scored}

    def weights(self, progress: Any) -> dict[str, float]:
        return {"preference": 1.0}

    def compute(
        self, student: Any, batch: Batch, signal: Signal, phase: str, connectors: Connectors, gather: Gather | None
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        rows = _both(batch)
        lengths = Pair(*((row.targets >= 0).sum(1) for row in rows))
        with torch.no_grad():
            reference = Pair(*(self._referred(row) for row in rows)) if self.needs().teacher_network else None
        if self._chunked:
            total, said = self._in_chunks(student.module, rows, reference, lengths)
        else:
            said = Pair(*(-token_cross_entropy(student(row.inputs, row.extra)[0], _labels(row)).sum(1) for row in rows))
            total = self.loss(said, reference, lengths).sum()
        margin = self.margin(Pair(*(values.detach() for values in said)), reference, lengths)
        return {"preference": Term(total, "sample")}, {MARGIN: margin, CORRECT: (margin > 0).float()}

    def _referred(self, batch: Batch) -> Tensor:
        """The summed log-probability of every row's scored tokens by the reference, [B]."""
        network, labels = self._network[0], _labels(batch)
        if not self._reference_chunked:
            return -token_cross_entropy(ask(network, batch), labels).sum(1)
        hidden = hidden_states(network, batch.inputs, **taken_by(network, batch.extra)).flatten(0, 1)
        return -_cross_entropies(hidden, network, labels, (labels != IGNORED).float()).rows.view(labels.shape).sum(1)

    def _in_chunks(self, own: nn.Module, rows: tuple[Batch, Batch], reference: Pair | None, lengths: Pair) -> tuple[Tensor, Pair]:
        """(the loss summed over pairs, the summed log-probabilities)."""
        hidden = [hidden_states(own, row.inputs, **taken_by(own, row.extra)).flatten(0, 1) for row in rows]
        labels = [_labels(row) for row in rows]
        masks = [(row.targets >= 0).float() for row in rows]
        with torch.no_grad():
            each = [_cross_entropies(hidden[i].detach(), own, labels[i], masks[i]).rows for i in range(2)]
            found = [-values.view(y.shape).sum(1) for values, y in zip(each, labels, strict=True)]
        with torch.enable_grad():
            said = Pair(*(values.requires_grad_() for values in found))
            losses = self.loss(said, reference, lengths).sum()
            slopes = torch.autograd.grad(losses, list(said))
        # By the chain rule the gradient is that of the sum of cross-entropies with these weights; the value is the loss's own.
        ways = zip(hidden, labels, masks, slopes, strict=True)
        carried = torch.stack([_cross_entropies(states, own, y, mask * -slope[:, None]).sum for states, y, mask, slope in ways]).sum()
        return losses.detach() + (carried - carried.detach()), said

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Any) -> None:
        self._seen = {name: kept[name].double().mean() for name in (MARGIN, CORRECT)}

    def report(self) -> dict[str, float]:
        names = {MARGIN: "reward_margin", CORRECT: "reward_accuracy"}
        return {names[name]: float(value) for name, value in self._seen.items()}

    def to(self, device: Any) -> None:
        self._seen = {name: value.to(device) for name, value in self._seen.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._seen)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = dict(state)


def _both(batch: Batch) -> tuple[Batch, Batch]:
    """(chosen, rejected)."""
    return batch, beside(batch, REJECTED)


def _labels(batch: Batch) -> Tensor:
    return torch.where(batch.targets >= 0, batch.targets, IGNORED)


def _cross_entropies(hidden: Tensor, network: nn.Module, labels: Tensor, weights: Tensor) -> Summed:
    return chunked_sum(hidden, *head_of(network), stored(labels.flatten()), token_cross_entropy, weights.flatten())
