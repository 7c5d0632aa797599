"""The label's term where images may be mixed of two (dataset.mixup, dataset.cutmix).

    own_share * CE(z, y) + (1 - own_share) * CE(z, y of the partner)

which is the cross-entropy on the mixed label (Zhang et al., ICLR 2018, arXiv 1710.09412, Sec. 2; Yun et al., ICCV 2019, arXiv 1905.04899).
An objective that takes all its labels from here declares `mixes = True`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kdrun.dataset.mix import OWN_SHARE, PARTNER
from kdrun.losses.divergence import cross_entropy
from kdrun.types import Batch


def label_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy on the labels of a batch, by shares where it is mixed.  [B, C] -> [B], nats; shapes as in `cross_entropy`."""
    return by_share(partial(cross_entropy, logits), batch, "targets", batch.targets)


def by_share(loss: Callable[[Tensor], Tensor], batch: Batch, row: str, own: Tensor) -> Tensor:
    """`loss` of a row of the batch, and of the same row of the partners, each by its share.  -> [B]."""
    found = loss(own)
    share = batch.extra.get(OWN_SHARE)
    return found if share is None else share * found + (1 - share) * loss(batch.extra[PARTNER + row])
