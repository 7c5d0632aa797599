from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdrun.losses.score import diff_instruct_loss, generator_loss, linear_schedule, noise_error

SCHEDULE = linear_schedule()


def draw(*shape: int, seed: int = 0, count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    ("t", "abar", "sigma"), [(38, 0.98151, 0.1373), (440, 0.13771, 2.5023), (711, 0.0058709, 13.0128), (712, 0.0057870, 13.1073)]
)
def test_schedule_has_the_published_values(t: int, abar: float, sigma: float) -> None:
    assert float(f"{SCHEDULE.abar[t].item():.5g}") == abar
    assert round(SCHEDULE.sigma(t), 4) == sigma


def test_schedule_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert len(SCHEDULE) == len(theirs.alphas_cumprod)
    torch.testing.assert_close(SCHEDULE.abar, theirs.alphas_cumprod.double(), rtol=2e-5, atol=0)  # theirs is a float32 product
    x0, noise = (x.float() for x in draw(4, 3, 2, 2, count=2))
    t = torch.tensor([0, 38, 440, 999])
    torch.testing.assert_close(SCHEDULE.diffuse(x0, t, noise), theirs.add_noise(x0, noise, t), rtol=1e-5, atol=1e-6)


def test_signal_and_noise_keep_the_variance() -> None:
    for t in (0, 38, 440, 999):
        a, b = SCHEDULE.at(t)
        assert a**2 + b**2 == pytest.approx(1, abs=1e-12)


def test_predictions_of_noise_and_of_data_are_one_another() -> None:
    x0, noise = draw(5, 3, 4, 4, count=2)
    t = torch.tensor([0, 38, 440, 711, 999])
    x_t = SCHEDULE.diffuse(x0, t, noise)
    torch.testing.assert_close(SCHEDULE.to_x0(x_t, t, noise), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(SCHEDULE.to_eps(x_t, t, x0), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha", "value"), [(0.5, 0.75), (1.0, 0.5), (1.2, 0.4)])
def test_value_of_the_example(alpha: float, value: float) -> None:
    phi, psi, x = (torch.tensor([v], dtype=torch.float64) for v in ([1.0, 2.0], [0.5, 1.5], [0.0, 1.0]))
    assert generator_loss(phi, psi, x, alpha).item() == pytest.approx(value, abs=1e-12)


def test_alpha_a_half_is_the_difference_of_squared_errors() -> None:
    phi, psi, x = draw(6, 3, 2, 2)
    omega = (phi - x).abs().flatten(1).mean(1)
    expected = ((phi - x).square() - (psi - x).square()).flatten(1).sum(1) / omega / 2
    torch.testing.assert_close(generator_loss(phi, psi, x, 0.5), expected, rtol=1e-12, atol=1e-12)


def test_alpha_one_is_the_product_with_the_fake_error() -> None:
    phi, psi, x = draw(6, 3, 2, 2)
    omega = (phi - x).abs().flatten(1).mean(1)
    expected = ((phi - psi) * (psi - x)).flatten(1).sum(1) / omega
    torch.testing.assert_close(generator_loss(phi, psi, x, 1.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_equal_predictions_give_no_loss(alpha: float) -> None:
    phi, x = draw(6, 2, count=2)
    assert generator_loss(phi, phi, x, alpha).abs().max() == 0


@pytest.mark.parametrize("loss", [lambda a, b, x: generator_loss(a, b, x, 1.2), diff_instruct_loss])
def test_omega_carries_no_gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """With omega held by hand, value and gradient are the same."""
    phi, psi, x = (v.requires_grad_() for v in draw(4, 3))
    omega = (phi - x).abs().mean(1).detach()
    by_hand = (phi - psi) * ((phi - x) - 1.2 * (phi - psi))
    if loss is diff_instruct_loss:
        by_hand = (phi.detach() - psi.detach()) * (psi.detach() - x)
    leaves = [phi, psi, x]
    mine, theirs = (torch.autograd.grad(v.sum(), leaves, allow_unused=True) for v in (loss(phi, psi, x), by_hand.sum(1) / omega))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_diff_instruct_has_the_gradient_of_the_score_difference() -> None:
    phi, psi, x = (v.requires_grad_() for v in draw(4, 3, 2, 2))
    diff_instruct_loss(phi, psi, x).sum().backward()
    omega = (phi - x).detach().abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    assert (phi.grad, psi.grad) == (None, None)
    torch.testing.assert_close(x.grad, ((psi - phi) / omega).detach(), rtol=1e-12, atol=1e-12)


def test_detached_predictions_change_the_gradient() -> None:
    x = draw(4, 3, count=1)[0].requires_grad_()
    phi, psi = torch.tanh(2 * x), torch.sin(x)  # predictions of the sample, as networks make them
    through = torch.autograd.grad(generator_loss(phi, psi, x, 1.2).sum(), x)[0]
    around = torch.autograd.grad(generator_loss(phi.detach(), psi.detach(), x, 1.2).sum(), x)[0]
    assert (through - around).abs().max() > 1e-2


def test_losses_are_sums_over_the_elements_of_each_sample() -> None:
    phi, psi, x = draw(4, 2, 3)
    twice = [torch.cat([v, v], 2) for v in (phi, psi, x)]  # every element twice: the sum doubles, omega is a mean
    torch.testing.assert_close(generator_loss(*twice, 1.2), 2 * generator_loss(phi, psi, x, 1.2), rtol=1e-12, atol=0)
    torch.testing.assert_close(noise_error(twice[0], twice[1]), 2 * noise_error(phi, psi), rtol=1e-12, atol=0)
    assert noise_error(phi, psi).shape == generator_loss(phi, psi, x, 1.2).shape == (4,)
    torch.testing.assert_close(noise_error(phi, psi)[1], (phi[1] - psi[1]).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e4])
def test_losses_and_gradients_are_finite_at_extremes(dtype: torch.dtype, size: float) -> None:
    phi, psi, x = ((size * v.sign()).to(dtype).requires_grad_() for v in draw(4, 3))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = [generator_loss(phi, psi, x, 1.2), noise_error(phi, psi), diff_instruct_loss(phi, psi, x)]
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        grads = torch.autograd.grad(loss.sum(), [phi, psi, x], allow_unused=True, retain_graph=True)
        assert all(g.isfinite().all() for g in grads if g is not None)


def test_float64_stays_float64_and_half_is_raised() -> None:
    phi, psi, x = draw(2, 3)
    assert generator_loss(phi, psi, x, 1.2).dtype == noise_error(phi, psi).dtype == torch.float64
    t = torch.tensor([711, 999])
    assert SCHEDULE.to_x0(x.half(), t, phi.half()).dtype == torch.float32
    assert SCHEDULE.diffuse(x, t, phi).dtype == torch.float64


def test_gradients_match_finite_differences() -> None:
    phi, psi, x = (v.requires_grad_() for v in draw(2, 3))
    omega = (phi - x).abs().mean(1).detach()
    assert torch.autograd.gradcheck(lambda a, b, c: generator_loss(a, b, c, 1.2) * (a - c).detach().abs().mean(1) / omega, [phi, psi, x])
