"""Noise-contrastive estimation against a memory bank (CRD, ICLR 2020, arXiv 1910.10699), in float32 or wider."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.precision import widen, without_autocast


def bank_scores(anchors: Tensor, bank: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """v . m / T of every anchor with its chosen bank rows.  anchors [B, D], bank [N, D], rows [B, K] int64 -> [B, K].

    Scores the whole bank and picks, instead of gathering the rows first: B N numbers, and as many again for the
    gradient, where gathering needs B K D. That is less whenever N < K D (CRD: 16384 * 128 = 2.1 million samples), and
    the bank is read once per batch instead of K D B numbers being copied.
    """
    anchors = widen(anchors)
    with without_autocast(anchors):
        return (anchors @ bank.to(anchors.dtype).T).gather(1, rows) / temperature


def noise_contrastive(log_scores: Tensor, population: int, eps: float = 1e-7) -> Tensor:
    """-log(s0 / (s0 + c)) - sum_{k=1..K} log(c / (s_k + c)) with noise mass c = K / N.

    log_scores [B, 1 + K], the positive first; population N -> [B], nats. The loss of one side of CRD;
    eps 1e-7 in the denominators is that of its public code (HobbitLong/RepDistiller). Written with log-sigmoids: s0 / (s0 + c) is
    sigmoid(log s0 - log c), which neither overflows nor rounds to log 0.
    """
    negatives = log_scores.shape[1] - 1
    log_noise, log_noise_eps = math.log(negatives / population), math.log(negatives / population + eps)
    margin = widen(log_scores) - log_noise_eps
    rejected = (log_noise_eps - log_noise) - F.logsigmoid(-margin[:, 1:])
    return rejected.sum(1) - F.logsigmoid(margin[:, 0])
