"""EdgeFD: Federated Distillation on Edge Devices: Efficient Client-Side Filtering for Non-IID Data (Mujtaba et al., FLTA 2025,
arXiv 2508.14769).

    private step:  L = CE(z, y)              proxy step:  L = T^2 KL(q || p_T(z)),   p_T(z) = softmax(z / T)

q is what the clients that judged themselves competent say of a proxy sample, on average: a constant that `plan=federated`
exchanges and `source=federated` puts beside the batch ("peer_targets" [B, C], "covered" [B]). The two kinds of step take
turns and are never added. A proxy sample that nobody spoke of gives nothing; a step without any is left out.

Units: nats per labelled sample, nats per covered proxy sample. Constants: T 1 is ours; the paper's temperature could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.divergence import cross_entropy, kl_between
from kdrun.losses.precision import widen
from kdrun.objective._checks import require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term

TARGETS, COVERED = "peer_targets", "covered"  # rows of Batch.extra; private rows have the second alone, all False


@dataclass(eq=False)
class EdgeFD(Objective):
    temperature: float = 1.0

    _empty = False  # the step at hand has no rows; without annotation, so no setting

    def __post_init__(self) -> None:
        require_positive(self, "temperature")

    def needs(self) -> Needs:
        return Needs(extra=(COVERED,))

    def units(self) -> tuple[str, ...]:
        return (*super().units(), COVERED)

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        return {**super().count(batch), COVERED: batch.extra[COVERED].sum()}

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"ce": 1.0, "kd": 1.0}

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        self._empty = len(batch.ids) == 0
        return batch

    def active(self, phase: str, progress: Progress) -> bool:
        # A zero gradient is not enough: an optimiser with momentum would move.
        return not self._empty

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        if TARGETS not in batch.extra:
            return {"ce": Term(cross_entropy(output.logits, batch.targets).sum(), "label")}
        log_q = widen(batch.extra[TARGETS].detach()).log()
        log_p = F.log_softmax(widen(output.logits) / self.temperature, -1)
        kl = kl_between(log_q, log_p).masked_fill(~batch.extra[COVERED], 0.0)
        return {"kd": Term(self.temperature**2 * kl.sum(), COVERED)}
