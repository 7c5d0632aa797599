"""Policy gradients and preferences for language models: advantages, clipped ratios, KL estimators, DPO, SimPO, MiniLLM.

Log-probabilities are those of the tokens that were drawn, in nats: `-token_cross_entropy`. All functions return one
unreduced value per token [B, T] or per sequence [B], in float32 or wider. Advantages and returns carry no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.precision import widen

# exp overflows float32 beyond 88, and then the branch that min() rejects gives NaN gradients. Public code of verl.
LOG_RATIO_BOUND = 20.0


def group_advantages(rewards: Tensor, std: Literal["population", "unbiased", "none"] = "population", eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) over the answers to one prompt.  rewards [..., N], N answers each -> [..., N], detached.

    "population": GRPO (DeepSeekMath, arXiv 2402.03300). "unbiased", eps 1e-4: TRL's code (verl's has 1e-6). "none": Dr. GRPO
    (arXiv 2503.20783). A group without spread has no advantages.
    """
    centred = widen(rewards.detach())
    centred = centred - centred.mean(-1, keepdim=True)
    if std == "none":
        return centred
    free = rewards.shape[-1] - (std == "unbiased")
    deviation = (centred.square().sum(-1, keepdim=True) / max(free, 1)).sqrt()
    return torch.where(deviation > 0, centred / torch.where(deviation > 0, deviation + eps, 1.0), 0.0)


def log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """log (q / q_old) of the drawn tokens, bounded so that its exp is finite.  [...] twice -> [...]."""
    return (widen(log_prob) - widen(old_log_prob.detach())).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def sequence_log_ratio(ratios: Tensor, mask: Tensor) -> Tensor:
    """The mean over a sequence's tokens of `log_ratio`, which GSPO (arXiv 2507.18071) clips.  [B, T], mask [B, T] -> [B]."""
    return torch.where(mask, ratios, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def clipped_policy(ratios: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(ratios).  `log_ratio`s [...] and advantages [...] -> [...].

    PPO (arXiv 1707.06347), as GRPO uses it per token; high 0.28 is DAPO's (arXiv 2503.14476).
    """
    rho, advantages = ratios.exp(), advantages.detach()
    return -torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)


def kl_k1(log_prob: Tensor, reference: Tensor) -> Tensor:
    """log q - log ref of tokens drawn from q: unbiased for KL(q || ref), but its gradient has mean 0.  [...] twice -> [...].

    The three estimators: Schulman, "Approximating KL divergence", 2020.
    """
    return widen(log_prob) - widen(reference)


def kl_k2(log_prob: Tensor, reference: Tensor) -> Tensor:
    """(log q - log ref)^2 / 2: biased, but its gradient has that of KL(q || ref) as mean.  [...] twice -> [...]."""
    return kl_k1(log_prob, reference).square() / 2


def kl_k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """ref/q - 1 - log (ref/q) >= 0: unbiased for KL(q || ref), with the gradient of KL(ref || q) in mean.  [...] twice -> [...]."""
    log_quotient = -log_ratio(log_prob, reference)
    return torch.expm1(log_quotient) - log_quotient


def sampled_token(log_prob: Tensor, teacher_log_prob: Tensor) -> Tensor:
    """-(log p - log q) log q of drawn tokens, the bracket detached.  [...] twice -> [...].

    On-policy distillation as a policy gradient (OPSD, arXiv 2601.18734): with tokens drawn from q itself, not truncated by
    top-k or top-p, its gradient has that of the position's reverse KL as mean. The value means nothing.
    """
    log_prob, teacher_log_prob = widen(log_prob), widen(teacher_log_prob)
    return -(teacher_log_prob - log_prob).detach() * log_prob


def minillm_rewards(log_prob: Tensor, teacher_log_prob: Tensor, scale: float = 0.5, bound: float = 100.0) -> Tensor:
    """clip((log p - log q) / scale, +-bound) of drawn tokens, detached.  [...] twice -> [...].

    MiniLLM (ICLR 2024, arXiv 2306.08543); scale and bound are those of its public code.
    """
    return ((widen(teacher_log_prob) - widen(log_prob)).detach() / scale).clamp(-bound, bound)


def returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0, per_step: bool = False) -> Tensor:
    """R_t = sum_{t' >= t} gamma^(t' - t) r_t'.  rewards [B, T], mask [B, T] bool of the answers' tokens -> [B, T], detached.

    `per_step` divides by the number of tokens from t on, t counted: MiniLLM's length normalisation (ICLR 2024, arXiv
    2306.08543) as its public code has it, with gamma 0.95. 0 outside the mask.
    """
    rewards = torch.where(mask, widen(rewards.detach()), 0.0)
    running, steps = torch.zeros_like(rewards[:, 0]), []
    for reward in reversed(rewards.unbind(1)):
        running = reward + gamma * running
        steps.append(running)
    result = torch.stack(steps[::-1], 1)
    if per_step:
        result = result / mask.flip(1).cumsum(1).flip(1).clamp(min=1)
    return torch.where(mask, result, 0.0)


def dpo(chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta ((l_w - r_w) - (l_l - r_l))) of the answers' summed log-probabilities.  [B] each -> [B].

    DPO (NeurIPS 2023, arXiv 2305.18290, equation 7): l of the student, r of the frozen reference, w chosen, l rejected.
    """
    gain = (widen(chosen) - widen(chosen_reference)) - (widen(rejected) - widen(rejected_reference))
    return -F.logsigmoid(beta * gain)


def simpo(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (l_w / |w| - l_l / |l|) - gamma) of summed log-probabilities and token counts.  [B] each -> [B].

    SimPO (NeurIPS 2024, arXiv 2405.14734, equation 6): no reference; gamma is the margin that is asked for.
    """
    return -F.logsigmoid(beta * (widen(chosen) / chosen_length - widen(rejected) / rejected_length) - gamma)
