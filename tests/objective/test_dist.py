from __future__ import annotations

import pytest
import torch

from tests.objective.toy import ZS, ZT, add_up, logit_terms, make

ZS3 = torch.cat([ZS, torch.tensor([[0.5, -0.5, 0]], dtype=torch.float64)])
ZT3 = torch.cat([ZT, torch.tensor([[0, -1, 1]], dtype=torch.float64)])
Y3 = torch.tensor([0, 2, 1])


def test_values_of_the_example() -> None:
    terms = logit_terms(make("dist", temperature=1.0), ZS3, ZT3, Y3)
    assert terms["inter"].sum.item() / 3 == pytest.approx(0.313071, abs=1e-6)
    assert terms["intra"].sum.item() / 3 == pytest.approx(0.144068, abs=1e-6)


def test_inter_is_per_sample_and_intra_per_class() -> None:
    terms = logit_terms(make("dist"), ZS3, ZT3, Y3)
    assert (terms["ce"].unit, terms["inter"].unit, terms["intra"].unit) == ("label", "sample", "class")


def test_intra_is_a_mean_over_classes_whatever_the_batch() -> None:
    objective = make("dist", temperature=1.0, ce_weight=0.0, beta=0.0, gamma=1.0)
    twice = [torch.cat([x, x]) for x in (ZS3, ZT3, Y3)]
    loss = add_up(objective, logit_terms(objective, *twice), samples=6, classes=3)
    assert loss.item() == pytest.approx(0.144068, abs=1e-6)


def test_terms_carry_the_square_of_the_temperature() -> None:
    warm = logit_terms(make("dist", temperature=4.0), ZS3, ZT3, Y3)
    same = logit_terms(make("dist", temperature=1.0), ZS3 / 4, ZT3 / 4, Y3)
    for name in ("inter", "intra"):
        torch.testing.assert_close(warm[name].sum, 16 * same[name].sum, rtol=1e-12, atol=0)


def test_minimum_is_at_agreement() -> None:
    zs = ZT3.clone().requires_grad_()
    terms = logit_terms(make("dist", temperature=1.0), zs, ZT3, Y3)
    value = terms["inter"].sum + terms["intra"].sum
    value.backward()
    assert 0 <= value.item() < 1e-6  # eps 1e-8 in the denominator keeps it from 0
    assert zs.grad is not None
    assert zs.grad.abs().max() < 1e-6


def test_terms_lie_between_zero_and_two() -> None:
    g = torch.Generator().manual_seed(0)
    zs, zt = (10 * torch.randn(16, 4, generator=g, dtype=torch.float64) for _ in range(2))
    terms = logit_terms(make("dist", temperature=1.0), zs, zt, torch.zeros(16, dtype=torch.int64))
    assert 0 <= terms["inter"].sum.item() / 16 <= 2
    assert 0 <= terms["intra"].sum.item() / 4 <= 2
    opposite = logit_terms(make("dist", temperature=1.0), torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]]), torch.tensor([0]))
    assert opposite["inter"].sum.item() == pytest.approx(2, abs=1e-6)
