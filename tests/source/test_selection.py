"""Selectors: distinct points, keyed draws, and the limits in which one selector is another."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from kdrun.source.game import margin_gain
from kdrun.source.selection import Acquisition, Pool, select

SOURCE = torch.Generator().manual_seed(5)
POOL = Pool(
    ids=torch.arange(100, 160),
    probabilities=(3 * torch.randn(60, 4, generator=SOURCE)).softmax(1),
    mistakes=12,
    features=torch.randn(60, 3, generator=SOURCE),
    known=torch.randn(5, 3, generator=SOURCE),
)


@pytest.mark.parametrize("acquisition", get_args(Acquisition))
def test_as_many_distinct_points_as_asked_for(acquisition: Acquisition) -> None:
    chosen = select(acquisition, POOL, 20, seed=1, round_=1).positions
    assert len(chosen.unique()) == len(chosen) == 20
    assert len(select(acquisition, POOL, 100, seed=1, round_=1).positions) == 60


@pytest.mark.parametrize("acquisition", get_args(Acquisition))
def test_the_order_of_the_pool_does_not_change_which_points_are_chosen(acquisition: Acquisition) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert POOL.features is not None
    moved = replace(POOL, ids=POOL.ids[order], probabilities=POOL.probabilities[order], features=POOL.features[order])
    here, there = (set(p.ids[select(acquisition, p, 15, seed=1, round_=2).positions].tolist()) for p in (POOL, moved))
    assert here == there


def test_draws_are_keyed_by_seed_and_round() -> None:
    one = [select("rad", POOL, 15, seed, round_).positions.tolist() for seed, round_ in ((1, 1), (1, 1), (2, 1), (1, 2))]
    assert one[0] == one[1]
    assert one[0] != one[2]
    assert one[0] != one[3]


def test_a_teacher_without_mistakes_gives_greedy_margin_sampling() -> None:
    certain = replace(POOL, mistakes=0)
    rad, margin = (set(select(a, certain, 15, 1, 1).positions.tolist()) for a in ("rad", "margin"))  # type: ignore[arg-type]
    assert rad == margin


def test_a_support_smaller_than_the_budget_is_taken_whole_and_filled_by_gain() -> None:
    few = replace(POOL, mistakes=1)
    chosen = select("rad", few, 30, 1, 1)
    assert chosen.support < 30
    best = margin_gain(POOL.probabilities).topk(30).indices
    assert set(chosen.positions.tolist()) == set(best.tolist())


def test_draws_follow_the_equilibrium() -> None:
    """The first draw over many seeds, against p."""
    from kdrun.source.game import equilibrium

    p = equilibrium(margin_gain(POOL.probabilities), POOL.mistakes).p
    hits = torch.zeros(60)
    for seed in range(3000):
        hits[select("rad", POOL, 1, seed, 1).positions] += 1
    assert float((hits / 3000 - p).abs().max()) < 0.03
    assert not hits[p == 0].any()


def test_k_centre_covers_what_is_far_from_the_known() -> None:
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [0.0, 7.0]])
    pool = Pool(torch.arange(4), torch.full((4, 2), 0.5), 0, points, torch.zeros(1, 2))
    assert select("coreset", pool, 2, 1, 1).positions.tolist() == [2, 3]
    with pytest.raises(ValueError, match="features"):
        select("coreset", replace(pool, features=None), 2, 1, 1)
