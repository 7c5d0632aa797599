"""ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation (Lan, Tian, ICCV 2025, arXiv 2503.06307).

    L = CE + alpha (L_c + L_s) + lambda L_div,      summed over the distilled maps
    A = softmax((W_q F_T)^T (W_k F_S) / sqrt(C_q)),  F = A (W_v F_S)^T,  C_q = max(1, C // 2)                 (STCA-FF)
    M^c = sigmoid(m_c mean_p F) [M, C],   M^s = sigmoid(m_s F^T) [M, HW]                                       (ASCM)
    L_c = 1/M sum_m |M^c_m (x) (F_T - F_S)|^2 / (HW sum_k M^c_mk),   L_s likewise with C and positions

The teacher's map asks, the student's answers; from their common features, channel and spatial masks are made anew at every
step. L_div is the Dice overlap of the channel masks plus that of the spatial masks. The student learns through the
difference and through W_k, W_v. Teacher and student are compared at the same positions, after `pool`: the attention costs
(HW)^2, so large maps are pooled to about 64x64 at most (ours).

`norm="literal"` multiplies by the sum of the mask where the default divides: secondary sources print the former, the code of
MasKD (github.com/hunto/MasKD), which this work extends, has the latter; which one the paper has is unconfirmed. Under the
default the error is of degree 1 in the masks, so they can shrink to lower it and Dice, which does not see scale, lets them:
watch `mask_channel` and `mask_spatial`, or set `mask_grad="div_only"`, by which L_div alone trains them.

`mask_source="teacher"` makes the masks from the teacher's map alone, in all three places (the teacher-mask baseline);
`frozen` then leaves W and m as they were drawn, and the masks of an image never move.

Units: squared feature units per sample; Dice overlap per sample; nats per labelled pixel. Constants: alpha = lambda = 1 and
M = 6 (detection) or the class count (segmentation) are the paper's; m ~ N(0, 0.01^2) is MasKD's, here unconfirmed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.losses.precision import widen, without_autocast
from kdrun.losses.spatial import Dice, Norm, channel_masked_error, mask_overlap, spatial_masked_error
from kdrun.objective._checks import require_nonnegative
from kdrun.objective._maps import MapObjective
from kdrun.objective._tasks import task_terms
from kdrun.types import Batch, Connectors, Context, Output, Progress, Signal, Start, Term

Side = Literal["teacher", "student"]
UNIT_STD = 0.01  # of the selection units at their start: the code of MasKD
WATCHED = 16  # training images whose masks are held against each other: ours
PARTS = ("channel", "spatial")


class CrossAttention(nn.Module):
    """STCA-FF. The fused features [B, HW, C] of the map that asks and the one that answers, [B, C, H, W] both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // 2)
        self.query = nn.Conv2d(channels, narrow, kernel_size=1, bias=False)
        self.key = nn.Conv2d(channels, narrow, kernel_size=1, bias=False)
        self.value = nn.Conv2d(channels, channels, kernel_size=1, bias=False)

    def forward(self, asks: Tensor, answers: Tensor) -> Tensor:
        q, k, v = (conv(maps).flatten(2).mT for conv, maps in ((self.query, asks), (self.key, answers), (self.value, answers)))
        return F.scaled_dot_product_attention(q, k, v)


class AttentionMasks(nn.Module):
    """STCA-FF and ASCM for one pair of maps: forward(teacher, student) [B, C, H, W] -> (M^c [B, M, C], M^s [B, M, HW])."""

    def __init__(self, channels: int, count: int, query: Side) -> None:
        super().__init__()
        self.teacher_asks = query == "teacher"
        self.fusion = CrossAttention(channels)
        self.channel_units = nn.Parameter(UNIT_STD * torch.randn(count, 1))
        self.spatial_units = nn.Parameter(UNIT_STD * torch.randn(count, channels))

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        asks, answers = (teacher, student) if self.teacher_asks else (student, teacher)
        with without_autocast(asks):  # the products of two maps leave the range of float16
            fused = self.fusion(widen(asks), widen(answers))
            channel = torch.sigmoid(self.channel_units * fused.mean(1, keepdim=True))
            return channel, torch.sigmoid(self.spatial_units @ fused.mT)


@dataclass(eq=False)
class ACAMKD(MapObjective):
    alpha: float = 1.0
    diversity: float = 1.0
    masks: int | None = None
    query: Side = "teacher"
    spatial: bool = True
    channel: bool = True
    norm: Norm = "mask_sum"
    dice: Dice = "pairwise"
    mask_grad: Literal["full", "div_only"] = "full"
    mask_source: Literal["cooperative", "teacher"] = "cooperative"
    frozen: bool = False
    watch: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(self, "alpha", "diversity")
        choices = {"query": Side, "norm": Norm, "dice": Dice}
        choices |= {"mask_grad": Literal["full", "div_only"], "mask_source": Literal["cooperative", "teacher"]}
        for name, legal in choices.items():
            if getattr(self, name) not in get_args(legal):
                raise ValueError(f"{name}={getattr(self, name)!r}: legal values {', '.join(get_args(legal))}")
        if not (self.spatial or self.channel):
            raise ValueError("channel=False: with spatial=False nothing is distilled; set one of them")
        if self.masks is not None and self.masks < 1:
            raise ValueError(f"masks={self.masks}: legal range [1, inf), or null for one per class")
        if len(self.watch) not in (0, 2) or self.watch != sorted({*self.watch}):
            raise ValueError(f"watch={self.watch}: two epochs, the earlier first, or none")

    def distils(self) -> bool:
        return bool(self.alpha or self.diversity)

    def setup(self, context: Context) -> Connectors:
        """Alignment and masks of every pair of maps. Raises Refused for taps that are no maps."""
        connectors = super().setup(context)
        if not self.distils():
            return connectors
        shapes, count = self.pooled_shapes(context), self.masks or context.classes
        makers = [AttentionMasks(channels, count, self.query).requires_grad_(not self.frozen) for channels, _, _ in shapes]
        for maker in makers:  # units that no loss looks at are not trained
            maker.channel_units.requires_grad_(self.channel and not self.frozen)
            maker.spatial_units.requires_grad_(self.spatial and not self.frozen)
        connectors["masks"] = nn.ModuleList(makers)
        self._state["sums"] = torch.zeros(4, dtype=torch.float64)  # over the samples of this epoch: 1, mean M^c, mean M^s, overlap
        self._state["first_overlap"] = torch.full((), torch.nan, dtype=torch.float64)  # of the first step
        if self.watch:
            self._state["watched"] = torch.full((WATCHED,), -1)  # ids
            entries = {"channel": sum(c for c, _, _ in shapes), "spatial": sum(h * w for _, h, w in shapes)}
            self._state |= {f"{part}_masks": torch.full((2, WATCHED, count * entries[part]), torch.nan) for part in PARTS}
        return connectors

    def start(self, start: Start, connectors: Connectors) -> None:
        """Measure the scale; choose the images whose masks are watched: the first of the training rows."""
        super().start(start, connectors)
        if self.watch and self.distils():
            watched, ids = self._state["watched"], next(iter(start.rows()))[0].ids[:WATCHED]
            watched[: len(ids)] = ids.to(watched)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {**self.task_weights(), "channel": self.alpha, "spatial": self.alpha, "diversity": self.diversity}

    def terms(self, output: Output, signal: Signal, batch: Batch, phase: str, connectors: Connectors) -> dict[str, Term]:
        terms = task_terms(self.task, output, batch)
        if not self.distils():
            return terms
        errors: dict[str, list[Tensor]] = {"channel": [], "spatial": []}
        overlaps, masks = [], []
        for i, (teacher, student) in enumerate(self.maps(output, signal, connectors)):
            maker = connectors["masks"][i]  # type: ignore[index]
            made = dict(zip(PARTS, maker(teacher, teacher if self.mask_source == "teacher" else student), strict=True))
            masks.append(made)
            for part, error in (("channel", channel_masked_error), ("spatial", spatial_masked_error)):
                if getattr(self, part):
                    weighing = made[part].detach() if self.mask_grad == "div_only" else made[part]
                    errors[part].append(error(teacher - student, weighing, self.norm))
                    overlaps.append(mask_overlap(made[part], self.dice))
        terms |= {part: Term(torch.stack(values).sum(), "sample") for part, values in errors.items() if values}
        terms["diversity"] = Term(torch.stack(overlaps).sum(), "sample")
        self._keep(output.keep, masks, torch.stack(overlaps).mean(0))
        return terms

    def _keep(self, keep: dict[str, Tensor], masks: list[dict[str, Tensor]], overlap: Tensor) -> None:
        """Hand the masks of this step to `after_step`: their means, and all of them where they are watched."""
        rows = {part: torch.cat([made[part].detach().flatten(1) for made in masks], 1) for part in PARTS}
        keep["levels"] = torch.stack([torch.ones_like(overlap), *(r.mean(1) for r in rows.values()), overlap], 1).detach()
        if self.watch:
            keep |= {f"{part}_masks": row for part, row in rows.items()}

    def after_step(self, ids: Tensor, kept: Mapping[str, Tensor], progress: Progress) -> None:
        if not kept:
            return
        levels, state = kept["levels"].double(), self._state
        begins = progress.step % progress.steps_per_epoch == 0
        state["sums"] = levels.sum(0) + (0 if begins else state["sums"])
        if progress.step == 0:
            state["first_overlap"] = levels[:, 3].mean()
        if progress.epoch in self.watch:
            row, place = torch.nonzero(ids[:, None] == state["watched"], as_tuple=True)
            for part in PARTS:
                seen = state[f"{part}_masks"]
                seen[self.watch.index(progress.epoch), place] = kept[f"{part}_masks"][row].to(seen)

    def report(self) -> dict[str, float]:
        """Means over the samples of the epoch: `mask_channel`, `mask_spatial`, `diversity` (of one part and map); the last in the
        first step, `diversity_start`; `moved_channel` and `moved_spatial`: mean |difference| of the watched images' masks between
        the two epochs of `watch`, as they were when these images were trained on (with augmentation: as two views of them).
        """
        if not self.distils() or not self._state["sums"][0]:
            return {}
        sums = self._state["sums"].tolist()
        found = {name: value / sums[0] for name, value in zip(("mask_channel", "mask_spatial", "diversity"), sums[1:], strict=True)}
        found["diversity_start"] = float(self._state["first_overlap"])
        for part in PARTS if self.watch else ():
            before, after = self._state[f"{part}_masks"]
            moved = float((after - before).abs().nanmean())
            if not math.isnan(moved):  # before the second epoch
                found[f"moved_{part}"] = moved
        return found
