"""The sampling game of RAD: its closed form, held against worked numbers and against the linear program that it solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from kdrun.source.game import SMALLEST_GAIN, entropy_gain, equilibrium, margin_gain

GAINS = torch.tensor([1, 0.8, 0.5, 0.25, 0.1], dtype=torch.float64)


def games(count: int, seed: int = 0) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (count,), generator=source).tolist()
    return [torch.rand(n, generator=source, dtype=torch.float64).clamp(min=0.02) for n in sizes]


@pytest.mark.parametrize(
    ("mistakes", "lam", "support", "p", "value"),
    [
        (0, 0.0, 1, [1, 0, 0, 0, 0], 1.0),
        (1, 0.0, 3, [0.235294, 0.294118, 0.470588, 0, 0], 0.470588),
        (1, 1.0, 4, [0.121212, 0.151515, 0.242424, 0.484848, 0], 0.242424),
        (2, 0.0, 4, [0.121212, 0.151515, 0.242424, 0.484848, 0], 0.242424),
        (3, 0.0, 4, [0.121212, 0.151515, 0.242424, 0.484848, 0], 0.121212),
        (4, 0.0, 5, None, 0.054795),
    ],
)
def test_worked_games(mistakes: int, lam: float, support: int, p: list[float] | None, value: float) -> None:
    game = equilibrium(GAINS, mistakes, lam)
    assert game.support == support
    assert game.value == pytest.approx(value, abs=5e-7)
    if p is not None:
        assert game.p.tolist() == pytest.approx(p, abs=5e-7)


def test_gains_from_predictions_and_the_game_on_them() -> None:
    said = torch.tensor([[0.5, 0.45, 0.05], [0.6, 0.2, 0.2], [0.9, 0.05, 0.05], [0.99, 0.005, 0.005]], dtype=torch.float64)
    gains = margin_gain(said)
    assert gains.tolist() == pytest.approx([0.95, 0.6, 0.15, 0.015])
    assert (1 / gains).cumsum(0).tolist() == pytest.approx([1.052632, 2.719298, 9.385965, 76.052632], abs=5e-7)
    game = equilibrium(gains, 1)
    assert game.p.tolist() == pytest.approx([0.387097, 0.612903, 0, 0], abs=5e-7)
    assert game.value == pytest.approx(0.367742, abs=5e-7)


def test_gains_lie_between_the_smallest_and_one() -> None:
    said = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert margin_gain(said).tolist() == pytest.approx([SMALLEST_GAIN, 1])
    assert entropy_gain(said).tolist() == pytest.approx([SMALLEST_GAIN, 1])


def test_the_closed_form_is_the_optimum_of_the_linear_program() -> None:
    """max over p, tau, s >= 0 of sum p g - (1 + lam)(m tau + sum s) with s_i >= p_i g_i - tau, where the value is not below 0."""
    checked = 0
    for i, gains in enumerate(games(120)):
        n, lam = len(gains), [0.0, 0.0, 0.5, 1.0][i % 4]
        mistakes = i % n
        game = equilibrium(gains, mistakes, lam)
        if game.value < 0:
            continue
        g = gains.numpy()
        cost = np.concatenate([-g, [(1 + lam) * mistakes], np.full(n, 1 + lam)])
        above = np.hstack([np.diag(g), -np.ones((n, 1)), -np.eye(n)])
        bounds = [(0, None)] * n + [(None, None)] + [(0, None)] * n
        sums = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
        best = linprog(cost, A_ub=above, b_ub=np.zeros(n), A_eq=sums, b_eq=[1.0], bounds=bounds)
        assert -best.fun == pytest.approx(game.value, abs=1e-9)
        checked += 1
    assert checked > 60


def test_the_support_grows_with_the_mistakes() -> None:
    for gains in games(200, seed=1):
        supports = [equilibrium(gains, m).support for m in range(len(gains))]
        assert supports == sorted(supports)


def test_shape_of_the_equilibrium() -> None:
    for i, gains in enumerate(games(60, seed=2)):
        game = equilibrium(gains, i % len(gains))
        inside = game.p > 0
        assert float(game.p.sum()) == pytest.approx(1)
        assert int(inside.sum()) == game.support
        assert set(inside.nonzero().flatten().tolist()) == set(gains.topk(game.support).indices.tolist())
        products = (game.p * gains)[inside]
        assert products.tolist() == pytest.approx([float(products[0])] * game.support)


def test_order_and_scale_of_the_gains_do_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    game, moved, scaled = equilibrium(GAINS, 2), equilibrium(GAINS[order], 2), equilibrium(0.3 * GAINS, 2)
    assert moved.p.tolist() == pytest.approx(game.p[order].tolist())
    assert scaled.p.tolist() == pytest.approx(game.p.tolist())
    assert (scaled.support, scaled.value) == (game.support, pytest.approx(0.3 * game.value))


def test_equal_gains_are_drawn_uniformly_once_there_is_a_mistake() -> None:
    game = equilibrium(torch.full((7,), 0.4), 1)
    assert game.support == 7
    assert game.p.tolist() == pytest.approx([1 / 7] * 7)


def test_no_placement_of_the_mistakes_spoils_the_expected_gain() -> None:
    for i, gains in enumerate(games(40, seed=3)):
        mistakes = i % len(gains)
        game = equilibrium(gains, mistakes)
        worst = (game.p * gains).topk(mistakes).values.sum() if mistakes else 0.0
        assert float((game.p * gains).sum() - worst) >= game.value - 1e-12
        if mistakes:  # the greedy choice can be made to earn nothing
            greedy = torch.zeros_like(gains).index_fill_(0, gains.argmax(), 1.0)
            assert float((greedy * gains).sum() - (greedy * gains).topk(mistakes).values.sum()) == 0


@pytest.mark.parametrize("mistakes", [-1, 5])
def test_more_mistakes_than_points_are_refused(mistakes: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 4"):
        equilibrium(GAINS, mistakes)
