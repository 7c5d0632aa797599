"""Evaluation of a language model on pairs of completions: all that `kdrun.evaluation.language` tells of the chosen ones, and

preferred, preferred_by_length   share of pairs whose chosen completion has the larger log-probability, summed or by token
margin                           the mean of log q(chosen) - log q(rejected), summed over tokens; less the teacher's and times beta it is
                                 the mean reward margin of DPO
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.dataset.tokens import REJECTED, beside
from kdrun.errors import Problem
from kdrun.evaluation.base import Rows
from kdrun.evaluation.language import Language
from kdrun.evaluation.sums import Sums
from kdrun.losses.token import IGNORED, token_cross_entropy
from kdrun.student.taps import ask
from kdrun.types import Batch


@dataclass(eq=False)
class Preference(Language):
    primary: str = "preferred"

    def problems(self, data: Data) -> list[Problem]:
        found = super().problems(data)
        alone = [name for name in data.splits if name != "train" and REJECTED not in getattr(data.split(name), "beside", {})]
        if found or not alone:
            return found
        what = f"the {alone[0]} rows of {data.name} have no rejected completions"
        return [Problem(what, "evaluation", data.name, "evaluation=language, or rows with prompt, chosen and rejected")]

    def names(self, classes: int | None = None) -> list[str]:
        return ["preferred", "preferred_by_length", "margin", *super().names(classes)]

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        sums = Sums(4).to(device)  # pairs preferred, preferred by length, margins, pairs

        def compared() -> Iterator[tuple[Batch, Tensor | None]]:
            for batch, said in rows:
                (chosen, length), (rejected, other) = _log_probs(network, batch), _log_probs(network, beside(batch, REJECTED))
                gain = chosen - rejected
                sums.update((gain > 0).sum(), (chosen / length > rejected / other).sum(), gain.sum(dtype=torch.float64), len(gain))
                yield batch, said

        found = super().measure(network, compared(), data, device)
        preferred, by_length, margin, pairs = sums.compute().tolist()
        return {"preferred": 100 * preferred / pairs, "preferred_by_length": 100 * by_length / pairs, "margin": margin / pairs} | found


def _log_probs(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(summed log-probability [B], scored tokens [B])."""
    labels = torch.where(batch.targets >= 0, batch.targets, IGNORED)
    return -token_cross_entropy(ask(network, batch), labels).sum(1), (batch.targets >= 0).sum(1).clamp(min=1)
