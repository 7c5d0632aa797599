"""Likelihoods of rankings: the Plackett-Luce model, in which a ranking is a sequence of choices without replacement."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.losses.precision import widen


def target_first_order(teacher: Tensor, targets: Tensor) -> Tensor:
    """The ranking pi that puts the label first and the other classes by falling teacher logit.

    teacher [B, C], targets [B] int64 -> class indices [B, C] int64. Equal logits: the lower class index first.
    """
    keyed = widen(teacher.detach()).scatter(-1, targets[:, None], torch.inf)
    return keyed.sort(dim=-1, descending=True, stable=True).indices


def step_losses(student: Tensor, order: Tensor) -> Tensor:
    """l_k = log sum_{j >= k} exp s[pi_j] - s[pi_k]: minus the log-probability of the k-th choice among what is left.

    student [B, C] logits, order [B, C] int64 -> [B, C] nats, >= 0, the last one always 0. O(B C) time and memory.
    """
    ranked = widen(student).gather(-1, order)
    # Only differences count; near 0 they keep their digits.
    ranked = ranked - ranked.detach().amax(-1, keepdim=True)
    # The gradient of logcumsumexp at a prefix of -inf is NaN, so excluded classes enter it as "very small" instead.
    bounded = ranked.clamp(min=torch.finfo(ranked.dtype).min / 2)
    return bounded.flip(-1).logcumsumexp(-1).flip(-1) - ranked


def plackett_luce(student: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k l_k.  student [B, C], order [B, C] int64, weights [B, C] or [C] -> [B], nats.

    A step with weight 0 adds nothing, even where its class is excluded (logit -inf).
    """
    return (weights * step_losses(student, order).masked_fill(weights == 0, 0.0)).sum(-1)


def position_weights(classes: int, device: torch.device | None = None) -> Tensor:
    """(2^(C-k) - 1) / sum_j (2^(C-j) - 1) for k = 1..C: the weights of position-aware ListMLE, float64 [C], sum 1.

    In the closed form (2^-k - 2^-C) / (1 - (C+1) 2^-C), because 2^C leaves int64 after C = 63 and float32 after C = 128.
    """
    powers = torch.exp2(-torch.arange(1, classes + 1, dtype=torch.float64, device=device))
    return (powers - powers[-1]) / (1 - (classes + 1) * powers[-1])
