"""FF-G2M: Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs (Wu et al., AAAI
2023, arXiv 2305.10758).

    L = weight * CE(h_L, y_L) + (1 - weight) * (LFD + HFD)
    LFD = 1/|E+| sum_{(i,j) in E+} KL(softmax(z_j) || softmax(h_i))
    HFD = 1/|E|  sum_{(i,j) in E}  KL(softmax(|z_i - z_j| / T) || softmax(|h_i - h_j| / T))

z are the teacher's logits and h the student's, one row per node; E holds every undirected edge twice and no self loops, E+ has
the self loops too; h_L are the nodes with a label. A student without a graph learns what its teacher says of the neighbourhood
(low frequency) and how much it changes along an edge (high frequency), which node-to-node distillation drowns. Each edge counts
the same, so a node counts by its degree.

The parts can be chosen: `use_node` is the node-to-node term of GLNN, mean_i KL(softmax(z_i) || softmax(h_i)).

Units: nats per labelled node (CE), per edge or self loop (LFD), per edge (HFD), per node (GLNN's term). Constants: weight 0.4
and T 1.5 are the authors' best parameters for Cora with a GCN (their public code); others are in the recipes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdrun.losses.divergence import cross_entropy, kl_divergence
from kdrun.losses.graph import high_frequency, low_frequency
from kdrun.objective._checks import require_positive
from kdrun.objective.base import Objective
from kdrun.types import Batch, Connectors, Needs, Output, Progress, Signal, Term

EDGES = "edge_index"  # the row of Batch.extra with the edges [2, E]


@dataclass(eq=False)
class FFG2M(Objective):
    """Needs a batch that is a whole graph (source=whole): an edge that is cut is an edge that is lost."""

    weight: float = 0.4
    use_node: bool = False
    use_low: bool = True
    use_high: bool = True
    temperature: float = 1.5

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: legal range [0, 1]")
        if self.weight < 1 and not (self.use_node or self.use_low or self.use_high):
            raise ValueError(f"weight={self.weight}: use_node, use_low and use_high are all false, and labels alone are weight=1.0")

    def needs(self) -> Needs:
        along_edges = self.weight < 1 and (self.use_low or self.use_high)
        return Needs(teacher_logits=self.weight < 1, extra=(EDGES,) if along_edges else ())

    def units(self) -> tuple[str, ...]:
        return (*super().units(), "edge", "edge_or_self")

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        edges = batch.extra[EDGES].shape[1] if EDGES in batch.extra else 0
        return super().count(batch) | {"edge": edges, "edge_or_self": edges + len(batch.ids)}

    def weights(self, progress: Progress) -> dict[str, float]:
        taught = 1 - self.weight
        return {"ce": self.weight, "node": taught, "low": taught, "high": taught}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        student, terms = output.logits, {}
        if self.weight > 0:
            terms["ce"] = Term(cross_entropy(student, batch.targets).sum(), "label")
        if self.weight == 1:
            return terms
        assert signal.logits is not None
        teacher = signal.logits.detach()
        if self.use_node:
            terms["node"] = Term(kl_divergence(student, teacher).sum(), "sample")
        if self.use_low:
            terms["low"] = Term(low_frequency(student, teacher, batch.extra[EDGES]).sum(), "edge_or_self")
        if self.use_high:
            terms["high"] = Term(high_frequency(student, teacher, batch.extra[EDGES], self.temperature).sum(), "edge")
        return terms
