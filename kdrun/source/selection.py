"""Which points to ask the teacher about: scores in, positions out. No selector sees a label, and none calls the teacher.

`rad` draws from the equilibrium of `kdrun.source.game`; the rivals are the usual ones of active learning: `uniform`,
`margin` and `entropy` (the most uncertain points first), `coreset` (greedy k-centre, Sener and Savarese, ICLR 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdrun import rng
from kdrun.source.game import entropy_gain, equilibrium, margin_gain

Acquisition = Literal["rad", "margin", "entropy", "uniform", "coreset"]


@dataclass(frozen=True)
class Pool:
    """What a selector may look at."""

    ids: Tensor  # [N] int64
    probabilities: Tensor  # [N, C] of the student
    mistakes: int  # m: how many of the N points the teacher is expected to mislabel
    features: Tensor | None = None  # [N, D] of the pool
    known: Tensor | None = None  # [M, D] features of the points that have a label already


class Chosen(NamedTuple):
    positions: Tensor  # [budget] int64, distinct, in the pool
    support: int  # points that could have been drawn
    value: float | None  # of the game, where one is played


def select(
    acquisition: Acquisition,
    pool: Pool,
    budget: int,
    seed: int,
    round_: int,
    gain: Literal["margin", "entropy"] = "margin",
    lam: float = 0.0,
) -> Chosen:
    """`budget` distinct points of the pool (all of it if it is smaller). Draws are keyed by (seed, round, sample id)."""
    size = len(pool.ids)
    budget = min(budget, size)
    gumbel = -torch.log(-torch.log(rng.uniform(rng.key(seed, "selection", round_), pool.ids).double().clamp(1e-12, 1 - 1e-12)))
    if acquisition == "uniform":
        return Chosen(gumbel.topk(budget).indices, size, None)
    if acquisition == "coreset":
        return Chosen(k_centre(pool, budget), size, None)
    by_entropy = acquisition == "entropy" or (acquisition == "rad" and gain == "entropy")
    gains = entropy_gain(pool.probabilities) if by_entropy else margin_gain(pool.probabilities)
    if acquisition in ("margin", "entropy"):
        return Chosen(gains.sort(descending=True, stable=True).indices[:budget], budget, None)
    game = equilibrium(gains, pool.mistakes, lam)
    # Gumbel-top-k draws without replacement with weights p; where the support is too small it is taken whole, and the
    # rest are the next most informative points.
    drawn = (game.p.log() + gumbel).topk(min(budget, game.support)).indices
    rest = gains.clone().index_fill_(0, drawn, -1).sort(descending=True, stable=True).indices[: budget - len(drawn)]
    return Chosen(torch.cat([drawn, rest]), game.support, game.value)


def k_centre(pool: Pool, budget: int) -> Tensor:
    """Greedily the point that is farthest from all that are known or chosen. Needs features."""
    if pool.features is None or pool.known is None:
        raise ValueError("coreset needs features of the student")
    nearest = torch.cdist(pool.features, pool.known).min(dim=1).values
    chosen = []
    for _ in range(budget):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(pool.features, pool.features[chosen[-1:]]).squeeze(1))
    return torch.tensor(chosen)
