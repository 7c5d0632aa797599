"""Cached teachers of language models: losses against the K ids that were stored for a position.

A position is given by ids [..., K] and the teacher's log-probabilities [..., K] at the temperature that `temperature`
names for the student (see `tempered` for another one); an entry of -inf is padding. All losses take (student logits
[..., V], ids, log-probabilities) and return one value per position [...], nats, in float32 or wider. The ids of a position
are distinct, except those of `drawn_targets`.

The variants differ in what they do with the mass that was not stored; the names and options follow the public code of
DistillKit (Arcee), the analysis Anshumann et al., "Sparse Logit Sampling" (ACL 2025, arXiv 2503.16870).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.precision import widen
from kdrun.losses.token import finite_kl


def renormalised(student: Tensor, ids: Tensor, log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of both models renormalised over the stored ids. The student's mass elsewhere is free."""
    log_probs = widen(log_probs)
    # The student's padding must go as well, or the id it points at would count twice.
    kept = (widen(student.gather(-1, ids)) / temperature).masked_fill(log_probs == -torch.inf, -torch.inf)
    return finite_kl(F.log_softmax(log_probs, -1), F.log_softmax(kept, -1))


def zero_missing(student: Tensor, ids: Tensor, log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the renormalised teacher and the whole student: missing ids have probability 0. Over-confident where they had mass."""
    return finite_kl(F.log_softmax(widen(log_probs), -1), _log_student(student, ids, temperature))


def truncated(student: Tensor, ids: Tensor, log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_k p_k (log p_k - log q_k) of the stored probabilities as they are, with the whole student.

    Not a divergence: it can be negative, and it is least where the student puts too much mass on the stored ids.
    """
    return finite_kl(widen(log_probs), _log_student(student, ids, temperature))


def rest_bucket(student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL over the stored ids and ONE further outcome, "any other id", on both sides. Never more than the full KL.

    The same as spreading the missing mass evenly over the missing ids of both models. `log_rest` [...]: the teacher's log
    mass elsewhere, where it was stored; otherwise what the stored probabilities leave of 1.
    """
    log_q, log_p = bucketed(student, ids, log_probs, log_rest, temperature)
    return finite_kl(log_p, log_q)


def bucketed(
    student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log q, log p) [..., K + 1] over the stored ids and "any other id". Any f-divergence of these two is at most that of the whole
    distributions (data processing inequality)."""
    log_probs = widen(log_probs)
    log_rest = remaining(log_probs) if log_rest is None else widen(log_rest)
    scaled = _centred(student, temperature)
    log_q = torch.cat([scaled.gather(-1, ids), _log_others(scaled, ids, log_probs)], -1) - scaled.logsumexp(-1, keepdim=True)
    return log_q, torch.cat([log_probs, log_rest.unsqueeze(-1)], -1)


def remaining(log_probs: Tensor) -> Tensor:
    """log (1 - sum_k p_k), the mass that was not stored.  [..., K] -> [...]; -inf where rounding leaves nothing."""
    return (-torch.expm1(widen(log_probs).logsumexp(-1).clamp(max=0.0))).log()


def tempered(log_probs: Tensor, log_rest: Tensor, temperature: float, missing: int = 1) -> tuple[Tensor, Tensor]:
    """(log-probabilities [..., K], log_rest [...]) of p^(1/T) / sum p^(1/T), from those at T = 1.

    The tempered missing mass is not known. It is that of `missing` ids with equal shares, n (rest / n)^(1/T): V - K of them
    as a guess for a vocabulary, 1 to treat the rest as a single outcome, rest^(1/T). Exact for neither: cache at the final
    temperature where it is known.
    """
    count = math.log(missing)
    rest = (widen(log_rest).unsqueeze(-1) - count) / temperature + count
    both = F.log_softmax(torch.cat([widen(log_probs) / temperature, rest], -1), -1)
    return both[..., :-1], both[..., -1]


def proposal(teacher: Tensor, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
    """u proportional to p^c, c > 0, which `drawn_targets` draws from, and p / u, what a draw weighs.  Logits [..., V] -> [..., V] twice."""
    log_p = F.log_softmax(widen(teacher), -1)
    log_u = F.log_softmax(widen(teacher) * exponent, -1)
    return log_u.exp(), (log_p - log_u).masked_fill(log_p == -torch.inf, -torch.inf).exp()


def drawn_targets(teacher: Tensor, draws: int, generator: torch.Generator, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
    """`draws` ids of the teacher and their weights: a sparse target whose expectation is p.  Logits [N, V] -> [N, K] twice.

    Random-sampling distillation (Anshumann et al., ACL 2025, arXiv 2503.16870). Ids come from u proportional to p^c with
    replacement, so one can occur several times, and weigh p / u / draws. The weights are not normalised: dividing by their
    sum would leave a bias of order 1 / draws when c is not 1.
    """
    probabilities, weight = proposal(teacher, exponent)
    ids = torch.multinomial(probabilities, draws, replacement=True, generator=generator)
    return ids, weight.gather(-1, ids) / draws


def sampled_cross_entropy(student: Tensor, ids: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_k w_k log q_k of `drawn_targets`; its expectation is the cross-entropy -sum_v p_v log q_v of the whole teacher."""
    log_q = _log_student(student, ids, temperature)
    return -(widen(weights) * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


def _log_student(student: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log q at the ids, [..., K], normalised over the whole vocabulary."""
    scaled = _centred(student, temperature)
    return scaled.gather(-1, ids) - scaled.logsumexp(-1, keepdim=True)


def _centred(student: Tensor, temperature: float) -> Tensor:
    """Logits / T less their largest: a logsumexp of logits around 1e4 has lost four digits of what is subtracted from it."""
    scaled = widen(student) / temperature
    return scaled - scaled.detach().amax(-1, keepdim=True)


def _log_others(scaled: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """logsumexp of the logits [..., V] at all ids that were not stored, [..., 1].

    Summed over them, because 1 minus the stored ids' mass would cancel where these have nearly all of it.
    """
    # Counted, not set: padding may point at an id that was stored.
    stored = torch.zeros_like(scaled, dtype=torch.int32).scatter_add(-1, ids, (log_probs > -torch.inf).int()) > 0
    others = scaled.masked_fill(stored, -torch.inf)
    none = (others == -torch.inf).all(-1, keepdim=True)
    # Over -inf alone, logsumexp has NaN gradients, which no later mask removes.
    return others.masked_fill(none, 0.0).logsumexp(-1, keepdim=True).masked_fill(none, -torch.inf)
