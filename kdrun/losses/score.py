"""Diffusion: the forward process, conversions between noise and data predictions, and the losses of score distillation.

Forward process (Ho, Jain, Abbeel, DDPM, NeurIPS 2020, arXiv 2006.11239): x_t = a_t x0 + b_t e, a_t = sqrt(abar_t),
b_t = sqrt(1 - abar_t), e ~ N(0, I); t counts from 0 and abar_t is the product of 1 - beta up to and including t.

Score identity distillation (Zhou et al., SiD, ICML 2024, arXiv 2404.04057): a generator is pulled towards a teacher's
distribution by the difference of the teacher's and a "fake" score network's predictions on its own noised samples.

Both losses are SUMS over the elements of a sample, in squared data or noise units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun.losses.precision import widen

SMALLEST_SCALE = 1e-5  # omega is clamped here: public code of SFD (tqch/score-forgetting-distillation)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """abar by step, float64 [T], on one device."""

    abar: Tensor

    def __len__(self) -> int:
        return len(self.abar)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.abar.to(device))

    def at(self, t: int) -> tuple[float, float]:
        """(a_t, b_t) of one step."""
        abar = self.abar[t].item()
        return abar**0.5, (1 - abar) ** 0.5

    def sigma(self, t: int) -> float:
        """b_t / a_t: the noise level of x_t / a_t."""
        a, b = self.at(t)
        return b / a

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t, b_t for t [B], shaped [B, 1, ...] to multiply `like` [B, ...], in its dtype or float32 if that is narrower."""
        abar = self.abar[t].view(-1, *[1] * (like.dim() - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of x0 [B, ...] at t [B] with the noise [B, ...]."""
        a, b = self.scales(t, x0)
        return a * x0 + b * noise

    def to_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The data prediction (x_t - b_t eps) / a_t of a noise prediction; at least float32, since 1 / a_t is up to 157."""
        a, b = self.scales(t, x_t)
        return (widen(x_t) - b * widen(eps)) / a

    def to_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise prediction (x_t - a_t x0) / b_t of a data prediction."""
        a, b = self.scales(t, x_t)
        return (widen(x_t) - a * widen(x0)) / b


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> NoiseSchedule:
    """beta rises linearly from `first` to `last`: the constants of DDPM, Sec. 4."""
    # On the CPU wherever a network is built (also on the meta device): its numbers are read.
    return NoiseSchedule((1 - torch.linspace(first, last, steps, dtype=torch.float64, device="cpu")).cumprod(0))


def noise_error(predicted: Tensor, noise: Tensor) -> Tensor:
    """|eps - e|^2 summed over a sample's elements: the loss of a denoiser and of the fake score.  [B, ...] twice -> [B]."""
    return (widen(predicted) - widen(noise)).square().flatten(1).sum(1)


def generator_loss(teacher: Tensor, fake: Tensor, x: Tensor, alpha: float) -> Tensor:
    """(1 / omega) <f_phi - f_psi, (f_phi - x) - alpha (f_phi - f_psi)>: the generator's loss of SiD.

    teacher f_phi, fake f_psi: data predictions of the noised sample; x: the generator's sample; all [B, ...] -> [B]. Gradient
    reaches x and whatever the predictions were made from; omega = mean |f_phi - x| over a sample's elements has none.
    """
    teacher, fake, x = widen(teacher), widen(fake), widen(x)
    gap = teacher - fake
    return (gap * ((teacher - x) - alpha * gap)).flatten(1).sum(1) / _scale(teacher, x)


def diff_instruct_loss(teacher: Tensor, fake: Tensor, x: Tensor) -> Tensor:
    """<f_phi - f_psi, f_psi - x> / omega with both predictions detached: its gradient with respect to x is (f_psi - f_phi) / omega.

    Diff-Instruct (Luo et al., NeurIPS 2023, arXiv 2305.18455) as the public code of SFD has it. Shapes as in `generator_loss`.
    """
    teacher, fake, x = widen(teacher).detach(), widen(fake).detach(), widen(x)
    return ((teacher - fake) * (fake - x)).flatten(1).sum(1) / _scale(teacher, x)


def _scale(teacher: Tensor, x: Tensor) -> Tensor:
    """omega [B], without gradient."""
    return (teacher - x).detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_SCALE)
