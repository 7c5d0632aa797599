"""Who holds which rows of a training split: the partition of a data set over clients, and what each gives to a shared proxy set.

Every cut is a function of (seed, sample id), so the order of the rows does not matter. `targets` and `ids` are those of a split,
int64 [N]; a client's part is positions in that split, int64, rising. Rows without a label (-1) belong to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdrun import rng
from kdrun.dataset.base import Split


def holders(clients: int, classes: int, per_client: int) -> list[tuple[int, ...]]:
    """The clients that hold each class, where client k holds `per_client` classes from class floor(k * classes / clients) on, cyclically.

    Ten clients and ten classes: client k holds k, k + 1, ... (mod 10).
    """
    held = [{(client * classes // clients + i) % classes for i in range(per_client)} for client in range(clients)]
    return [tuple(client for client in range(clients) if label in held[client]) for label in range(classes)]


def by_class(targets: Tensor, ids: Tensor, who: Sequence[Sequence[int]], clients: int, seed: int) -> list[Tensor]:
    """Every class cut evenly among its holders `who[class]`; IID where all hold all. A class that nobody holds is left out."""
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label, clients_of in enumerate(who):
        rows = _shuffled(targets, ids, label, seed)
        for client, part in zip(clients_of, rows.tensor_split(len(clients_of)) if clients_of else (), strict=True):
            parts[client].append(part)
    return [_joined(part) for part in parts]


def dirichlet(targets: Tensor, ids: Tensor, classes: int, clients: int, concentration: float, seed: int) -> list[Tensor]:
    """Every class cut in shares drawn from a symmetric Dirichlet distribution (Hsu, Qi, Brown 2019, arXiv 1909.06335, Sec. 3).

    Small concentrations give a class to few clients, large ones approach IID.
    """
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in range(classes):
        rows = _shuffled(targets, ids, label, seed)
        shares = np.random.Generator(np.random.Philox(rng.key(seed, "dirichlet", label))).dirichlet([concentration] * clients)
        borders = np.rint(shares.cumsum()[:-1] * len(rows)).astype(int).tolist()
        for client, part in enumerate(rows.tensor_split(borders)):
            parts[client].append(part)
    return [_joined(part) for part in parts]


def contributed(rows: Tensor, ids: Tensor, fraction: float, seed: int) -> Tensor:
    """The rows that a client gives to the proxy set: a share of its own positions `rows`, at least one, chosen by hash of the id."""
    order = torch.argsort(rng.bits(rng.key(seed, "proxy"), ids[rows]), stable=True)
    return rows[order[: max(1, round(fraction * len(rows)))]].sort().values


def _shuffled(targets: Tensor, ids: Tensor, label: int, seed: int) -> Tensor:
    rows = (targets == label).nonzero()[:, 0]
    return rows[torch.argsort(rng.bits(rng.key(seed, "partition"), ids[rows]), stable=True)]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sort().values if parts else torch.zeros(0, dtype=torch.int64)


def unlabelled(split: Split) -> Split:
    """A split as somebody sees it who is shown the inputs alone: every target -1, no further rows."""
    return Split(split.storage, torch.full_like(split.targets, -1), split.ids, {}, split.constants)
