from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrun.losses.divergence import kl_divergence, nontarget_divergence, target_divergence
from kdrun.types import Progress
from tests.objective.toy import ZS, ZT, Y, logit_terms, make


def test_values_of_the_example() -> None:
    terms = logit_terms(make("dkd"), ZS, ZT, Y)
    tckd, nckd = terms["tckd"].sum.item() / 2, terms["nckd"].sum.item() / 2
    assert tckd == pytest.approx(0.201329, abs=1e-6)
    assert nckd == pytest.approx(0.059818, abs=1e-6)
    assert tckd + 8 * nckd == pytest.approx(0.679874, abs=1e-6)
    assert terms["ce"].sum.item() / 2 == pytest.approx(0.907606, abs=1e-6)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 20), temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]))
def test_kd_is_target_part_plus_weighted_nontarget_part_per_sample(seed: int, classes: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(seed)
    zs, zt = (3 * torch.randn(4, classes, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.randint(classes, (4,), generator=g)
    p_y = (zt / temperature).softmax(1).gather(1, y[:, None]).squeeze(1)
    decoupled = target_divergence(zs, zt, y, temperature) + (1 - p_y) * nontarget_divergence(zs, zt, y, temperature)
    torch.testing.assert_close(decoupled, kl_divergence(zs, zt, temperature), rtol=1e-9, atol=1e-12)


def test_identity_holds_for_the_terms_with_their_temperature_factor() -> None:
    for i in range(2):
        zs, zt, y = ZS[i : i + 1], ZT[i : i + 1], Y[i : i + 1]
        terms = logit_terms(make("dkd"), zs, zt, y)
        p_y = (zt / 4).softmax(1)[0, y[0]]
        kd = logit_terms(make("kd"), zs, zt, y)["kd"].sum
        torch.testing.assert_close(terms["tckd"].sum + (1 - p_y) * terms["nckd"].sum, kd, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("epoch", "warm"), [(1, 0.05), (2, 0.1), (10, 0.5), (20, 1.0), (21, 1.0), (240, 1.0)])
def test_warmup_counts_epochs_from_one(epoch: int, warm: float) -> None:
    for step in ((epoch - 1) * 7, epoch * 7 - 1):  # first and last step of the epoch
        weights = make("dkd").weights(Progress(step, 240 * 7, 7))
        assert weights == pytest.approx({"ce": 1.0, "tckd": warm, "nckd": 8 * warm})


def test_no_warmup_is_full_weight_from_the_first_step() -> None:
    assert make("dkd", warmup_epochs=0).weights(Progress(0, 10, 5)) == {"ce": 1.0, "tckd": 1.0, "nckd": 8.0}


def test_loss_and_gradient_are_zero_at_agreement() -> None:
    for term in ("tckd", "nckd"):
        zs = ZT.clone().requires_grad_()
        value = logit_terms(make("dkd"), zs, ZT, Y)[term].sum
        value.backward()
        assert value.item() == 0
        assert zs.grad is not None
        assert zs.grad.abs().max() < 1e-15


def test_parts_see_only_what_is_theirs() -> None:
    zs = ZS.clone()
    zs[torch.arange(2), Y] += 5  # the target's logit alone
    before, after = logit_terms(make("dkd"), ZS, ZT, Y), logit_terms(make("dkd"), zs, ZT, Y)
    torch.testing.assert_close(after["nckd"].sum, before["nckd"].sum, rtol=1e-12, atol=0)
    assert (after["tckd"].sum - before["tckd"].sum).abs() > 0.1


def test_two_classes_have_no_nontarget_part() -> None:
    assert logit_terms(make("dkd"), ZS[:, :2], ZT[:, :2], torch.tensor([0, 1]))["nckd"].sum.item() == 0
