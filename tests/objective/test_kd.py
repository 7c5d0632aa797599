from __future__ import annotations

import pytest
import torch

from tests.objective.toy import ZS, ZT, Y, add_up, logit_terms, make


def test_value_and_gradient_of_the_example_at_temperature_4() -> None:
    zs = ZS.clone().requires_grad_()
    value = logit_terms(make("kd"), zs, ZT, Y)["kd"].sum / 2
    value.backward()
    assert value.item() == pytest.approx(0.234575, abs=1e-6)
    expected = torch.tensor([[-0.04997, -0.038917, 0.088887], [-0.074962, -0.123591, 0.198552]], dtype=torch.float64)
    torch.testing.assert_close(zs.grad, expected, rtol=0, atol=1e-6)


def test_value_of_the_example_at_temperature_1() -> None:
    assert logit_terms(make("kd", temperature=1.0), ZS, ZT, Y)["kd"].sum.item() / 2 == pytest.approx(0.088607, abs=1e-6)


def test_loss_of_the_example_is_a_tenth_label_and_nine_tenths_teacher() -> None:
    objective = make("kd")
    loss = add_up(objective, logit_terms(objective, ZS, ZT, Y), 2, classes=3)
    assert loss.item() == pytest.approx(0.1 * 0.907606 + 0.9 * 0.234575, abs=1e-6)


def test_high_temperature_matches_centred_logits() -> None:
    centred = (ZS - ZS.mean(1, keepdim=True)) - (ZT - ZT.mean(1, keepdim=True))
    limit = centred.square().sum().item() / (2 * 3)
    errors = [abs(logit_terms(make("kd", temperature=t), ZS, ZT, Y)["kd"].sum.item() - limit) for t in (10.0, 100.0, 1000.0)]
    assert errors[2] < 1e-3 * limit
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5


def test_loss_and_gradient_are_zero_at_agreement() -> None:
    zs = ZT.clone().requires_grad_()
    value = logit_terms(make("kd"), zs, ZT, Y)["kd"].sum
    value.backward()
    assert value.item() == 0
    assert zs.grad is not None
    assert zs.grad.abs().max() < 1e-15


def test_only_differences_of_logits_count() -> None:
    expected = logit_terms(make("kd"), ZS, ZT, Y)["kd"].sum
    shifted = logit_terms(make("kd"), ZS + 7, ZT - 3, Y)["kd"].sum
    torch.testing.assert_close(shifted, expected, rtol=1e-12, atol=0)
