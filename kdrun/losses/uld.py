"""Distillation between models with different vocabularies.

Universal Logit Distillation (ULD; Boizard et al., TMLR 2025, arXiv 2402.12030): probabilities are compared by rank, not by
id, which is the 1-Wasserstein distance under a uniform transport cost, up to a factor.

A stretch of several tokens (two tokenizers cut a text differently) has the distribution of its first position times the probability of
the tokens that then came, by the chain rule: `tail`, their summed log-probability, as in the public code of TRL (GOLD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrun.losses.precision import widen
from kdrun.losses.token import jsd_entries

FARTHEST = 2**32  # more tokens than any row has


def uld(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, tail: Tensor | None = None, teacher_tail: Tensor | None = None
) -> Tensor:
    """sum_i |p_(i) - q_(i)| of the descending probabilities, the shorter vocabulary padded with zeros.

    Student logits [..., V], teacher logits [..., V'], tails [...] or None -> [...], in [0, 2], float32 or wider.
    Blind to ids: two models that are equally sure of different tokens are at distance 0.
    """
    return sorted_distance(_log_probs(student, temperature, tail).exp(), _log_probs(teacher, temperature, teacher_tail).exp())


def hybrid_uld(
    student: Tensor,
    teacher: Tensor,
    matched: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: Tensor | None = None,
    teacher_tail: Tensor | None = None,
) -> Tensor:
    """The generalised JSD of the ids that mean the same string in both vocabularies, and `uld` of the rest.

    Student logits [..., V], teacher logits [..., V'], matched [M, 2] of ids (student's, teacher's) -> [...]. The JSD is that of
    `kdrun.losses.token.generalised_jsd` with 0 < beta < 1, the teacher's weight, summed over the matched ids alone: every one of its
    entries is at least 0, also where the two do not sum to 1.
    """
    log_q, log_p = _log_probs(student, temperature, tail), _log_probs(teacher, temperature, teacher_tail)
    same = jsd_entries(log_q[..., matched[:, 0]], log_p[..., matched[:, 1]], beta).sum(-1)
    return same + sorted_distance(_without(log_q, matched[:, 0]).exp(), _without(log_p, matched[:, 1]).exp())


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """sum_i |p_(i) - q_(i)| of values [..., V] and [..., V'] in descending order, the shorter padded with zeros -> [...]."""
    width = min(q.shape[-1], p.shape[-1])
    (first, beyond), (second, more) = _ranked(q, width), _ranked(p, width)
    return (first - second).abs().sum(-1) + beyond + more


def _ranked(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest values [..., width] in descending order, and the sum [...] of all others, which are compared with zeros."""
    if width == values.shape[-1]:
        return values.sort(-1, descending=True).values, values.new_zeros(values.shape[:-1])
    # A few of many: far cheaper than the order of all.
    found = values.topk(width, -1)
    return found.values, values.scatter(-1, found.indices, 0.0).sum(-1)


def answers_in_turn(mask: Tensor) -> Tensor:
    """Keys for `partners` of the i-th scored token of the n-th answer: n T_max + i, T_max beyond every row.  mask [B, T] -> int64 [B, T].

    An answer is a run of scored positions; -1 where nothing is scored. A conversation has several, which are paired turn by turn.
    """
    before = F.pad(mask, (1, 0))[:, :-1]
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    begun = torch.where(mask & ~before, place, -1).cummax(1).values
    return torch.where(mask, (mask & ~before).cumsum(1) * FARTHEST + place - begun, -1)


def partners(student_keys: Tensor, teacher_keys: Tensor) -> Tensor:
    """For every position of the student the teacher's with the same key, -1 where there is none.  int64 [B, T], [B, T'] -> [B, T].

    Keys grow along a row, -1 is none. The first of several positions with one key is meant.
    """
    theirs = teacher_keys.cummax(1).values.contiguous()
    place = torch.searchsorted(theirs, student_keys.contiguous()).clamp(max=theirs.shape[1] - 1)
    return torch.where((student_keys >= 0) & (teacher_keys.gather(1, place) == student_keys), place, -1)


def _without(values: Tensor, ids: Tensor) -> Tensor:
    """Values [..., V] of all ids but those, [..., V - M]."""
    rest = torch.ones(values.shape[-1], dtype=torch.bool, device=values.device)
    rest[ids] = False
    return values[..., rest]


def _log_probs(logits: Tensor, temperature: float, tail: Tensor | None) -> Tensor:
    log_probs = F.log_softmax(widen(logits) / temperature, -1)
    return log_probs if tail is None else log_probs + tail.unsqueeze(-1)


def firsts(stretches: Tensor) -> Tensor:
    """Whether a position is the first of its stretch.  [B, T] int64, -1 of none -> bool [B, T]."""
    return (stretches >= 0) & (stretches != F.pad(stretches, (1, 0), value=-1)[:, :-1])


def tails(log_probs: Tensor, stretches: Tensor) -> Tensor:
    """The summed log-probabilities of the positions of each stretch after its first.  [B, T] twice -> [B, T], at every position of it."""
    later = torch.where((stretches >= 0) & ~firsts(stretches), log_probs, 0.0)
    index = stretches.clamp(min=0)
    sums = later.new_zeros(len(later), int(stretches.shape[1]) + 1).scatter_add(1, index, later)
    return sums.gather(1, index)
