"""How much a classifier's confidence is worth: calibration error, and the risk that is left when it may decline to answer.

Confidence is the largest softmax probability. Both stream over batches and are added up over ranks; a target of -1 is no sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def confidence_and_hits(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(confidence, right or not, labelled or not) of each sample, float64 [B] each.  [B, C], [B] int64."""
    confidence, choice = probabilities.max(dim=1)
    return confidence.double(), (choice == targets).double(), (targets >= 0).double()


class CalibrationError(Metric):
    """ECE: sum over bins of |hits - summed confidence| / N, a share (Guo et al., ICML 2017, arXiv 1706.04599, Eqs. 2 and 3).

    `bins` of equal width, the upper border belonging to a bin: (0, 1/M], ..., ((M-1)/M, 1]. torchmetrics has the lower one belong to it.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor  # [bins, 3]: samples, summed confidence, hits

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("total", torch.zeros(bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, confidence: Tensor, hits: Tensor, labelled: Tensor) -> None:
        borders = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=confidence.device)
        lowest_above = torch.bucketize(confidence.contiguous(), borders) - 1
        # A product and not a scatter: the same bits on every device.
        inside = (lowest_above.clamp(0, self.bins - 1)[:, None] == torch.arange(self.bins, device=confidence.device)).double()
        self.total = self.total + (inside * labelled[:, None]).T @ torch.stack([torch.ones_like(hits), confidence, hits], dim=1)

    def compute(self) -> Tensor:
        samples, confidence, hits = self.total.unbind(1)
        return (hits - confidence).abs().sum() / samples.sum()


class SelectiveRisk(Metric):
    """AURC and E-AURC, shares (Geifman, Uziel, El-Yaniv, ICLR 2019, arXiv 1805.08206).

    AURC: the error rate among the k most confident samples, averaged over k = 1..N. E-AURC: what of it is above that of the best
    order of the same errors, 1/N sum_(j = 1..K) j / (N - K + j) with K errors. Samples of equal confidence share their errors evenly,
    which is the mean over their orders: the value does not depend on how the samples came.

    Keeps two numbers of each sample.
    """

    higher_is_better = False
    full_state_update = False
    confidence: Any  # a list of [B], one tensor once it is reduced; -1 where there is no label
    hits: Any

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("hits", [], dist_reduce_fx="cat")

    def update(self, confidence: Tensor, hits: Tensor, labelled: Tensor) -> None:
        self.confidence.append(torch.where(labelled > 0, confidence, -1.0))
        self.hits.append(hits)

    def compute(self) -> tuple[Tensor, Tensor]:
        """(AURC, E-AURC). Raises ValueError without a sample."""
        confidence, hits = (v if isinstance(v, Tensor) else torch.cat(v) if v else torch.zeros(0) for v in (self.confidence, self.hits))
        return selective_risk(confidence[confidence >= 0], hits[confidence >= 0])


def selective_risk(confidence: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """(AURC, E-AURC) of samples [N], float64. Raises ValueError without a sample."""
    total = len(confidence)
    if not total:
        raise ValueError("no sample, no risk")
    confidence, order = confidence.sort(descending=True)
    _, tie, size = confidence.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(size), dtype=torch.float64, device=hits.device).index_add_(0, tie, 1 - hits[order].double())
    covered = torch.arange(1, total + 1, dtype=torch.float64, device=hits.device)
    aurc = ((errors / size)[tie].cumsum(0) / covered).mean()
    wrong = round(float(errors.sum()))
    best = (covered[:wrong] / (total - wrong + covered[:wrong])).sum() / total
    return aurc, aurc - best
