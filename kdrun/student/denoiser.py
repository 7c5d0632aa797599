"""Class-conditional noise predictors eps(x_t, labels, t) of a diffusion model: a small MLP for points, DDPM's U-Net for images.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv 2006.11239. Labels are class indices; with
`null_label` there is one more, `num_classes`, which stands for "no label" (classifier-free guidance, arXiv 2207.12598).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdrun.errors import Problem, Refused
from kdrun.losses.score import NoiseSchedule, linear_schedule

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
BETAS: Mapping[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}  # DDPM, Sec. 4
SLOWEST = 1e4  # period of the slowest time feature, in steps over 2 pi: as in the Transformer and in DDPM


class Denoiser(nn.Module):
    """forward(x_t [B, ...], labels [B] int64, t [B] int64 counted from 0) -> predicted noise, shaped as x_t.

    schedule: the forward process that its times count; whatever trains it or samples from it goes by this one.
    """

    takes = ("labels", "t")
    schedule: NoiseSchedule

    def __init__(self, num_classes: int, null_label: bool) -> None:
        super().__init__()
        self.null_label = num_classes if null_label else None
        self.labels = num_classes + null_label  # how many different ones it can be given

    def example(self, rows: int) -> dict[str, Tensor]:
        """Labels and times of the right kind, for tracing shapes."""
        return {name: torch.zeros(rows, dtype=torch.int64) for name in self.takes}


NO_SCHEDULE = Problem(
    "the network does not say what noise it was made for", "student", "", "an attribute `schedule`, a kdrun.losses.score.NoiseSchedule"
)


def schedule_of(network: nn.Module) -> NoiseSchedule | None:
    """The forward process that a noise predictor's times count; None where it does not say."""
    found = getattr(network, "schedule", None)
    return found if isinstance(found, NoiseSchedule) else None


class MLPDenoiser(Denoiser):
    """Points [B, D]: an MLP with SiLU on (x, time features, label embedding).

    width: units of each of the `depth` hidden layers; features: numbers that encode the time, and the label.
    """

    def __init__(
        self, num_classes: int, in_features: int, width: int = 64, depth: int = 3, features: int = 32, null_label: bool = False
    ) -> None:
        super().__init__(num_classes, null_label)
        if width < 1 or depth < 1 or features < 2 or features % 2:
            raise ValueError(f"width={width}, depth={depth}: at least 1; features={features}: even, at least 2")
        self.schedule = linear_schedule()
        self.features = features
        self.embedding = nn.Embedding(self.labels, features)
        sizes = [in_features + 2 * features, *[width] * depth]
        self.hidden = nn.Sequential(*[part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())])
        self.out = nn.Linear(width, in_features)

    def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        return self.out(self.hidden(torch.cat([x, time_features(t, self.features).to(x.dtype), self.embedding(labels)], dim=1)))


def time_features(t: Tensor, count: int) -> Tensor:
    """sin and cos of t at count / 2 frequencies, log-spaced from 1 to 1 / SLOWEST.  [B] -> float32 [B, count]."""
    frequencies = torch.logspace(0, -math.log10(SLOWEST), count // 2, device=t.device)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNetDenoiser(Denoiser):
    """Images [B, C, size, size]: the U-Net of DDPM, from diffusers.

    channels times `multipliers`: channels of each resolution, halved from `size` on; `blocks` residual blocks each; self-attention
    where the resolution is `attention_at`. Defaults are DDPM's for CIFAR-10. scheduler: the forward process, diffusers'
    `DDPMScheduler` with betas of the form `beta_schedule`. Raises `Refused` where diffusers is missing.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        size: int = 32,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention_at: int = 16,
        dropout: float = 0.1,
        null_label: bool = True,
        beta_schedule: BetaSchedule = "linear",
    ) -> None:
        super().__init__(num_classes, null_label)
        if beta_schedule not in get_args(BetaSchedule):
            raise ValueError(f"beta_schedule={beta_schedule!r}: legal values {', '.join(get_args(BetaSchedule))}")
        try:
            from diffusers import DDPMScheduler, UNet2DModel
        except ImportError as error:
            remedy = 'pip install "kdrun[diffusion]"'
            raise Refused(Problem("a U-Net needs the package diffusers, which is not installed", remedy=remedy)) from error
        process: Any = DDPMScheduler  # the types of both are those of stand-ins for where torch is missing
        factory: Any = UNet2DModel
        with torch.device("cpu"):  # also where the network is built without content: its numbers are read
            self.scheduler = process(beta_schedule=beta_schedule, clip_sample=False, **BETAS)
        self.schedule = NoiseSchedule(self.scheduler.alphas_cumprod.double())
        attends = [size >> level == attention_at for level in range(len(multipliers))]
        self.unet = factory(
            sample_size=size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels * m for m in multipliers),
            layers_per_block=blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=None,  # one head, as in DDPM
            dropout=dropout,
            num_class_embeds=self.labels,
            # The remaining differences between diffusers' defaults and DDPM's own network (google/ddpm-cifar10-32).
            flip_sin_to_cos=False,
            freq_shift=1,
            downsample_padding=0,
            norm_eps=1e-6,
        )

    def forward(self, x: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]
