"""Supervised fine-tuning of a language model, and sequence-level KD: L = -log q(y_i | y_<i) of every scored token.

On a teacher's own texts this is sequence-level knowledge distillation (Kim and Rush, EMNLP 2016, arXiv 1606.07947). Unit: nats per token.
No constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdrun.losses.chunked import RowLoss
from kdrun.losses.divergence import cross_entropy
from kdrun.objective._language import TOKENS, LanguageObjective
from kdrun.types import Progress


@dataclass(eq=False)
class SFT(LanguageObjective):
    def listens(self) -> bool:
        return False

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": 1.0}

    def row_losses(self) -> Mapping[str, tuple[RowLoss, tuple[str, ...]]]:
        return {"ce": (cross_entropy, (TOKENS,))}
