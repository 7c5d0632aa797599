"""What clients and server of a federation send each other: predictions on shared samples up, their average over those who spoke down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Share = Literal["probs", "logits"]


class Upload(NamedTuple):
    """What one client says: nothing but the samples that it judges itself competent for."""

    client: int
    ids: Tensor  # [K] int64 sample ids
    said: Tensor  # [K, C] class probabilities at temperature T, or logits


class Ensemble(NamedTuple):
    """What the server broadcasts: a sample that nobody spoke of is not in it."""

    ids: Tensor  # [K] int64, rising
    targets: Tensor  # [K, C] class probabilities


def to_share(logits: Tensor, share: Share, temperature: float) -> Tensor:
    """A client's logits [K, C] in the form that is sent."""
    return torch.softmax(logits / temperature, dim=1) if share == "probs" else logits


def average(uploads: Sequence[Upload], share: Share, temperature: float) -> Ensemble:
    """q(x) = sum_c m_c(x) p_c(x) / sum_c m_c(x) over the clients that spoke of x; with logits softmax(mean / T).

    Summed in float64 by rising client number, so that the order of arrival changes no bit.
    """
    ordered = sorted(uploads, key=lambda upload: upload.client)
    said = torch.cat([upload.said for upload in ordered])
    ids, place, speakers = torch.cat([upload.ids for upload in ordered]).unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(ids), said.shape[1], dtype=torch.float64).index_add_(0, place, said.double())
    mean = total / speakers[:, None]
    return Ensemble(ids, (mean if share == "probs" else torch.softmax(mean / temperature, dim=1)).to(said.dtype))


def size(*sent: Tensor) -> int:
    """Bytes of what is sent."""
    return sum(tensor.numel() * tensor.element_size() for tensor in sent)


def precision_and_recall(mask: Tensor, truth: Tensor) -> tuple[float, float]:
    """Of a filter, in percent, over all (client, sample) pairs: of the spoken ones the share that is right, of the right ones the share
    that is spoken.  mask, truth bool [clients, P]; a pair is right if the client holds the sample's class."""
    right = (mask & truth).sum().item()
    return 100 * right / max(1, mask.sum().item()), 100 * right / max(1, truth.sum().item())
