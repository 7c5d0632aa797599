from __future__ import annotations

import math

import pytest
import torch

from kdrun.losses.contrast import bank_scores, noise_contrastive


def test_value_of_the_example() -> None:
    scores = torch.tensor([[0.3, 0.05, 0.1]], dtype=torch.float64).log()
    assert noise_contrastive(scores, population=10).item() == pytest.approx(1.139435, abs=1e-6)


def test_loss_is_per_sample_and_matches_plain_arithmetic() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 6, generator=g, dtype=torch.float64)
    c, eps = 5 / 20, 1e-7
    plain = -(scores[:, 0] / (scores[:, 0] + c + eps)).log() - (c / (scores[:, 1:] + c + eps)).log().sum(1)
    torch.testing.assert_close(noise_contrastive(scores.log(), population=20), plain, rtol=1e-12, atol=0)


def test_loss_rewards_a_high_positive_and_low_negatives() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    noise_contrastive(scores, population=10).sum().backward()
    assert scores.grad is not None
    assert (scores.grad.sign() == torch.tensor([[-1.0, 1.0, 1.0]])).all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_loss_and_gradient_are_finite_where_exp_overflows(size: float) -> None:
    scores = torch.tensor([[-size, size, size], [size, -size, -size]], requires_grad=True)
    loss = noise_contrastive(scores, population=10)
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(3 * size - math.log(0.2), rel=0.05)
    assert loss[1].item() == pytest.approx(0, abs=1e-5)
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_inner_products_with_the_chosen_rows(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    v, bank = torch.randn(3, 8, generator=g).to(dtype), torch.randn(20, 8, generator=g)
    rows = torch.randint(20, (3, 5), generator=g)
    expected = torch.einsum("bd,bkd->bk", v.float(), bank[rows]) / 0.07
    with torch.autocast("cpu", torch.bfloat16):
        scores = bank_scores(v, bank, rows, 0.07)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
