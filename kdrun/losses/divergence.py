"""Cross-entropy and divergences between class distributions that are given by logits.

All functions return one value per row, in float32 or wider, and work in log space, so that values and gradients stay
finite at extreme logits and temperatures. A class that the teacher excludes (logit -inf) has probability 0 and adds
nothing, also where the student excludes it too. A student that excludes a class on which the teacher puts mass is
infinitely far away, and the value says so. Nothing here multiplies by T^2: that belongs to the paper's term.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.precision import widen


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)_y, 0 where y = -1; nats.

    logits [B, C], targets [B] int64 -> [B]; of pixels [B, C, H, W], [B, H, W] -> [B, H, W]; of tokens [B, T, V], [B, T] -> [B, T].
    """
    by_class = logits.transpose(1, 2) if logits.dim() == 3 else logits
    return F.cross_entropy(widen(by_class), targets, reduction="none", ignore_index=-1)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_c q_c log softmax(logits)_c of logits and class probabilities q, [..., C] -> [...], nats."""
    return -(target * F.log_softmax(widen(logits), -1).masked_fill(target == 0, 0.0)).sum(-1)


def kl_between(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum_c q_c (log q_c - log p_c) of normalised log-probabilities [..., C] -> [...], nats."""
    q = log_q.exp()
    # 0 * (-inf) is NaN, in the value and again in the gradient: a class without mass is taken out before the product.
    return (q * (log_q - log_p).masked_fill(q == 0, 0.0)).sum(-1)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)).  Logits [..., C] -> [...], nats."""
    return kl_between(F.log_softmax(widen(teacher) / temperature, -1), F.log_softmax(widen(student) / temperature, -1))


def target_divergence(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """KL between the binary distributions (p_y, 1 - p_y) of teacher and student at temperature T.

    Logits [B, C], targets [B] int64 -> [B], nats. TCKD of DKD (CVPR 2022, arXiv 2203.08679) without its T^2.
    """
    return kl_between(_log_binary(teacher, targets, temperature), _log_binary(student, targets, temperature))


def nontarget_divergence(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """KL between the distributions over the C - 1 classes other than y, renormalised, at temperature T.

    Logits [B, C], targets [B] int64 -> [B], nats. NCKD of DKD (CVPR 2022, arXiv 2203.08679) without its T^2.
    """
    return kl_between(_log_nontarget(teacher, targets, temperature), _log_nontarget(student, targets, temperature))


def _log_binary(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log (p_y, 1 - p_y), [B, 2]. The complement is a logsumexp of log-probabilities: 1 - p_y would cancel to 0."""
    log_p = F.log_softmax(widen(logits) / temperature, -1)
    rest, empty = _without_target(log_p, targets)
    return torch.cat([log_p.gather(-1, targets[:, None]), rest.logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)], -1)


def _log_nontarget(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log-probabilities [B, C] over the classes other than y, with -inf at y."""
    rest, empty = _without_target(widen(logits) / temperature, targets)
    return F.log_softmax(rest, -1).masked_fill(empty, -torch.inf)


def _without_target(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [B, C] with -inf at the target, and the rows [B, 1] in which nothing else is left.

    Such a row is all 0 instead: over -inf alone, normalising gives NaN gradients, which no later mask removes.
    """
    rest = x.scatter(-1, targets[:, None], -torch.inf)
    empty = (rest == -torch.inf).all(-1, keepdim=True)
    return rest.masked_fill(empty, 0.0), empty
