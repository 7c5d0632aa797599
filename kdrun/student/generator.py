"""Samples from a noise predictor: in one network call, as a network of its own that can be trained, or in many by a solver.

    x = x_init / a - sigma eps(x_init, c, t_init),   x_init = b z,  z ~ N(0, I),  sigma = b / a

The one-step form is that of SiD (Zhou et al., ICML 2024, arXiv 2404.04057) in the terms of DDPM: the data prediction at the
fixed step t_init of pure noise, without a signal part. t_init 440 has sigma 2.5023 (SiD: 2.5).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.losses.score import NoiseSchedule
from kdrun.student.denoiser import Denoiser, MLPDenoiser, UNetDenoiser

Solver = Literal["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]  # of diffusers, those that draw nothing


class OneStepGenerator(nn.Module):
    """forward(z [B, ...] standard normal, labels [B] int64) -> samples shaped as z. Its weights are those of the denoiser."""

    takes = ("labels",)

    def __init__(self, denoiser: Denoiser, t_init: int = 440) -> None:
        super().__init__()
        schedule = denoiser.schedule
        if not 0 <= t_init < len(schedule):
            raise ValueError(f"t_init={t_init}: legal range [0, {len(schedule)})")
        self.denoiser = denoiser
        self.t_init = t_init
        self.signal, self.noise = schedule.at(t_init)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x_init = self.noise * z
        eps = self.denoiser(x_init, labels=labels, t=torch.full_like(labels, self.t_init))
        return (x_init - self.noise * eps) / self.signal

    def example(self, rows: int) -> dict[str, Tensor]:
        """Labels of the right kind, for tracing shapes."""
        return {"labels": torch.zeros(rows, dtype=torch.int64)}


def one_step_mlp(num_classes: int, in_features: int, t_init: int = 440, **denoiser: Any) -> nn.Module:
    """A one-step generator of points around an `MLPDenoiser`, which takes the other arguments."""
    return OneStepGenerator(MLPDenoiser(num_classes, in_features, **denoiser), t_init)


def one_step_unet(num_classes: int, in_channels: int, t_init: int = 440, **denoiser: Any) -> nn.Module:
    """A one-step generator of images around a `UNetDenoiser`, which takes the other arguments."""
    return OneStepGenerator(UNetDenoiser(num_classes, in_channels, **denoiser), t_init)


def solve(denoiser: nn.Module, solver: Solver, z: Tensor, labels: Tensor, calls: int) -> Tensor:
    """Deterministic samples in `calls` network calls by one of diffusers' solvers, with the forward process of the network's `scheduler`.

    Steps end at the noisiest one ("trailing"), and samples are not clipped. z [B, ...] standard normal, labels [B] -> [B, ...].
    """
    import diffusers

    own: Any = denoiser.scheduler
    scheduler = getattr(diffusers, solver).from_config(own.config, timestep_spacing="trailing")
    scheduler.set_timesteps(calls, device=z.device)
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        eps = denoiser(scheduler.scale_model_input(x, t), labels=labels, t=t.expand(len(z)))
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x


def ddim(denoiser: nn.Module, schedule: NoiseSchedule, z: Tensor, labels: Tensor, calls: int) -> Tensor:
    """Deterministic samples in `calls` network calls (Song, Meng, Ermon, DDIM, ICLR 2021, arXiv 2010.02502, eq. 12 with sigma 0).

    Steps are evenly spaced and end at the noisiest one (diffusers calls this "trailing"); the last call's data prediction is
    the sample. z [B, ...] standard normal, labels [B] -> [B, ...].
    """
    x = z
    stride = len(schedule) / calls
    times = [round(len(schedule) - i * stride) - 1 for i in range(calls)]
    for t, following in zip(times, [*times[1:], None], strict=True):
        now = torch.full_like(labels, t)
        eps = denoiser(x, labels=labels, t=now)
        x0 = schedule.to_x0(x, now, eps)
        if following is None:
            return x0
        a, b = schedule.at(following)
        x = a * x0 + b * eps
    return x
