"""Mixup and CutMix: an image together with a partner from anywhere in the training split, whose label counts by its share.

The partner, its share and its place are drawn for each (seed, view, sample id), not for a batch, so a mixed image is a function of these
alone: it can be replayed, its batch can be split, and what a teacher said of it can be kept. The partner is seen as the same view of
itself, cropped and coloured as it is when it is asked for alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Request, Split, Storage, Taken
from kdrun.dataset.erase import inside
from kdrun.types import Batch

OWN_SHARE = "own_share"  # row of Batch.extra: float32 [B], how much of each image is its own
PARTNER = "partner_"  # before the name of a row: that of the partner, e.g. partner_targets int64 [B]


class Drawn(NamedTuple):
    """With what each of B rows is mixed, and how."""

    partners: Tensor  # int64 [B], positions in the split; a row that is not mixed is its own partner
    share: Tensor  # float32 [B] in [0, 1] of the row itself; 1 where it is not mixed, or of a box without area
    boxes: Tensor  # int64 [B, 4] (top, left, height, width) of what CutMix takes from the partner; empty: mixup


@dataclass(frozen=True)
class Mixing:
    """How often and how much. Shares are drawn from Beta(alpha, alpha).

    mixup (Zhang et al., ICLR 2018, arXiv 1710.09412): share * own + (1 - share) * partner, of normalised images. CutMix (Yun et al., ICCV
    2019, arXiv 1905.04899): a box of the partner's pixels with the proportions of the image, centred anywhere and cut off at the border.
    """

    mixup: float = 0.0  # alpha; 0: none
    cutmix: float = 0.0  # alpha; 0: none
    probability: float = 1.0  # that a row is mixed at all
    switch: float = 0.5  # where both are on, that it is CutMix

    def draws(self, request: Request, rows: int, shape: tuple[int, ...]) -> Drawn:
        """For a request to a split of so many `rows` of a shape, (C, H, W) or (D,)."""

        def uniform(what: str) -> Tensor:
            return rng.uniform(rng.key(request.seed, "mix", what), request.view, request.ids)

        partners = rng.integers(rng.key(request.seed, "mix", "partner"), rows, request.view, request.ids)
        mixed = uniform("whether") < self.probability
        cut = mixed & (uniform("which") < (self.switch if self.mixup else 1.0)) if self.cutmix else torch.zeros_like(mixed)
        u = uniform("share")
        share = torch.where(cut, beta_quantile(u, self.cutmix), beta_quantile(u, self.mixup)).masked_fill(~mixed, 1.0)
        boxes = torch.zeros(len(partners), 4, dtype=torch.int64)
        if self.cutmix:
            boxes = boxes_of(share, uniform("down"), uniform("across"), shape[-2], shape[-1]) * cut[:, None]
            share = torch.where(cut, 1 - (boxes[:, 2] * boxes[:, 3]).double() / (shape[-2] * shape[-1]), share)
        share = share.float()
        return Drawn(torch.where(share < 1, partners, request.positions), share, boxes)


def beta_quantile(u: Tensor, alpha: float) -> Tensor:
    """Draws from Beta(alpha, alpha) out of uniform ones, float64; alpha 0: 1."""
    from scipy.special import betaincinv

    if alpha == 0:
        return torch.ones_like(u, dtype=torch.float64)
    return u.double() if alpha == 1 else torch.from_numpy(betaincinv(alpha, alpha, u.double().numpy()))


def boxes_of(share: Tensor, down: Tensor, across: Tensor, height: int, width: int) -> Tensor:
    """CutMix's boxes (top, left, height, width), int64 [B, 4], as torchvision has them: half sides rounded down, cut off at the border.

    `share` [B] float64 of the image that stays; `down` and `across` [B] in [0, 1) say where the centres are.
    """
    half = 0.5 * (1 - share).clamp(min=0).sqrt()
    sides = []
    for at, length in ((down, height), (across, width)):
        centre, reach = (at.double() * length).long(), (half * length).long()
        first, last = (centre - reach).clamp(min=0), (centre + reach).clamp(max=length)
        sides.append((first, last - first))
    (top, high), (left, wide) = sides
    return torch.stack([top, left, high, wide], 1)


def mix(own: Tensor, partner: Tensor, drawn: Drawn, cuts: bool) -> Tensor:
    """float32 [B, ...] of both -> [B, ...]. `cuts`: whether there may be boxes, of images [B, C, H, W]."""
    share = drawn.share.to(own.device, non_blocking=True).view(-1, *[1] * (own.dim() - 1))
    mixed = (partner * (1 - share)).add_(own * share)
    if not cuts:
        return mixed
    boxes = drawn.boxes.to(own.device, non_blocking=True)
    boxed = (boxes[:, 2] * boxes[:, 3] > 0)[:, None, None, None]
    # A box without area and a row that is not mixed have a share of 1: the row itself.
    return torch.where(inside(boxes, own.shape[2], own.shape[3])[:, None], partner, torch.where(boxed, own, mixed))


@dataclass(eq=False)
class Mixed:
    """The rows of another storage, mixed with each other where they are augmented."""

    storage: Storage
    ids: Tensor  # int64 [N] of its rows
    mixing: Mixing
    shape: tuple[int, ...]  # of a row as the models see it
    prefetches: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prefetches = self.storage.prefetches

    def __len__(self) -> int:
        return len(self.storage)

    def restricted(self, positions: Tensor) -> Mixed:
        """Some of the rows alone: partners come from among them."""
        return Mixed(Taken(self.storage, positions), self.ids[positions], self.mixing, self.shape)

    def draws(self, request: Request) -> Drawn:
        return self.mixing.draws(request, len(self), self.shape)

    def fetch(self, request: Request, device: torch.device) -> Tensor:
        if not request.augment:
            return self.storage.fetch(request, device)
        drawn = self.draws(request)
        return self._mixed(self.storage.fetch(self._with_partners(request, drawn), device), request, drawn)

    def stream(self, requests: Iterator[Request], device: torch.device) -> Iterator[tuple[Request, Tensor]]:
        asked: deque[tuple[Request, Drawn | None]] = deque()  # the answers come in order, with the partners behind them

        def doubled() -> Iterator[Request]:
            for request in requests:
                drawn = self.draws(request) if request.augment else None
                asked.append((request, drawn))
                yield request if drawn is None else self._with_partners(request, drawn)

        for _, inputs in self.storage.stream(doubled(), device):
            request, drawn = asked.popleft()
            yield request, inputs if drawn is None else self._mixed(inputs, request, drawn)

    def _with_partners(self, request: Request, drawn: Drawn) -> Request:
        """The rows and behind them the partners of those that are mixed, as the same view of themselves."""
        others = drawn.partners[drawn.share < 1]
        return request._replace(
            positions=torch.cat([request.positions, others]),
            ids=torch.cat([request.ids, self.ids[others]]),
            view=torch.cat([request.view, request.view[drawn.share < 1]]),
        )

    def _mixed(self, both: Tensor, request: Request, drawn: Drawn) -> Tensor:
        """Answers to `_with_partners` [B + M, ...] -> [B, ...]."""
        there, rows = drawn.share < 1, len(request.positions)
        at = torch.where(there, rows - 1 + there.cumsum(0), torch.arange(rows))
        return mix(both[:rows], both.index_select(0, at.to(both.device, non_blocking=True)), drawn, bool(self.mixing.cutmix))

    def digest(self, into: Any) -> None:
        into.update(f"{self.mixing!r} {self.shape}".encode())
        into.update(self.ids.contiguous().numpy().data)
        self.storage.digest(into)


@dataclass(frozen=True, eq=False)
class MixedSplit(Split):
    """A split whose storage is `Mixed`. Its augmented batches say what they are mixed of: extra["own_share"], extra["partner_targets"],
    and likewise partner_NAME for every further row of the data set."""

    def batch(self, request: Request, inputs: Tensor, device: torch.device) -> Batch:
        batch = super().batch(request, inputs, device)
        if not request.augment:
            return batch
        assert isinstance(self.storage, Mixed)
        drawn = self.storage.draws(request)
        rows = {PARTNER + name: of[drawn.partners] for name, of in {"targets": self.targets, **self.extra}.items()}
        rows[OWN_SHARE] = drawn.share
        return batch._replace(extra={**batch.extra, **{name: row.to(device, non_blocking=True) for name, row in rows.items()}})


def mixed(split: Split, mixing: Mixing, shape: tuple[int, ...]) -> MixedSplit:
    """The split with its rows mixed. `shape`: (C, H, W) or (D,) that the models see."""
    return MixedSplit(Mixed(split.storage, split.ids, mixing, shape), split.targets, split.ids, split.extra, split.constants)
