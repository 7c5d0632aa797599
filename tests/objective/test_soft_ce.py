"""Soft cross-entropy on targets that come with the data."""

from __future__ import annotations

import torch

from kdrun.losses.divergence import cross_entropy
from kdrun.types import Batch, Output, Signal
from tests.objective.toy import ZS, Y, make


def loss(targets: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(len(Y))
    batch = Batch(ZS, Y, ids, ids, {"soft_targets": targets})
    return make("soft_ce").terms(Output(ZS, {}, {}), Signal(None, {}), batch, "student", torch.nn.ModuleDict())["soft_ce"].sum


def test_one_hot_targets_give_cross_entropy() -> None:
    torch.testing.assert_close(loss(torch.nn.functional.one_hot(Y, 3).double()), cross_entropy(ZS, Y).sum(), rtol=1e-14, atol=0)


def test_a_worked_example() -> None:
    """Uniform targets on logits (1, 0, -1) and (0, 2, 1): minus the mean log probability of each, 1.4076 twice."""
    assert abs(float(loss(torch.full((2, 3), 1 / 3, dtype=torch.float64))) - 2 * 1.4076059644) < 1e-9


def test_the_slope_is_the_difference_of_the_distributions() -> None:
    zs, targets = ZS.clone().requires_grad_(), torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]], dtype=torch.float64)
    ids = torch.arange(2)
    term = make("soft_ce").terms(
        Output(zs, {}, {}), Signal(None, {}), Batch(zs, Y, ids, ids, {"soft_targets": targets}), "student", torch.nn.ModuleDict()
    )
    term["soft_ce"].sum.backward()
    torch.testing.assert_close(zs.grad, zs.detach().softmax(-1) - targets, rtol=1e-12, atol=1e-12)
