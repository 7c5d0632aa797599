"""Distillation of language models, token by token: divergences over the vocabulary, reductions.

Every divergence takes (student logits, teacher logits, ...) [..., V] and returns one UNREDUCED value per position [...],
in nats and in float32 or wider. q is the student's distribution, p the teacher's, both softmaxes at `temperature`; a
gradient to the logits therefore carries 1/T, and nothing here multiplies by T^2.

An id whose logit is -inf has probability 0. Where that would make a term infinite (one model puts mass on what the other
masks) the term is left out, as in the public code of DistiLLM: masks of language models are padding and sampling filters,
not beliefs. `kdrun.losses.divergence.kl_divergence`, for classifiers, says infinity instead. A position at which a model
masks every id has no distribution and gives NaN.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.losses.divergence import kl_between, soft_cross_entropy
from kdrun.losses.precision import widen

IGNORED = -100  # the label of a token that is not to be learned: transformers' and torch's convention

REDUCTIONS = ("token_mean", "seq_mean", "seq_sum", "dr")


class Weights(NamedTuple):
    """How a sum over tokens becomes the mean that a paper means."""

    weights: Tensor  # [B, T] float32, 0 where nothing is scored
    unit: str  # what the weighted sum is divided by the number of: "token" or "sample"


def keep_top(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both logits [..., V] at the teacher's `k` largest ids, [..., K]: a divergence of them renormalises both models.

    The top-k variant of OPSD (arXiv 2601.18734).
    """
    ids = teacher.topk(k, -1).indices
    return student.gather(-1, ids), teacher.gather(-1, ids)


def sequence_weights(mask: Tensor, reduction: str, max_length: int | None = None) -> Weights:
    """Weights of the tokens, so that sum(weights * losses) / (number of units) is the named mean.  mask [B, T] -> [B, T].

    token_mean: over all tokens. seq_mean: over a sequence, then over sequences (GRPO, arXiv 2402.03300). seq_sum: summed
    over a sequence. dr: a sum over `max_length` (Dr. GRPO, arXiv 2503.20783). A sequence without a scored token weighs 0
    and is a sample all the same. Raises `Refused` for an unknown reduction and for "dr" without `max_length`.
    """
    weights = mask.float()
    if reduction == "token_mean":
        return Weights(weights, "token")
    if reduction == "seq_mean":
        return Weights(weights / weights.sum(1, keepdim=True).clamp(min=1), "sample")
    if reduction == "seq_sum":
        return Weights(weights, "sample")
    if reduction != "dr":
        raise Refused(Problem(f"unknown reduction {reduction!r}", "reduction", remedy=did_you_mean(reduction, REDUCTIONS)))
    if max_length is None:
        raise Refused(Problem("reduction dr divides by a fixed length", "max_length", remedy="give the longest answer's tokens"))
    return Weights(weights / max_length, "sample")


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)_y, 0 where y = -100.  logits [..., V], labels [...] int64 -> [...]; nats."""
    rows = widen(logits).reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, labels.reshape(-1), reduction="none", ignore_index=IGNORED).view(labels.shape)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v of p = softmax(logits / T).  [..., V] -> [...], nats."""
    scaled = widen(logits) / temperature
    return soft_cross_entropy(scaled, F.softmax(scaled, -1))


def finite_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of log-probabilities [..., V] -> [...], without the terms at which b is 0."""
    return kl_between(log_a, torch.where(log_b == -torch.inf, log_a, log_b))


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(w a + (1 - w) b) of log-probabilities [..., V], w in [0, 1]."""
    if weight == 0:
        return log_b
    if weight == 1:
        return log_a
    # logaddexp has no gradient where both are -inf: such ids are not in the mixture.
    neither = (log_a == -torch.inf) & (log_b == -torch.inf)
    mixed = torch.logaddexp(log_a.masked_fill(neither, 0.0) + math.log(weight), log_b.masked_fill(neither, 0.0) + math.log1p(-weight))
    return mixed.masked_fill(neither, -torch.inf)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q).  Logits [..., V] -> [...], nats."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return finite_kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p).  Logits [..., V] -> [...], nats. MiniLLM's divergence (ICLR 2024, arXiv 2306.08543) per token."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return finite_kl(log_q, log_p)


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float, rescale: bool = False, temperature: float = 1.0) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.  Logits [..., V] -> [...], nats.

    GKD (ICLR 2024, arXiv 2306.13649). beta 0 is the forward and 1 the reverse KL, as in TRL's code; the
    formula itself is 0 at both, so the scale jumps there. `rescale` divides by beta (1 - beta), which is continuous to
    both KLs. Then a beta within 1e-3 of 0 or 1 loses digits in float32.
    """
    value = jsd_entries(*_log_probs(student, teacher, temperature), beta).sum(-1)
    return value / (beta * (1 - beta)) if rescale and 0 < beta < 1 else value


def total_variation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Half of sum_v |p_v - q_v|, in [0, 1]; its gradient is 0 where p_v = q_v.  Logits [..., V] -> [...]."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q).  Logits [..., V] -> [...], nats. DistiLLM (ICML 2024, arXiv 2402.03898)."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return finite_kl(log_p, log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q).  Logits [..., V] -> [...], nats. DistiLLM (ICML 2024, arXiv 2402.03898)."""
    log_q, log_p = _log_probs(student, teacher, temperature)
    return finite_kl(log_q, log_mixture(log_q, log_p, alpha))


def adaptive_kl(student: Tensor, teacher: Tensor, mu: float = 0.5, temperature: float = 1.0) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w the head's share of |p - q|.  Logits [..., V] -> [...], nats.

    AKL (Wu et al., COLING 2025, arXiv 2404.02657): the head are the most probable ids of the TEACHER whose cumulative mass
    is at most `mu`, and always the first. The weights are detached. Where p = q everywhere the value is 0.
    """
    log_q, log_p = _log_probs(student, teacher, temperature)
    with torch.no_grad():
        p, order = log_p.exp().sort(stable=True, dim=-1, descending=True)
        gaps = (p - log_q.exp().gather(-1, order)).abs()
        head = p.cumsum(-1) <= mu
        head[..., 0] = True
        in_head, in_tail = (gaps * head).sum(-1), (gaps * ~head).sum(-1)
        both = in_head + in_tail
        both = torch.where(both > 0, both, 1.0)
    return in_head / both * finite_kl(log_p, log_q) + in_tail / both * finite_kl(log_q, log_p)


def entry_clipped(student: Tensor, teacher: Tensor, cap: float, beta: float = 0.0, temperature: float = 1.0) -> Tensor:
    """sum_v min(l_v, cap) of the terms l_v of a divergence: `generalised_jsd` of `beta`.  Logits [..., V] -> [...], nats.

    OPSD (Zhao et al., ICML 2026, arXiv 2601.18734), capped per id before the sum as in its public scripts. A surrogate: it
    can be negative, and a capped term gives no gradient while the others still push its logit down.
    """
    return clipped_entries(student, teacher, cap, beta, temperature)[0]


def clipped_entries(student: Tensor, teacher: Tensor, cap: float, beta: float = 0.0, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(`entry_clipped`, `clipped_share`) at once.  Logits [..., V] -> [...] each."""
    entries = jsd_entries(*_log_probs(student, teacher, temperature), beta)
    return entries.clamp(max=cap).sum(-1), (entries.detach() > cap).float().mean(-1)


def clipped_share(student: Tensor, teacher: Tensor, cap: float, beta: float = 0.0, temperature: float = 1.0) -> Tensor:
    """The share of the vocabulary's terms that `entry_clipped` caps, to be watched beside it.  Logits [..., V] -> [...], detached."""
    with torch.no_grad():
        return clipped_entries(student, teacher, cap, beta, temperature)[1]


def interpolated_target(student: Tensor, teacher: Tensor, t: float | Tensor) -> Tensor:
    """log softmax((1 - t) student + t teacher), wholly detached.  Logits [..., V] -> [..., V].

    TAID (ICLR 2025, arXiv 2501.16937). Mixed in float32 or wider. An id that either model masks is out of the
    target: 0 * (-inf) would be NaN.
    """
    student, teacher = widen(student.detach()), widen(teacher.detach())
    masked = (student == -torch.inf) | (teacher == -torch.inf)
    mixed = (1 - t) * student.masked_fill(masked, 0.0) + t * teacher.masked_fill(masked, 0.0)
    return F.log_softmax(mixed.masked_fill(masked, -torch.inf), -1)


def taid(student: Tensor, teacher: Tensor, t: float | Tensor, value: Literal["kl", "ce"] = "kl") -> Tensor:
    """The student against `interpolated_target` p_t: KL(p_t || q) or -sum p_t log q.  Logits [..., V] -> [...], nats.

    TAID (ICLR 2025, arXiv 2501.16937); its public code takes the cross-entropy. Both have the gradient q - p_t, but the
    value steers TAID's schedule of t. No temperature.
    """
    target = interpolated_target(student, teacher, t)
    if value == "ce":
        return soft_cross_entropy(student, target.exp())
    return finite_kl(target, F.log_softmax(widen(student), -1))


def _log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log q, log p), [..., V]."""
    return F.log_softmax(widen(student) / temperature, -1), F.log_softmax(widen(teacher) / temperature, -1)


def _kl_entries(log_a: Tensor, log_b: Tensor) -> Tensor:
    """The terms of `finite_kl`, [..., V] -> [..., V]: a sum over one id each."""
    return finite_kl(log_a.unsqueeze(-1), log_b.unsqueeze(-1))


def jsd_entries(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """The terms of `generalised_jsd`, [..., V] -> [..., V]."""
    if beta == 0:
        return _kl_entries(log_p, log_q)
    if beta == 1:
        return _kl_entries(log_q, log_p)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * _kl_entries(log_p, log_m) + (1 - beta) * _kl_entries(log_q, log_m)
