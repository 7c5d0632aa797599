"""Evaluation of node classification: a classifier's metrics on the labelled nodes, and two diagnostics over all edges.

The diagnostics are those that FF-G2M plots (Wu et al., AAAI 2023, arXiv 2305.10758); how exactly its figures average is
unconfirmed, so they compare runs of this package with each other:

    edge_kl           mean over the edges of KL(softmax(|z_i - z_j|) || softmax(|h_i - h_j|)), z the teacher's logits, h the student's
    neighbour_cosine  mean over the nodes with a neighbour of the cosine between softmax(h_i) and the sum of softmax(h_j) over them
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.dataset.base import Data
from kdrun.evaluation.base import Rows
from kdrun.evaluation.classification import Classification
from kdrun.evaluation.sums import Sums
from kdrun.losses.graph import high_frequency
from kdrun.student.taps import ask

EDGES = "edge_index"


@dataclass(eq=False)
class GraphClassification(Classification):
    """Nodes whose target is -1 count in the diagnostics alone: the graph is that of the split, its labels are the split's own."""

    def names(self, classes: int | None = None) -> list[str]:
        return [*super().names(classes), "neighbour_cosine", "edge_kl"]

    def measure(self, network: nn.Module, rows: Rows, data: Data, device: torch.device) -> dict[str, float]:
        """As `Classification.measure`, and the diagnostics; `edge_kl` is absent without a teacher."""
        meter, smoothness = self.meter(data.classes, device), Sums(4).to(device)
        for batch, said in rows:
            logits, own = ask(network, batch).float(), batch.targets >= 0
            if own.any():
                meter.update(logits[own], batch.targets[own], None if said is None else said[own])
            _diagnosed(smoothness, logits, batch.extra[EDGES], said)
        with warnings.catch_warnings():
            # A rank without the graph is no fault: the sums of the rank that has it are everyone's.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            return {**meter.compute(), **_means(smoothness)}


def _diagnosed(sums: Sums, logits: Tensor, edges: Tensor, teacher_logits: Tensor | None) -> None:
    """Add what a graph tells to the sums [cosines, distances, nodes, edges]."""
    cosines = neighbour_cosine(logits, edges)
    distances = logits.new_empty(0) if teacher_logits is None else high_frequency(logits, teacher_logits.float(), edges)
    sums.update(*(row.sum(dtype=torch.float64) for row in (cosines, distances)), len(cosines), len(distances))


def _means(sums: Sums) -> dict[str, float]:
    """The diagnostics; one that nothing was measured of (no edge, no teacher) is left out."""
    cosine, distance, nodes, edges = sums.compute().tolist()
    found = {"neighbour_cosine": cosine / nodes} if nodes else {}
    return found | ({"edge_kl": distance / edges} if edges else {})


def neighbour_cosine(logits: Tensor, edges: Tensor) -> Tensor:
    """Cosine between a node's probabilities and the sum of its neighbours', itself not among them.

    Logits [N, C], edges [2, E] with both directions -> [K], one value per node that has a neighbour, by rising node.
    """
    probabilities = logits.softmax(1)
    around = torch.zeros_like(probabilities).index_add_(0, edges[0], probabilities.index_select(0, edges[1]))
    kept = torch.bincount(edges[0], minlength=len(logits)) > 0
    return F.cosine_similarity(probabilities[kept], around[kept], dim=1)
