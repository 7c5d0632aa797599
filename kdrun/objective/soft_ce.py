"""Soft cross-entropy on targets that come with the data: one-hot where there is a label, a teacher's answer where it was asked.

    L = - sum_c r_c log softmax(zs)_c,   r [B, C] = batch.extra["soft_targets"]

Unit: nats per sample. No constants. With one-hot rows it is cross-entropy. A student learns by it after rounds of queries in
RAD (Baykal et al., ICLR 2023, arXiv 2210.01213), at temperature 1 (unconfirmed).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from kdrun.losses.divergence import soft_cross_entropy
from kdrun.objective._labels import by_share
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term

ROW = "soft_targets"


@dataclass(eq=False)
class SoftCE(Objective):
    mixes: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(extra=(ROW,))

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"soft_ce": 1.0}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        losses = by_share(partial(soft_cross_entropy, output.logits), batch, ROW, batch.extra[ROW])
        return {"soft_ce": Term(losses.sum(), "sample")}
