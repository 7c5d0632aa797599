from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.objective.toy import ZS, ZT, Y, add_up, logit_terms, make


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.0])
def test_loss_is_the_cross_entropy_with_a_smoothed_label(epsilon: float) -> None:
    objective = make("label_smoothing", epsilon=epsilon)
    loss = add_up(objective, logit_terms(objective, ZS, ZT, Y), len(Y))
    assert loss.item() == pytest.approx(F.cross_entropy(ZS, Y, label_smoothing=epsilon).item(), abs=1e-12)


def test_gradient_pulls_towards_the_smoothed_label() -> None:
    zs = ZS.clone().requires_grad_()
    objective = make("label_smoothing")
    add_up(objective, logit_terms(objective, zs, ZT, Y), len(Y)).backward()
    target = 0.9 * F.one_hot(Y, 3).double() + 0.1 / 3
    torch.testing.assert_close(zs.grad, (ZS.softmax(1) - target) / len(Y), rtol=0, atol=1e-12)


def test_a_class_that_is_masked_gets_no_share() -> None:
    zs = torch.cat([ZS, torch.full((2, 1), -torch.inf, dtype=torch.float64)], 1)
    objective = make("label_smoothing")
    masked, plain = (logit_terms(objective, z, ZT, Y) for z in (zs, ZS))
    assert masked["uniform"].sum.item() == pytest.approx(plain["uniform"].sum.item(), abs=1e-12)


def test_a_sample_without_label_has_no_loss() -> None:
    objective = make("label_smoothing")
    terms, labelled = logit_terms(objective, ZS, ZT, torch.tensor([-1, 2])), logit_terms(objective, ZS[1:], ZT[1:], Y[1:])
    assert {k: t.sum.item() for k, t in terms.items()} == {k: t.sum.item() for k, t in labelled.items()}
    assert {t.unit for t in terms.values()} == {"label"}
