from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdrun.losses.policy import (
    clipped_policy,
    dpo,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    log_ratio,
    minillm_rewards,
    returns,
    sampled_token,
    sequence_log_ratio,
    simpo,
)
from kdrun.losses.token import forward_kl, reverse_kl

REFERENCE = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
STUDENT = torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=torch.float64)


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def expectation(of: Callable[[Tensor, Tensor], Tensor], student: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens drawn from the student of an estimator and of its gradient, by enumeration."""
    z = student.clone().requires_grad_()
    values = of(z.log_softmax(0), reference.log_softmax(0))
    q = z.detach().softmax(0)
    (gradient,) = torch.autograd.grad((q * values).sum(), z)
    return (q * values.detach()).sum(), gradient


def gradient_of(divergence: Callable[[Tensor, Tensor], Tensor], student: Tensor, other: Tensor) -> Tensor:
    z = student.clone().requires_grad_()
    return torch.autograd.grad(divergence(z, other), z)[0]


@pytest.mark.parametrize(
    ("std", "eps", "good", "bad"),
    [("population", 0.0, 1.290994, -0.774597), ("unbiased", 1e-4, 1.207381, -0.724429), ("none", 0.0, 0.625, -0.375)],
)
def test_advantages_of_the_example(std: str, eps: float, good: float, bad: float) -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    expected = torch.where(rewards == 1, scalar(good), scalar(bad))
    found = group_advantages(torch.stack([rewards, rewards.flip(0)]), std, eps)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.stack([expected, expected.flip(0)]), rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_groups_without_spread_have_no_advantages(eps: float) -> None:
    for std in ("population", "unbiased", "none"):
        for rewards in (torch.ones(2, 4), torch.ones(2, 1)):
            assert (group_advantages(rewards, std, eps) == 0).all()


@pytest.mark.parametrize(("advantage", "rho", "value"), [(1, 1.5, 1.28), (1, 0.5, 0.5), (-1, 1.5, -1.5), (-1, 0.5, -0.8)])
def test_clipped_objective_of_the_example(advantage: float, rho: float, value: float) -> None:
    assert clipped_policy(scalar(rho).log(), scalar(advantage), 0.2, 0.28).item() == pytest.approx(-value, abs=1e-12)


def test_clipped_tokens_give_no_gradient_and_the_first_step_is_the_policy_gradient() -> None:
    for advantage, rho, slope in ((1.0, 1.5, 0.0), (-1.0, 0.5, 0.0), (1.0, 0.5, -0.5), (-1.0, 1.5, 1.5), (2.0, 1.0, -2.0)):
        ratio = scalar(rho).log().requires_grad_()
        clipped_policy(ratio, scalar(advantage), 0.2, 0.28).backward()
        assert ratio.grad is not None
        assert ratio.grad.item() == pytest.approx(slope, abs=1e-12)


def test_ratios_beyond_all_bounds_give_finite_values_and_gradients() -> None:
    new = torch.tensor([0.0, -2000.0, 0.0, -2000.0], requires_grad=True)
    old, advantages = torch.tensor([-2000.0, 0.0, -2000.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = clipped_policy(log_ratio(new, old), advantages).sum() + kl_k3(new, old).sum()
    loss.backward()
    assert loss.isfinite()
    assert new.grad is not None
    assert new.grad.isfinite().all()


def test_gspo_ratio_is_the_geometric_mean_of_the_scored_tokens() -> None:
    new, old = torch.tensor([[-1.0, -2, -9], [-1, -1, -1]]).double(), torch.tensor([[-2.0, -1.5, 0], [-1, -2, -4]]).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(sequence_log_ratio(log_ratio(new, old), mask), torch.tensor([0.25, 4 / 3]).double(), rtol=1e-7, atol=0)
    assert sequence_log_ratio(log_ratio(new, old), torch.zeros_like(mask)).tolist() == [0, 0]


@pytest.mark.parametrize(("estimator", "value"), [(kl_k1, 0.4), (kl_k2, 0.08), (kl_k3, 0.070320)])
def test_kl_estimators_of_the_example(estimator: Callable[[Tensor, Tensor], Tensor], value: float) -> None:
    assert estimator(scalar(-0.5), scalar(-0.9)).item() == pytest.approx(value, abs=5.1e-7)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    kl = reverse_kl(STUDENT, REFERENCE)
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close(expectation(estimator, STUDENT, REFERENCE)[0], kl, rtol=1e-12, atol=0)
    assert (expectation(kl_k2, STUDENT, REFERENCE)[0] - kl).abs() > 0.01


def test_gradients_of_the_estimators_are_nothing_the_reverse_and_the_forward_kls() -> None:
    expected = {
        kl_k1: torch.zeros(4, dtype=torch.float64),
        kl_k2: gradient_of(reverse_kl, STUDENT, REFERENCE),
        kl_k3: gradient_of(forward_kl, STUDENT, REFERENCE),
    }
    for estimator, gradient in expected.items():
        torch.testing.assert_close(expectation(estimator, STUDENT, REFERENCE)[1], gradient, rtol=1e-11, atol=1e-15)


def test_sampled_token_has_the_gradient_of_the_reverse_kl_in_expectation() -> None:
    teacher, student = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log(), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.515504, abs=1e-6)
    gradient = expectation(sampled_token, student, teacher)[1]
    torch.testing.assert_close(gradient, gradient_of(reverse_kl, student, teacher), rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(gradient, torch.tensor([-0.362478, 0.312537, 0.049941], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("gamma", "plain", "by_step"),
    [(1.0, [0.5, 0.3, 0.4], [0.166667, 0.15, 0.4]), (0.95, [0.466, 0.28, 0.4], [0.155333, 0.14, 0.4])],
)
def test_returns_of_the_example(gamma: float, plain: list[float], by_step: list[float]) -> None:
    rewards = torch.tensor([[0.2, -0.1, 0.4, 7.0], [7.0, 0.2, -0.1, 0.4]], dtype=torch.float64)  # padded after and before
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    for per_step, expected in ((False, plain), (True, by_step)):
        row = torch.tensor(expected, dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        found = returns(rewards, mask, gamma, per_step)
        torch.testing.assert_close(found, torch.stack([torch.cat([row, zero]), torch.cat([zero, row])]), rtol=0, atol=5.1e-7)


def test_rewards_of_minillm_are_scaled_clipped_and_detached() -> None:
    log_q = torch.tensor([-1.0, -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    rewards = minillm_rewards(log_q, torch.tensor([-0.5, -1.0, -1000.0], dtype=torch.float64))
    assert rewards.tolist() == [1.0, -1.0, -100.0]
    assert not rewards.requires_grad


def test_dpo_of_the_example_and_its_weight() -> None:
    chosen, rejected = scalar(-10.0).requires_grad_(), scalar(-12.0).requires_grad_()
    loss = dpo(chosen, rejected, scalar(-11.0), scalar(-11.5), beta=0.1)
    assert loss.item() == pytest.approx(0.620957, abs=5.1e-7)
    gradients = torch.autograd.grad(loss, [chosen, rejected])
    weight = 0.1 * torch.sigmoid(scalar(-0.15))
    torch.testing.assert_close(torch.stack(gradients), torch.stack([-weight, weight]), rtol=1e-12, atol=0)


def test_simpo_of_the_example() -> None:
    loss = simpo(scalar(-10.0), scalar(-12.0), torch.tensor(5), torch.tensor(8), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(2.126928, abs=5.1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype: torch.dtype) -> None:
    a, b = torch.tensor([-1.0, -3.0], dtype=dtype), torch.tensor([-2.0, -0.5], dtype=dtype)
    results = [kl_k1(a, b), kl_k2(a, b), kl_k3(a, b), log_ratio(a, b), sampled_token(a, b), dpo(a, b, a, b), minillm_rewards(a, b)]
    assert {r.dtype for r in [*results, group_advantages(a)]} == {torch.float32}


def test_preferences_at_extreme_log_probabilities_are_finite() -> None:
    chosen = torch.tensor([-1e5, 0.0], requires_grad=True)
    loss = dpo(chosen, torch.tensor([0.0, -1e5]), torch.zeros(2), torch.zeros(2), beta=1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()
